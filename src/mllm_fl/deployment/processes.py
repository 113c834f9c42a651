"""Flower's long-lived processes, kept alive: a SuperLink and SuperNodes that come back after every kill, until they are told to stop.

A SuperNode that was killed is refused by the SuperLink for up to a minute, because it is still held to be online; it is started again until it is taken. What Flower
says goes to a log beside it; what a person has to know is one line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mllm_fl.deployment import signs
from mllm_fl.deployment.layout import Layout, Node, typed
from mllm_fl.engines.flower import QUIET
from mllm_fl.errors import UserError

Say = Callable[[str], None]
TAIL = 1 << 16  # bytes of a log that are looked at
FIRST, LONGEST = 3.0, 15.0  # seconds before a process is started again; doubled up to the second


def environment(home: Path) -> dict[str, str]:
    """For every process of Flower: quiet, its files in ``home``, and its own commands found."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"OMP_NUM_THREADS": "1", **os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}


def program(name: str) -> str:
    """The path of one of Flower's commands, of this interpreter's environment first.

    Raises:
        UserError: Flower is not installed.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise UserError(name, "is not installed here", "pip install 'mllm-fl[flower]'")
    return found


class Kept:
    """One process that is started again whenever it ends. Used as a context manager; leaving it ends the process and all its children.

    ``child``: words of a process below it, without which it is of no use. ``watch``: what is said while its log tells of nothing but failed connections; ``ask``: who knows more where it ended
    without a word (Flower says nothing of a clock that is wrong).
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: dict[str, str],
        log: Path,
        say: Say,
        cwd: Path | None = None,
        child: str = "",
        watch: str = "",
        ask: str = "",
    ) -> None:
        self.name, self.argv, self.env, self.log, self.say, self.cwd = name, list(argv), env, log, say, cwd
        self.child, self.watch, self.ask = child, watch, ask
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Kept:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it: SIGTERM to its group, SIGKILL after ten seconds."""
        self._stop.set()
        if self.process is not None:
            end(self.process)
        self._thread.join(15)

    def wait(self) -> None:
        """Until :meth:`stop` is called."""
        while not self._stop.wait(0.5):
            pass

    def _run(self) -> None:
        pause, said = FIRST, ""
        while not self._stop.is_set():
            began, at = time.monotonic(), self.log.stat().st_size if self.log.exists() else 0
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    self.argv, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.cwd,
                    start_new_session=True,
                )  # fmt: skip
            self.starts += 1
            if self._stop.is_set():
                end(self.process)
            status = self._ended(self.process, at)
            end(self.process)  # its children, where it was killed
            if self._stop.is_set():
                return
            pause = FIRST if time.monotonic() - began > 60 else min(2 * pause, LONGEST)
            why = self._why(at) or (
                f"ended by signal {-status}" if status < 0 else f"ended with status {status}{self.ask}"
            )
            if why != said:
                self.say(f"{self.name}: {why} (log: {self.log})")
                said = why
            self._stop.wait(pause)

    def _ended(self, process: subprocess.Popen[bytes], at: int) -> int:
        """Wait for it; its status. A process whose ``child`` is gone for ten seconds is of no use any more and is ended."""
        seen, missed, said = False, 0.0, False
        while True:
            try:
                return process.wait(2.0)
            except subprocess.TimeoutExpired:
                if (gone := signs.alone(self._since(at))) != said and self.watch:
                    said = gone
                    self.say(f"{self.name}: {self.watch if gone else 'the SuperLink answers again'} (log: {self.log})")
                if not self.child or self._stop.is_set():
                    continue
            here = any(self.child in command for _, command in below(process.pid))
            seen, missed = seen or here, 0.0 if here else missed + 2.0
            if seen and missed > 10:
                self.say(f"{self.name}: its {self.child} is gone; starting both again")
                end(process)

    def _why(self, at: int) -> str:
        return signs.meaning(self._since(at))

    def _since(self, at: int) -> str:
        """The log from there on; of a long one its end."""
        with contextlib.suppress(OSError), open(self.log, "rb") as f:
            f.seek(max(at, self.log.stat().st_size - TAIL))
            return f.read().decode(errors="replace")
        return ""


def end(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End a process that was started in a session of its own, with everything that it started."""
    others = {p: command for p, command in below(process.pid) if _group(p) != process.pid}  # Flower's executors
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    _signal(others, signal.SIGTERM)
    until = time.monotonic() + patience
    while time.monotonic() < until:
        process.poll()
        others = {p: command for p, command in others.items() if command_of(p) == command}
        if not _alive(process.pid) and not others:
            return
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _signal(others, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _signal(processes: Iterable[int], number: signal.Signals) -> None:
    for p in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(p, number)


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def command_of(pid: int) -> str:
    """The command line of a process; "" where there is none, or it is only waited for, or this system has no /proc."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def below(pid: int) -> list[tuple[int, str]]:
    """All living processes under ``pid``: (number, command). None where this system has no /proc."""
    parents: dict[int, int] = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    found: list[int] = []
    layer = [pid]
    while layer:
        layer = [p for p, parent in parents.items() if parent in layer]
        found += layer
    return [(p, command) for p in found if (command := command_of(p))]


def superlink(made: Layout, say: Say) -> Kept:
    """The server's SuperLink, with TLS, node keys and a database.

    Raises:
        UserError: Flower is not installed, or it cannot listen there.
    """
    if taken(made.bind, made.port):
        raise UserError(
            f"{made.bind}:{made.port}",
            "the port is taken by another process",
            "stop it, or change port in federation.toml and each node.toml",
        )
    s = made.server
    argv = [
        program("flower-superlink"), "--host", made.bind, "--port", str(made.port),
        "--ssl-ca-certfile", str(s / "ca.crt"), "--ssl-certfile", str(s / "server.crt"), "--ssl-keyfile", str(s / "server.key"),
        "--enable-supernode-auth", "--database", str(s / "state.db"), "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    return Kept(
        "superlink", argv, environment(s / "home"), s / "superlink.log", say, cwd=made.folder, child="flower-superexec"
    )


def supernode(node: Node, say: Say) -> Kept:
    """One site's SuperNode."""
    folder, port = node.folder, node.runtime_port or free_ports(1)[0]
    argv = [
        program("flower-supernode"), "--superlink", f"{node.host}:{node.port}",
        "--root-certificates", str(folder / "ca.crt"), "--auth-supernode-private-key", str(folder / "key"),
        "--host", "127.0.0.1", "--port", str(port), "--node-config", node.node_config(),
    ]  # fmt: skip
    return Kept(
        node.site,
        argv,
        environment(folder / "home"),
        folder / "supernode.log",
        say,
        cwd=folder,
        child="flower-superexec",
        watch=f"no SuperLink answers at {node.host}:{node.port}; trying again",
        ask=f"; mllm-fl deploy doctor {typed(folder)} says which layer fails",
    )


def worker(node: Node, say: Say) -> Kept:
    """One site's process that stays, beside its SuperNode."""
    code = "import pathlib, sys; from mllm_fl.deployment.worker import serve; serve(pathlib.Path(sys.argv[1]))"
    argv = [sys.executable, "-c", code, str(node.config["state"])]
    return Kept(
        f"{node.site} worker", argv, environment(node.folder / "home"), node.folder / "worker.log", say, cwd=node.folder
    )


def taken(host: str, port: int) -> bool:
    """Whether something listens there already.

    Raises:
        UserError: this machine cannot listen there at all.
    """
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                return True
            way_out = "give bind in federation.toml an address of this machine, and a port above 1023"
            raise UserError(f"{host}:{port}", f"cannot be listened on here ({e.strerror})", way_out) from e
    return False


def free_ports(count: int) -> list[int]:
    """So many ports of the loopback that nobody listens on now."""
    with contextlib.ExitStack() as open_ones:
        found = []
        for _ in range(count):
            s = open_ones.enter_context(socket.socket())
            s.bind(("127.0.0.1", 0))
            found.append(int(s.getsockname()[1]))
    return found
