"""The texts of a deployment: the Flower app, systemd units, a compose file, and the page that says what to do with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mllm_fl import __version__

HEAD = "made by `mllm-fl deploy init`; docs/deploy.md says what each value does"

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "mllm-fl-app"
version = "1.0.0"
description = "Federated learning on long-tailed images with a multimodal LLM on the server, on real devices"
license = "Apache-2.0"
dependencies = ["mllm-fl[flower]"]  # installed beforehand on every machine, in the same version

[tool.hatch.build.targets.wheel]
packages = ["mllm_fl_app"]

[tool.flwr.app]
publisher = "mllm-fl"

[tool.flwr.app.components]
serverapp = "mllm_fl_app.server_app:app"
clientapp = "mllm_fl_app.client_app:app"

[tool.flwr.app.config]  # flwr run . --run-config 'config="/srv/run.toml" deadline=120.0'
config = "run.toml"     # the TOML file that the simulator runs; a path on the server, absolute or from where the SuperLink was started
arm = ""                # of several arms in it, the one to run
seed = -1               # of several seeds; -1: the file's
set = ""                # values over the file's: "federate.rounds = 3, federate.local.lr = 0.05"
runs = "runs"           # where the run folder goes, on the server
sites = ""              # sites.json, which binds node keys to sites; "": any node may take part
nodes = 2               # without sites.json, how many nodes are waited for
images = "partition"    # "own": each site brings its images; "partition": nodes play parts of the data set in config
deadline = 600.0        # seconds after which a client that has not answered is dropped from the round
minimum = 1             # answers without which a round is played again
attempts = 3            # how often
wait = 600.0            # seconds to wait for sites that are not there
poll = 0.3              # seconds between two looks for answers
"""

SERVER_APP = '''\
"""The server's side: the round loop, its checkpoints and its records are mllm-fl's own."""

from mllm_fl.deployment.server import main
from mllm_fl.engines.flower import server_app

app = server_app(main)
'''

CLIENT_APP = '''\
"""A site's side: images, memory and teacher stay here; what is sent is what the method declares."""

from mllm_fl.deployment.worker import ask
from mllm_fl.engines.flower import client_app

app = client_app(ask)
'''

README = """\
# mllm-fl on Flower

The Flower app of [mllm-fl](https://pypi.org/project/mllm-fl/): the TOML file that ran in the simulator runs on a SuperLink and SuperNodes.
`mllm-fl deploy init DIR` writes a deployment around it (certificates, keys, units); docs/deploy.md leads from an empty folder to a finished round.

```sh
pip install 'mllm-fl[flower]'          # on every machine, the same version
flwr run . mllm-fl --stream --run-config 'config="/srv/federation/run.toml" sites="/srv/federation/server/sites.json"'
```
"""


def app() -> dict[str, str]:
    """The app's files by name; ``deploy/`` in the repository holds the same."""
    return {
        "pyproject.toml": PYPROJECT,
        "README.md": README,
        "mllm_fl_app/__init__.py": '"""mllm-fl as a Flower app."""\n',
        "mllm_fl_app/server_app.py": SERVER_APP,
        "mllm_fl_app/client_app.py": CLIENT_APP,
    }


UNIT = """\
# {head}
[Unit]
Description=mllm-fl {what}
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={python} -m mllm_fl.cli deploy {verb} {place}
Restart=always
RestartSec=5
KillMode=control-group
Environment=FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 OMP_NUM_THREADS=1
NoNewPrivileges=true
PrivateTmp=true

[Install]
WantedBy=multi-user.target
"""

COMPOSE = """\
# {head}
# One image with `pip install 'mllm-fl[cli,flower]=={version}'` in it; a site's machine, with this file and sites/NAME, starts its own service only:
#   docker compose up NAME
services:
  superlink:
    image: mllm-fl:{version}
    command: ["python", "-m", "mllm_fl.cli", "deploy", "superlink", "/federation"]
    environment: {environment}
    volumes: [".:/federation"]
    network_mode: host
    restart: always
{sites}"""

COMPOSE_SITE = """\
  "{name}":
    image: mllm-fl:{version}
    command: ["python", "-m", "mllm_fl.cli", "deploy", "node", "/site"]
    environment: {environment}
    volumes: ["./sites/{name}:/site"]
    network_mode: host
    restart: always
"""

PAGE = """\
# This federation

Server `{host}:{port}`, sites {sites}. Made by mllm-fl {version}; the same version belongs on every machine.

On the server, in this folder:

```sh
mllm-fl deploy superlink .     # stays in the foreground; systemd/mllm-fl-superlink.service starts it at boot
mllm-fl deploy register .      # once: the sites' public keys; writes server/sites.json
mllm-fl deploy run .           # run.toml, until it has finished; mllm-fl deploy status . from another terminal
```

On each site, with its folder `sites/NAME` copied there over a safe way (it holds the site's private key) and nothing else of this folder:

```sh
mllm-fl deploy doctor NAME     # name, TCP, TLS, clock, key, version, data: the first that fails, in one line
mllm-fl deploy node NAME       # stays in the foreground and comes back after every kill
```

`server/ca.key` and `server/server.key` leave the server's machine never. Nobody but the server's operator may reach the SuperLink's Control API, which has no
users in Flower's open version: docs/deploy.md, "Behind a proxy".
"""


def around(folder: Path, sites: Sequence[str], host: str, port: int, python: str) -> dict[str, str]:
    """Everything else by name: units, compose file, page."""
    environment = '{FLWR_TELEMETRY_ENABLED: "0", FLWR_DISABLE_UPDATE_CHECK: "1", FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION: "1"}'
    fields = {"head": HEAD, "version": __version__, "environment": environment}
    services = "".join(COMPOSE_SITE.format(name=name, **fields) for name in sites)
    units = {
        "systemd/mllm-fl-superlink.service": UNIT.format(
            head=HEAD, what="server", python=_word(python), verb="superlink", place=_word(str(folder))
        ),
        "systemd/mllm-fl-node@.service": UNIT.format(
            head=f"{HEAD}\n# the site's folder lies at /etc/mllm-fl/NAME: systemctl enable --now mllm-fl-node@NAME",
            what="site %i", python=_word(python), verb="node", place="/etc/mllm-fl/%i",
        ),
    }  # fmt: skip
    return units | {
        "compose.yaml": COMPOSE.format(sites=services, **fields),
        "README.md": PAGE.format(host=host, port=port, sites=", ".join(sites), version=__version__),
    }


def _word(text: str) -> str:
    """One word of a systemd command line, whatever is in it."""
    for sign, written in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        text = text.replace(sign, written)
    return f'"{text}"'
