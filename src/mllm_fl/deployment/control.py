"""What the operator asks of the SuperLink, by Flower's own command line: register keys, start a run, how it stands."""

from __future__ import annotations

import json
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_fl.deployment.layout import NAME, Layout, quoted, typed, write_connection
from mllm_fl.deployment.processes import environment, program
from mllm_fl.deployment.sites import read_sites, write_sites
from mllm_fl.engines.reception import Site
from mllm_fl.errors import UserError


def flwr(made: Layout, *words: str, cwd: Path | None = None) -> Any:
    """Run ``flwr ... --format json`` against this deployment's SuperLink; the object that it prints.

    Raises:
        UserError: it failed; what Flower said, in one line.
    """
    done = subprocess.run(
        [program("flwr"), *words, "--format", "json"],
        env=environment(made.server / "home"), cwd=cwd or made.folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    start = done.stdout.find("{")
    try:
        found = json.loads(done.stdout[start:]) if start >= 0 else {}
    except ValueError:
        found = {}
    if done.returncode or not found or found.get("success") is False:
        said = str(found.get("error-message") or (done.stderr or done.stdout).strip()[-300:] or "no answer")
        raise UserError(
            f"flwr {words[0]}",
            said,
            f"is `mllm-fl deploy superlink {typed(made.folder)}` running? see {made.server}/superlink.log",
        )
    return found


def ready(made: Layout) -> bool:
    """Whether the SuperLink answers on this machine.

    Raises:
        UserError: there is no certificate to know it by.
    """
    ca = made.server / "ca.crt"
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except OSError as e:
        raise UserError(ca, "is not a certificate", "restore it: any site has the same ca.crt") from e
    try:
        with urllib.request.urlopen(f"https://127.0.0.1:{made.port}/health", context=context, timeout=5) as answer:
            return int(answer.status) == 200
    except (OSError, urllib.error.URLError):
        return False


def wait_ready(made: Layout, seconds: float = 300.0) -> None:
    """Until the SuperLink answers.

    Raises:
        UserError: it does not.
    """
    until = time.monotonic() + seconds
    while not ready(made):
        if time.monotonic() > until:
            raise UserError(
                f"https://127.0.0.1:{made.port}", "no SuperLink answers", f"see {made.server}/superlink.log"
            )
        time.sleep(0.3)


def register(made: Layout) -> list[Site]:
    """Register each site's public key that is not registered yet; binds the SuperLink's number for it to the site's name in sites.json."""
    write_connection(made)
    sites = read_sites(made.sites_json)
    for i, site in enumerate(sites):
        if site.node is None:
            answer = flwr(
                made, "supernode", "register", str(made.site(site.name) / "key.pub"), NAME, "--name", site.name
            )
            sites[i] = Site(site.name, int(answer["node-id"]))
            write_sites(made.sites_json, sites)  # after each: a kill in between registers no key twice
    return sites


def submit(made: Layout, values: Mapping[str, Any]) -> str:
    """Start a run of DIR/app with these values of its run configuration; its number at the SuperLink.

    Raises:
        UserError: Flower did not take it.
    """
    write_connection(made)
    place = made.server / "run-config.toml"
    place.write_text(
        "".join(f"{k} = {quoted(v) if isinstance(v, str) else json.dumps(v)}\n" for k, v in values.items()),
        encoding="utf-8",
    )
    answer = flwr(made, "run", str(made.folder / "app"), NAME, "--run-config", str(place))
    return str(answer["run-id"])


def standing(made: Layout, run: str) -> str:
    """What the SuperLink says about a run: ``running``, ``finished:completed``, ``finished:failed``, ..."""
    found = flwr(made, "ls", NAME, "--run-id", run)
    runs = found.get("runs") or [{}]
    return str(runs[0].get("status", "unknown"))


def stop(made: Layout, run: str) -> None:
    """End a run; its folder stays and can be resumed."""
    flwr(made, "stop", run, NAME)


def nodes(made: Layout) -> list[dict[str, Any]]:
    """The registered nodes as the SuperLink sees them."""
    found = flwr(made, "supernode", "list", NAME)
    return list(found.get("nodes") or found.get("supernodes") or [])
