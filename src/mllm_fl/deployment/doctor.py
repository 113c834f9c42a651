"""Which layer fails between a site and its server: name, TCP, TLS, clock, key, version, data. The first that does not hold, in one line."""

from __future__ import annotations

import email.utils
import http.client
import importlib.metadata
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mllm_fl import __version__
from mllm_fl.deployment.images import named
from mllm_fl.deployment.layout import Layout, Node, typed
from mllm_fl.deployment.sites import read_sites
from mllm_fl.errors import UserError

AHEAD, BEHIND = 4, 300  # seconds that a site's clock may be off; Flower refuses signatures beyond 5 and 305
FLOWER = ((1, 41), (1, 43))


def site(node: Node, proxy_hint: str = "") -> Iterator[str]:
    """Each layer that holds, in words; stops at the first that does not.

    Raises:
        UserError: names the layer and where it is mended.
    """
    where = f"{node.host}:{node.port}"
    yield f"version: mllm-fl {__version__}, flwr {flower_version()}"
    try:
        found = sorted({str(a[4][0]) for a in socket.getaddrinfo(node.host, node.port, type=socket.SOCK_STREAM)})
    except OSError as e:
        raise UserError(
            f"name: {node.host}", f"cannot be resolved ({e.strerror})", "correct host in node.toml, or the name server"
        ) from e
    yield f"name: {node.host} is {', '.join(found)}"
    try:
        socket.create_connection((node.host, node.port), 10).close()
    except OSError as e:
        way = "is the SuperLink running there, and does a firewall let this port through?"
        raise UserError(f"TCP: {where}", f"no connection ({e.strerror or e})", way) from e
    yield f"TCP: {where} answers"
    served, here = _over_tls(node)
    yield f"TLS: the server's certificate is signed by {node.folder / 'ca.crt'} and names {node.host}"
    off = here - served
    if off > AHEAD or off < -BEHIND:
        problem = f"this machine is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the server, which will refuse its signature"
        raise UserError("clock", problem, "set both clocks (timedatectl set-ntp true)")
    yield f"clock: {off:+.0f} s from the server's"
    yield from _key(node.folder)
    yield from _data(node)


def _over_tls(node: Node) -> tuple[float, float]:
    """The server's clock and this one's, over a connection that was verified as Flower verifies it."""
    where, ca = f"TLS: {node.host}:{node.port}", node.folder / "ca.crt"
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except OSError as e:
        raise UserError(f"TLS: {ca}", "is not a certificate", "copy ca.crt from the server's folder again") from e
    line = http.client.HTTPSConnection(node.host, node.port, context=context, timeout=10)
    try:
        line.request("GET", "/health")
        answer = line.getresponse()
    except ssl.SSLCertVerificationError as e:
        said = e.verify_message
        if "expired" in said:
            raise UserError(
                where, "the server's certificate has expired", "on the server: mllm-fl deploy renew DIR"
            ) from e
        if "not yet valid" in said:
            raise UserError(where, "the server's certificate is not valid yet", "one of the clocks is wrong") from e
        if "ostname" in said or "IP address" in said:
            raise UserError(
                where,
                f"the certificate does not name {node.host}",
                "on the server: mllm-fl deploy renew DIR --host NAME",
            ) from e
        raise UserError(
            where, f"the certificate is not signed by {ca} ({said})", "copy the server's ca.crt here, and nothing else"
        ) from e
    except ssl.SSLError as e:
        raise UserError(
            where,
            f"no TLS there ({e.reason})",
            "another program listens on this port, or the SuperLink runs without TLS",
        ) from e
    except (OSError, http.client.HTTPException) as e:
        raise UserError(where, f"no answer ({type(e).__name__})", "is it a SuperLink that listens there?") from e
    finally:
        line.close()
    date = (
        email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp() if answer.headers["Date"] else time.time()
    )
    return date, float(int(time.time()))


def _key(folder: Path) -> Iterator[str]:
    from cryptography.hazmat.primitives import serialization as s

    try:
        key = s.load_ssh_private_key((folder / "key").read_bytes(), None)
        public = key.public_key().public_bytes(s.Encoding.OpenSSH, s.PublicFormat.OpenSSH)
    except (OSError, ValueError) as e:
        raise UserError(f"key: {folder / 'key'}", "cannot be read as a key", "copy the site's folder again") from e
    there = (folder / "key.pub").read_bytes().split()[:2] if (folder / "key.pub").exists() else public.split()[:2]
    if public.split()[:2] != there:
        raise UserError(
            f"key: {folder / 'key'}",
            "does not belong to key.pub, which the server registered",
            "copy the site's folder again",
        )
    log = folder / "supernode.log"
    last = log.read_text(errors="replace").rpartition("Starting Flower SuperNode")[2] if log.exists() else ""
    if "must be registered" in last or "Failed to activate SuperNode" in last:
        problem = "the server did not take it when the node was last started (not registered, or killed less than a minute before)"
        raise UserError("key", problem, "on the server: mllm-fl deploy register DIR; then start the node again")
    yield "key: whole; whether the server has registered it shows when the node starts"


def _data(node: Node) -> Iterator[str]:
    source = node.config.get("data")
    if source is None:
        yield f"data: part {node.config.get('partition-id')} of {node.config.get('num-partitions')} of the data set that the run names"
        return
    found = named(at_home(str(source), node.folder))
    yield f"data: {sum(map(len, found.values()))} images of {len(found)} classes"


def at_home(source: str, folder: Path) -> str:
    """``folder:images`` with a relative path taken from the site's folder."""
    kind, colon, rest = source.partition(":")
    return f"{kind}{colon}{folder / Path(rest).expanduser()}" if colon else source


def server(made: Layout, listening: Callable[[], bool]) -> Iterator[str]:
    """The same for the server's folder: certificate, list of sites, configuration, port."""
    import datetime

    from cryptography import x509

    from mllm_fl.config import load

    yield f"version: mllm-fl {__version__}, flwr {flower_version()}"
    path = made.server / "server.crt"
    try:
        until = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as e:
        raise UserError(path, "cannot be read as a certificate", "mllm-fl deploy renew DIR") from e
    days = (until - datetime.datetime.now(datetime.UTC)).days
    if days < 0:
        raise UserError(path, f"expired {-days} days ago", f"mllm-fl deploy renew {typed(made.folder)}")
    yield f"certificate: good for {days} days"
    load(made.folder / "run.toml")
    yield "run.toml: can be read"
    sites = read_sites(made.sites_json)
    if sorted(s.name for s in sites) != sorted(made.sites):
        way_out = "bring back the one that was changed, or make a new federation for other sites"
        raise UserError(made.sites_json, f"names other sites than {made.folder / 'federation.toml'}", way_out)
    missing = [s.name for s in sites if s.node is None]
    if missing:
        raise UserError(
            made.sites_json, f"{', '.join(missing)} not registered", f"mllm-fl deploy register {typed(made.folder)}"
        )
    yield f"sites: {len(sites)} registered"
    if not listening():
        raise UserError(
            f"{made.bind}:{made.port}", "no SuperLink answers", f"mllm-fl deploy superlink {typed(made.folder)}"
        )
    yield "superlink: answers"


def flower_version() -> str:
    """The installed Flower.

    Raises:
        UserError: none, or one that this version was not made for.
    """
    try:
        found = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError as e:
        raise UserError("version: flwr", "is not installed", "pip install 'mllm-fl[flower]'") from e
    number = tuple(int(x) for x in found.split(".")[:2])
    if not FLOWER[0] <= number < FLOWER[1]:
        raise UserError(f"version: flwr {found}", "is not between 1.41 and 1.43", "pip install 'flwr>=1.41,<1.43'")
    return found
