"""Without TLS on both sides, or with a key that is not registered, nothing is sent: bytes counted on the way, and the server's log."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.deployment.real import until

from mllm_fl.deployment import control, layout, processes, signs
from mllm_fl.deployment.layout import Layout, Node
from mllm_fl.engines.reception import OWN

HANDSHAKES = 40_000
"""Bytes that a few TLS handshakes and refused greetings may take; the smallest model here is larger, and so is any image folder."""


class Counted:
    """A way from a port of the loopback to another, which counts and keeps what passes."""

    def __init__(self, port: int) -> None:
        self.up, self.down, self._to = bytearray(), bytearray(), port
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._door.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._door.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here = self._door.accept()[0]
                there = socket.create_connection(("127.0.0.1", self._to))
                for a, b, kept in ((here, there, self.up), (there, here, self.down)):
                    threading.Thread(target=self._pass, args=(a, b, kept), daemon=True).start()

    @staticmethod
    def _pass(a: socket.socket, b: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(1 << 16):
                kept += data
                b.sendall(data)
        for s in (a, b):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def plain_superlink(made: Layout) -> Iterator[Path]:
    """A SuperLink without TLS, as nobody should run one; its log."""
    log = made.server / "plain.log"
    argv = [processes.program("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(made.port)]
    env = processes.environment(made.server / "home")
    with open(log, "wb") as out:
        process = subprocess.Popen(argv, env=env, stdout=out, stderr=out, start_new_session=True)
        try:
            until(lambda: _listens(made.port))
            yield log
        finally:
            processes.end(process)


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def node(made: Layout, name: str, port: int, *, tls: bool = True) -> str:
    """A site's SuperNode tries to reach the server, until it gives up or has failed four times; what it said."""
    place = Node.read(made.site(name))
    kept = processes.supernode(place, lambda line: None)
    argv = [a.replace(f"{place.host}:{place.port}", f"localhost:{port}") for a in kept.argv]
    if not tls:
        at = argv.index("--root-certificates")
        argv[at : at + 2] = ["--insecure"]
        at = argv.index("--auth-supernode-private-key")
        del argv[at : at + 2]
    log = place.folder / f"{port}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(argv, env=kept.env, stdout=out, stderr=out, start_new_session=True)
        try:
            until(lambda: process.poll() is not None or signs.alone(log.read_text()))
        finally:
            processes.end(process)
    return log.read_text()


@pytest.fixture
def made(tmp_path: Path, config: Path) -> Layout:
    [port] = processes.free_ports(1)
    made = layout.init(tmp_path / "fed", sites=["known", "unknown"], config=config, port=port, images=OWN)
    for name in made.sites:
        place = made.site(name) / "images" / "secret-class"
        place.mkdir(parents=True)
        (place / "patient.png").write_bytes(b"PATIENT" * 20_000)
    return made


@pytest.mark.deploy
def test_a_key_that_is_not_registered_and_a_node_without_tls_get_nothing_and_give_nothing(made: Layout) -> None:
    said: list[str] = []
    with processes.superlink(made, said.append):
        control.wait_ready(made, 900)
        with Counted(made.port) as way:
            said_there = node(made, "unknown", way.port)
        assert "Exit Code: 305" in said_there or signs.alone(said_there)
        assert 0 < len(way.up) < HANDSHAKES and 0 < len(way.down) < HANDSHAKES
        log = (made.server / "superlink.log").read_text()
        assert "412" in log or "activat" in log.lower(), log[-2000:]  # it came, and was turned away
        for asked in ("pull-messages", "push-messages", "pull_messages", "push_messages", "PullMessages", "PullObject"):
            assert asked not in log
        assert "register" in signs.meaning(said_there)
        with Counted(made.port) as way:
            said_there = node(made, "known", way.port, tls=False)
        assert "Exit Code: 305" in said_there or signs.alone(said_there)
        assert len(way.up) < HANDSHAKES and len(way.down) < HANDSHAKES
        assert b"PATIENT" not in way.up and b"patient" not in way.up and b"secret-class" not in way.up


@pytest.mark.deploy
def test_a_server_without_tls_hears_a_greeting_that_it_cannot_read(made: Layout) -> None:
    with plain_superlink(made) as log, Counted(made.port) as way:
        said_there = node(made, "known", way.port)
        assert "Exit Code: 305" in said_there or signs.alone(said_there)
        assert 0 < len(way.up) < HANDSHAKES and len(way.down) < HANDSHAKES
        assert way.up[:2] == b"\x16\x03"  # TLS from the first byte on: no name, no key, no configuration in the clear
        assert b"known" not in way.up and b"secret-class" not in way.up
        assert "/v1/fleet" not in log.read_text()
