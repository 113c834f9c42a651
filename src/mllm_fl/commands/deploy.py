"""``deploy``: a federation of real machines on Flower."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.deployment.layout import Layout

WHAT = "a federation of real machines: set it up, keep it running, watch it, take it up again (docs/deploy.md)"


def add(verbs: Any) -> None:
    """One verb with one word after it."""
    top = verbs.add_parser("deploy", help=WHAT, description=WHAT, allow_abbrev=False)
    words = top.add_subparsers(dest="word", metavar="WORD", required=True)

    def word(name: str, call: Any, text: str) -> Any:
        p = words.add_parser(name, help=text, description=text, allow_abbrev=False)
        p.set_defaults(call=call)
        return p

    p = word("init", init, "write a deployment: app, certificates, keys, units")
    p.add_argument("dir", type=Path)
    p.add_argument("--config", type=Path, required=True, help="the TOML file that is trained")
    p.add_argument("--sites", default="site-1,site-2,site-3", help="their names, comma-separated")
    p.add_argument("--host", default="localhost", help="the server's name or address as the sites see it")
    p.add_argument("--port", type=int, default=8000, help="one port for everything (default 8000)")
    p.add_argument(
        "--bind", default="127.0.0.1", help="the interface that the SuperLink listens on (default: this machine only)"
    )
    p.add_argument(
        "--images", choices=("own", "partition"), default="partition", help="own: each site brings its images"
    )

    p = word("superlink", superlink, "the server's process, kept alive")
    p.add_argument("dir", type=Path)
    p = word("node", node, "a site's process, kept alive")
    p.add_argument("dir", type=Path, help="the folder that the site was given")
    p.add_argument(
        "--worker", action="store_true", help="a process that stays beside it: most of a message's start-up is saved"
    )
    p = word("register", register, "make the sites' keys known to the SuperLink")
    p.add_argument("dir", type=Path)
    p = word("renew", renew, "a new certificate for the server from the same authority")
    p.add_argument("dir", type=Path)
    p.add_argument("--host", help="another name or address for the server")
    p = word("run", run, "start run.toml on the federation and watch it")
    p.add_argument("dir", type=Path)
    _values(p)
    p = word("resume", resume, "go on with a run after its last finished round")
    p.add_argument("run", type=Path, help="its folder, DIR/runs/EXPERIMENT/NAME")
    p = word("up", up, "server and sites on this machine, and one run; everything is ended when it is over")
    p.add_argument(
        "config", type=Path, nargs="?", help="the TOML file that is trained; not needed for a folder that is there"
    )
    p.add_argument("--local", action="store_true", required=True, help="all on this machine")
    p.add_argument("--nodes", type=int, help="sites (default 3)")
    p.add_argument(
        "--dir", type=Path, default=Path("federation"), help="the deployment's folder (default ./federation)"
    )
    p.add_argument("--worker", action="store_true", help="a process that stays beside each node")
    _values(p)
    p = word("status", status, "sites, runs, rounds, who is late")
    p.add_argument("dir", type=Path)
    p = word("doctor", doctor, "which layer fails: name, TCP, TLS, clock, key, version, data")
    p.add_argument("dir", type=Path, help="a site's folder, or the server's")


def _values(p: Any) -> None:
    p.add_argument(
        "--set", default=None, help='values over run.toml\'s: "federate.rounds = 3, federate.local.lr = 0.05"'
    )
    p.add_argument("--arm", default=None, help="of several arms")
    p.add_argument("--seed", type=int, default=None, help="of several seeds")
    for name, text in (
        ("deadline", "seconds for a round"),
        ("wait", "seconds to wait for missing sites"),
        ("poll", "seconds between two looks"),
    ):
        p.add_argument(f"--{name}", type=float, default=None, help=text)
    p.add_argument("--minimum", type=int, default=None, help="answers without which a round is played again")
    p.add_argument("--attempts", type=int, default=None, help="how often")


def _said(args: argparse.Namespace) -> dict[str, Any]:
    names = ("set", "arm", "seed", "deadline", "wait", "poll", "minimum", "attempts")
    return {n: getattr(args, n) for n in names if getattr(args, n) is not None}


def say(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)


def init(args: argparse.Namespace) -> int:
    """``deploy init DIR``."""
    from mllm_fl.deployment import layout

    sites = [s.strip() for s in args.sites.split(",") if s.strip()]
    made = layout.init(
        args.dir, sites=sites, config=args.config, host=args.host, port=args.port, bind=args.bind, images=args.images
    )
    say(f"wrote {made.folder}: {len(sites)} sites, server {made.host}:{made.port}")
    say(
        f"next: mllm-fl deploy superlink {layout.typed(args.dir)}   (then register, and node on each site; {args.dir}/README.md)"
    )
    return 0


def superlink(args: argparse.Namespace) -> int:
    """``deploy superlink DIR``: until interrupted."""
    from mllm_fl.deployment import control, processes
    from mllm_fl.deployment.layout import Layout, write_connection

    made = Layout.read(args.dir)
    write_connection(made)
    with processes.superlink(made, say) as kept:
        control.wait_ready(made)
        say(f"SuperLink answers on {made.bind}:{made.port}")
        kept.wait()
    return 0


def node(args: argparse.Namespace) -> int:
    """``deploy node DIR``: until interrupted."""
    from mllm_fl.deployment import processes

    found = _node(args.dir)
    with contextlib.ExitStack() as kept:
        if args.worker:
            kept.enter_context(processes.worker(found, say))
        one = kept.enter_context(processes.supernode(found, say))
        say(f"node of {found.site} for {found.host}:{found.port}")
        one.wait()
    return 0


def _node(folder: Path) -> Any:
    """The site's node.toml, its images' path made absolute."""
    import dataclasses

    from mllm_fl.deployment.doctor import at_home
    from mllm_fl.deployment.layout import Node

    found = Node.read(folder)
    if "data" in found.config:
        config = dict(found.config) | {"data": at_home(str(found.config["data"]), found.folder)}
        found = dataclasses.replace(found, config=config)
    return found


def register(args: argparse.Namespace) -> int:
    """``deploy register DIR``."""
    from mllm_fl.deployment import control
    from mllm_fl.deployment.layout import Layout

    made = Layout.read(args.dir)
    control.wait_ready(made)
    for site in control.register(made):
        say(f"{site.name}: node {site.node}")
    return 0


def renew(args: argparse.Namespace) -> int:
    """``deploy renew DIR``: the sites keep their ca.crt."""
    from mllm_fl.deployment.certificates import make_authority
    from mllm_fl.deployment.layout import Layout, reachable

    made = Layout.read(args.dir)
    host = args.host or made.host
    reachable(host, made.port, "--")
    make_authority(made.server, made.server, [host, made.host, "localhost", "127.0.0.1"])
    say(f"{made.server / 'server.crt'}: new, for {host}; start the SuperLink again")
    return 0


def run(args: argparse.Namespace) -> int:
    """``deploy run DIR``."""
    from mllm_fl.deployment import control, follow
    from mllm_fl.deployment.layout import Layout

    made = Layout.read(args.dir)
    control.wait_ready(made)
    values = follow.settings_of(made, **_said(args))
    path, number = follow.start(made, values, say)
    return _over(made, path, number)


def resume(args: argparse.Namespace) -> int:
    """``deploy resume RUN``."""
    from mllm_fl.deployment import follow

    made, path, number = follow.resume(args.run, say)
    return _over(made, path, number)


def _over(made: Layout, path: Path, number: str) -> int:
    from mllm_fl.deployment import follow

    final = follow.follow(made, path, number, say)
    say(f"finished: accuracy {final['last']['accuracy']:.1%}, weights {final['weights_sha256'][:16]}, {path}")
    return 0


def up(args: argparse.Namespace) -> int:
    """``deploy up --local``."""
    from mllm_fl.deployment import control, follow, layout, processes

    start = time.monotonic()
    if (args.dir / "federation.toml").exists():
        made = layout.Layout.read(args.dir)
        there, elsewhere = made.folder / "run.toml", "another --dir makes a new federation"
        if args.config is not None and args.config.read_bytes() != there.read_bytes():
            raise UserError(there, f"is not {args.config}", f"copy it there, or {elsewhere}")
        if args.nodes not in (None, len(made.sites)):
            raise UserError("--nodes", f"{made.folder} has {len(made.sites)} sites", elsewhere)
    else:
        if args.config is None:
            raise UserError("deploy up", "which TOML file?", "mllm-fl deploy up --local experiments/quickstart.toml")
        nodes = 3 if args.nodes is None else args.nodes
        if nodes < 1:
            raise UserError("--nodes", f"{nodes} is below 1")
        [port] = processes.free_ports(1)
        names = [f"site-{i + 1}" for i in range(nodes)]
        made = layout.init(args.dir, sites=names, config=args.config, port=port)
    values = follow.settings_of(made, **_said(args))
    path = follow.path_of(made, values)  # what is wrong with the configuration is said before anything is started
    with contextlib.ExitStack() as kept:
        kept.enter_context(processes.superlink(made, say))
        control.wait_ready(made)
        control.register(made)
        for name in made.sites:
            found = _node(made.site(name))
            if args.worker:
                kept.enter_context(processes.worker(found, say))
            kept.enter_context(processes.supernode(found, say))
        say(f"{len(made.sites)} sites and a server on this machine after {time.monotonic() - start:.0f} s")
        path, number = follow.start(made, values, say)
        return _over(made, path, number)


def status(args: argparse.Namespace) -> int:
    """``deploy status DIR``."""
    from mllm_fl.deployment import follow
    from mllm_fl.deployment.layout import Layout

    for line in follow.overview(Layout.read(args.dir)):
        say(line)
    return 0


def doctor(args: argparse.Namespace) -> int:
    """``deploy doctor DIR``: 0 if every layer holds."""
    from mllm_fl.deployment import control, doctor
    from mllm_fl.deployment.layout import Layout

    if (args.dir / "federation.toml").exists():
        made = Layout.read(args.dir)
        lines = doctor.server(made, lambda: control.ready(made))
    else:
        lines = doctor.site(_node(args.dir))
    for line in lines:
        say(f"ok  {line}")
    return 0
