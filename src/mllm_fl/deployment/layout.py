"""A deployment on disk: what ``mllm-fl deploy init DIR`` writes, and where everything of it lies.

DIR/federation.toml      address, port, sites                      DIR/app/          the Flower app that travels to the nodes
DIR/run.toml             what is trained                           DIR/server/       certificates, the list of sites, Flower's database
DIR/runs/                run folders                               DIR/sites/NAME/   key, ca.crt, node.toml: what one site is given
DIR/systemd/ compose.yaml README.md                                how it is kept running
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_fl.atomic import write_atomic
from mllm_fl.deployment import template
from mllm_fl.deployment.certificates import make_authority, make_node_key
from mllm_fl.deployment.sites import write_sites
from mllm_fl.engines.reception import OWN, PARTITION, Site
from mllm_fl.errors import UserError
from mllm_fl.toml import read_toml

NAME = "mllm-fl"  # of the connection in Flower's own config.toml


@dataclass(frozen=True)
class Layout:
    """One deployment's folder. ``host``, ``port``: where sites find the server; ``bind``: the interface on which it listens."""

    folder: Path
    host: str
    port: int
    bind: str
    sites: tuple[str, ...]
    images: str

    @property
    def server(self) -> Path:
        """What only the server may read."""
        return self.folder / "server"

    @property
    def sites_json(self) -> Path:
        """The list that binds node keys to sites."""
        return self.server / "sites.json"

    def site(self, name: str) -> Path:
        """What one site is given."""
        return self.folder / "sites" / name

    @classmethod
    def read(cls, folder: Path) -> Layout:
        """From ``federation.toml``.

        Raises:
            UserError: not a deployment, or a broken file.
        """
        path = folder / "federation.toml"
        if not path.exists():
            raise UserError(folder, "no federation.toml here", f"make one: mllm-fl deploy init {typed(folder)}")
        raw = read_toml(path)
        try:
            sites = tuple(str(s) for s in raw["sites"])
            made = cls(
                folder.resolve(), str(raw["host"]), int(raw["port"]), str(raw["bind"]), sites, str(raw["images"])
            )
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(path, f"lacks or garbles {e}", "correct it, or make a new federation elsewhere") from e
        checked(made, f"{path}: ")
        return made


@dataclass(frozen=True)
class Node:
    """``node.toml`` of one site."""

    folder: Path
    site: str
    host: str
    port: int
    runtime_port: int
    config: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Node:
        """From the folder that the site was given.

        Raises:
            UserError: no node.toml there, or a broken one.
        """
        path = folder / "node.toml"
        if not path.exists():
            raise UserError(
                folder, "no node.toml here", "give the folder that `mllm-fl deploy init` made for this site"
            )
        raw = read_toml(path)
        known = {
            "site",
            "host",
            "port",
            "runtime_port",
            "data",
            "share_histogram",
            "partition_id",
            "num_partitions",
            "root",
        }
        wrong = sorted(raw.keys() - known)
        if wrong:
            raise UserError(f"{path}: {wrong[0]}", "unknown key", f"known keys: {', '.join(sorted(known))}")
        try:
            config: dict[str, Any] = {"site": str(raw["site"]), "state": str(folder.resolve() / "state")}
            for key in ("data", "share_histogram", "partition_id", "num_partitions", "root"):
                if key in raw:
                    config[key.replace("_", "-")] = raw[key]
            node = cls(
                folder.resolve(), str(raw["site"]), str(raw["host"]), int(raw["port"]), int(raw["runtime_port"]), config
            )
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(path, f"lacks or garbles {e}", "correct it") from e
        reachable(node.host, node.port, f"{path}: ")
        for key, kind in (
            ("data", str),
            ("root", str),
            ("share_histogram", bool),
            ("partition_id", int),
            ("num_partitions", int),
        ):
            if type(raw.get(key, kind())) is not kind:
                forms = {str: "a text in quotes", bool: "true or false", int: "a number"}
                raise UserError(f"{path}: {key}", f"{raw[key]!r} is not {forms[kind]}", "correct it")
        if not 0 <= node.runtime_port <= 65535:
            raise UserError(f"{path}: runtime_port", f"{node.runtime_port} is no port", "0 takes any free one")
        return node

    def node_config(self) -> str:
        """As ``flower-supernode --node-config`` reads it."""

        def said(v: Any) -> str:
            return quoted(v) if isinstance(v, str) else json.dumps(v)

        return " ".join(f"{k}={said(v)}" for k, v in self.config.items())


def init(
    folder: Path,
    *,
    sites: Sequence[str],
    config: Path,
    host: str = "localhost",
    port: int = 8000,
    bind: str = "127.0.0.1",
    images: str = PARTITION,
    runtime_ports: Sequence[int] | None = None,
) -> Layout:
    """Write a whole deployment; nothing in it is running yet.

    Raises:
        UserError: the folder holds one already, a site's name that cannot name a folder, or no such configuration.
    """
    from mllm_fl.config import load

    folder = folder.resolve()
    if (folder / "federation.toml").exists():
        raise UserError(folder, "holds a federation already", "choose another folder, or delete this one")
    made = Layout(folder, host, port, bind, tuple(sites), images)
    checked(made, "--")
    load(config)
    try:
        for part in ("server/home", "runs", "app/mllm_fl_app", "systemd"):
            (folder / part).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(folder, f"cannot be written: {e.strerror}", "choose another folder") from e
    os.chmod(made.server, 0o700)
    make_authority(made.server, made.server, [host, "localhost", "127.0.0.1"])
    ports = list(runtime_ports or [0] * len(sites))
    for i, name in enumerate(sites):
        _site(made, name, i, ports[i])
    write_sites(made.sites_json, [Site(name) for name in sites])
    if config.resolve() != folder / "run.toml":
        shutil.copyfile(config, folder / "run.toml")
    for name, text in template.app().items():
        (folder / "app" / name).write_text(text)
    for name, text in template.around(made.folder, sites, host, port, sys.executable).items():
        (folder / name).write_text(text, encoding="utf-8")
    write_connection(made)
    listed = ", ".join(quoted(s) for s in sites)
    text = (
        f'# {template.HEAD}\nhost = "{host}"\nport = {port}\nbind = "{bind}"\nimages = "{images}"\nsites = [{listed}]\n'
    )
    write_atomic(folder / "federation.toml", text.encode())  # the last: with it the deployment is whole
    return made


def checked(made: Layout, place: str) -> None:
    """Names and addresses that folders, certificates, YAML and Flower all take. ``place``: what stands before the key in an error.

    Raises:
        UserError: the first that does not hold.
    """
    for name in made.sites:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", name):
            raise UserError(f"site {name!r}", "cannot name a folder", "use letters, digits, - and _")
        if name.lower() == "superlink":
            raise UserError(f"site {name!r}", "is what the server is called", "choose another name")
    if not made.sites or len({name.lower() for name in made.sites}) != len(made.sites):
        problem = "no site, or one name twice (A and a are one folder on some disks)"
        raise UserError(f"{place}sites", problem, "give each site a name of its own")
    if made.images not in (OWN, PARTITION):
        raise UserError(f"{place}images", f"{made.images!r} is unknown", f"use {OWN} or {PARTITION}")
    reachable(made.host, made.port, place)
    reachable(made.bind, made.port, place, "bind")


def reachable(host: str, port: int, place: str, key: str = "host") -> None:
    """Refuse what cannot be the name or IPv4 address of a machine, or a port.

    Raises:
        UserError: names the key.
    """
    try:
        fine = ipaddress.ip_address(host).version == 4
    except ValueError:
        fine = re.fullmatch(r"(?!-)[A-Za-z0-9_.-]{1,253}(?<![.-])", host) is not None
    if not fine:
        raise UserError(
            f"{place}{key}",
            f"{host!r} is neither a machine's name nor an IPv4 address",
            "write it without http:// and port: fl.example.org",
        )
    if not 1 <= port <= 65535:
        raise UserError(f"{place}port", f"{port} is no port", "choose one from 1 to 65535")


def quoted(text: str) -> str:
    """A TOML string that Flower's own reader of ``key="value"`` takes too, which knows no escaped quotation mark."""
    return re.sub(r"\\(.)", lambda m: r"\u0022" if m[1] == '"' else m[0], json.dumps(text, ensure_ascii=False))


def typed(path: object) -> str:
    """A path as it is typed in a shell."""
    return shlex.quote(str(path))


def write_connection(made: Layout) -> None:
    """Flower's own list of connections, which takes absolute paths only."""
    ca = made.server / "ca.crt"
    (made.server / "home").mkdir(exist_ok=True)
    # the operator's commands go to the loopback: the Control API has no users
    address = f"127.0.0.1:{made.port}"
    text = f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "{address}"\nroot-certificates = {quoted(str(ca))}\n'
    write_atomic(made.server / "home" / "config.toml", text.encode())


def _site(made: Layout, name: str, index: int, runtime_port: int) -> None:
    place = made.site(name)
    (place / "state").mkdir(parents=True, exist_ok=True)
    os.chmod(place, 0o700)
    make_node_key(place)
    shutil.copyfile(made.server / "ca.crt", place / "ca.crt")
    lines = [
        f"# {template.HEAD}",
        f'site = "{name}"',
        f'host = "{made.host}"',
        f"port = {made.port}",
        f"runtime_port = {runtime_port}        # of Flower's own, on this machine's loopback only; 0: any free one",
    ]
    if made.images == OWN:
        lines += [
            'data = "folder:images"   # this site\'s images: folder:PATH or list:PATH.csv; relative to this folder',
            "share_histogram = false  # whether the server may know how many images of each class are here",
        ]
    else:
        lines += [
            f"partition_id = {index}",
            f"num_partitions = {len(made.sites)}",
            "share_histogram = false",
            '# root = "/data/cifar"   # where this machine has the data set that run.toml names',
        ]
    write_atomic(place / "node.toml", ("\n".join(lines) + "\n").encode())
