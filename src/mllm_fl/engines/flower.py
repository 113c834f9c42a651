"""Flower, and the only file that knows it: our messages over its Grid on the server, our answers in its ClientApp on the nodes.

Only what Flower documents is used (``flwr.app``, ``flwr.serverapp``, ``flwr.clientapp``, ``flwr.simulation``), by a round loop of our own: no Strategy. flwr is imported when it is
needed, by the two processes that Flower itself starts, or by the engine "flower-sim".
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

from mllm_fl.engines.link import Answer, Link
from mllm_fl.engines.wire import Packed, WireError, leaves
from mllm_fl.errors import UserError

KINDS = {"hello": "query", "train": "train", "survey": "query.survey"}
"""Our kinds of message as Flower's message types."""
WHY = {  # Flower's error codes, in words that say what happened to a node
    0: "unknown error of Flower",
    1: "the app could not be loaded on the node",
    2: "the client stopped with an exception (it is in the node's log)",
    3: "no answer before the deadline",
    4: "its answer came after the deadline",
    5: "the node went away",
    6: "the node refused the message",
    7: "the node could not unpack the app",
    8: "the client's process died",
}

PATIENCE = 300.0
"""Seconds that one call to the SuperLink may take."""
QUIET = {  # Flower without telemetry, update check, and installing packages at run time
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
STARTS = 5
"""How often Ray is started before we give up: on a busy machine its own fifteen seconds for a start are too few."""
RAY = {  # Ray without telemetry, and patient on a busy machine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

Handle = Callable[[str, Packed, Mapping[str, Any], int], Packed]
"""``handle(kind, packed, node_config, node_id)``: a node's answer to one message."""
Main = Callable[[Link, dict[str, Any], int], None]
"""``main(link, run_config, run_id)``: the server's side of a run."""


class GridLink:
    """Flower's Grid as a :class:`mllm_fl.engines.link.Link`."""

    def __init__(self, grid: Any, patience: float = 0.0, check: Callable[[], None] = lambda: None) -> None:
        self.grid, self._check, self._begun = grid, check, 0.0
        if patience:
            threading.Thread(target=self._watch, args=(patience, os.getppid()), daemon=True).start()

    def _watch(self, patience: float, parent: int) -> None:
        """Flower's calls do not end when its SuperLink fails in their middle, nor this process with its parent: then end it, so that the run can be resumed."""
        while True:
            time.sleep(1.0)
            begun = self._begun
            if (begun and time.monotonic() - begun > patience) or os.getppid() != parent:
                os._exit(70)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        self._check()
        self._begun = time.monotonic()
        try:
            yield
        finally:
            self._begun = 0.0

    def nodes(self) -> dict[int, str]:
        with self._call():
            found = {int(n.node_id): str(n.last_activated_at) for n in self.grid.get_nodes()}
        return dict(sorted(found.items()))

    def send(self, letters: Iterable[tuple[int, str, Packed]], group: str, ttl: float) -> list[str | None]:
        from flwr.app import Message

        made = [
            Message(to_content(packed), dst_node_id=node, message_type=KINDS[kind], group_id=group, ttl=ttl)
            for node, kind, packed in letters
        ]
        with self._call():
            return [str(i) if i else None for i in self.grid.push_messages(made)]

    def collect(self, ids: Iterable[str]) -> list[Answer]:
        answers = []
        with self._call():
            messages = list(self.grid.pull_messages(list(ids)))
        for message in messages:
            to = str(message.metadata.reply_to_message_id)  # the sender of errors 3, 4, 5 is the SuperLink
            if message.has_error():
                answers.append(Answer(to, None, WHY.get(int(message.error.code), WHY[0])))
                continue
            try:
                answers.append(Answer(to, from_content(message.content), ""))
            except WireError as e:
                answers.append(Answer(to, None, f"unreadable answer: {e}"))
        return answers


def to_content(packed: Packed) -> Any:
    """Our form as Flower's RecordDict: each tensor an Array whose data is its .npy, the note in a ConfigRecord."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    arrays = {
        str(i): Array(leaf.dtype, leaf.shape, "numpy.ndarray", blob)
        for i, (leaf, blob) in enumerate(zip(leaves(packed), packed.blobs, strict=True))
    }
    return RecordDict({"note": ConfigRecord({"json": packed.note}), "leaves": ArrayRecord(arrays)})


def from_content(content: Any) -> Packed:
    """The inverse of :func:`to_content`; nothing is decoded yet.

    Raises:
        WireError: a RecordDict of another app.
    """
    try:
        arrays, note = content["leaves"], content["note"]["json"]
        return Packed(str(note), tuple(bytes(arrays[str(i)].data) for i in range(len(arrays))))
    except (KeyError, TypeError, AttributeError) as e:
        raise WireError("not a message of mllm-fl") from e


def server_app(main: Main) -> Any:
    """Flower's ServerApp that runs ``main``."""
    try:
        from flwr.serverapp import ServerApp
    except ImportError as e:
        raise needs_flower() from e
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator,unused-ignore]
    def run(grid: Any, context: Any) -> None:
        main(GridLink(grid, PATIENCE), dict(context.run_config), int(context.run_id))

    return app


def client_app(handle: Handle) -> Any:
    """Flower's ClientApp that answers every message by ``handle``, which must not raise: an exception's text would travel."""
    try:
        from flwr.app import Message
        from flwr.clientapp import ClientApp
    except ImportError as e:
        raise needs_flower() from e
    app = ClientApp()

    def answering(kind: str) -> Callable[[Any, Any], Any]:
        def answer(message: Any, context: Any) -> Any:
            packed = handle(kind, from_content(message.content), dict(context.node_config), int(context.node_id))
            return Message(to_content(packed), reply_to=message)

        return answer

    app.query()(answering("hello"))
    app.query("survey")(answering("survey"))
    app.train()(answering("train"))
    return app


class Simulation:
    """Flower's simulation of ``nodes`` nodes on this machine, in Ray's processes; a context manager that gives the line to them.

    Node configuration: ``partition-id`` and ``num-partitions``. ``handle`` is sent to ``workers`` processes, so what it is made of can be imported there.
    """

    def __init__(self, handle: Handle, nodes: int, workers: int) -> None:
        self.handle, self.nodes, self.workers = handle, nodes, workers
        self._over, self._problem = threading.Event(), ""
        self._opened: queue.Queue[Any] = queue.Queue()
        self._before: dict[str, str | None] = {}
        self._thread = threading.Thread(target=self._play, daemon=True, name="flower-sim")

    def __enter__(self) -> GridLink:
        can_simulate()
        self._before = {k: os.environ.get(k) for k in (*QUIET, *RAY, "PYTHONPATH", "PYTHONBREAKPOINT")}
        os.environ.update(QUIET)
        os.environ.update({k: v for k, v in RAY.items() if k not in os.environ})
        try:
            _start_ray(self.workers)
        except Exception as e:
            self._problem = _first_line(e)
            self.__exit__(None, None, None)
            self._check()
        self._thread.start()
        grid = self._opened.get()
        if grid is None:
            self.__exit__(None, None, None)
            self._check()
        return GridLink(grid, check=self._check)

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(60)
        if "ray" in sys.modules:  # where Flower did not come so far as to end it
            sys.modules["ray"].shutdown()
        for k, v in self._before.items():
            os.environ.pop(k, None)
            if v is not None:
                os.environ[k] = v

    def _check(self) -> None:
        if self._problem:
            way_out = (
                'see /tmp/ray/session_latest/logs, or set federate.engine.name = "parallel"; the same command resumes'
            )
            raise UserError("flower-sim", f"Flower's simulation ended: {self._problem}", way_out)

    def _play(self) -> None:
        log = logging.getLogger("flwr")
        level = log.level
        try:
            from flwr.serverapp import ServerApp
            from flwr.simulation import run_simulation

            app = ServerApp()

            @app.main()  # type: ignore[untyped-decorator,unused-ignore]
            def wait(grid: Any, context: Any) -> None:
                self._opened.put(grid)
                self._over.wait()

            log.setLevel(logging.CRITICAL)
            resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
            run_simulation(app, client_app(self.handle), self.nodes, backend_config=resources)
            self._problem = "" if self._over.is_set() else "it stopped by itself"
        except BaseException as e:
            self._problem = _first_line(e)
        finally:
            log.setLevel(level)
            self._over.set()
            self._opened.put(None)


def _start_ray(workers: int) -> None:
    """Ray on this machine's loopback alone, for Flower to find; it ends with the simulation."""
    import ray

    if ray.is_initialized():  # by the program that calls us
        return
    term, path = signal.getsignal(signal.SIGTERM), os.pathsep.join(p for p in sys.path if p)
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(
                address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL,
                runtime_env={"env_vars": {"PYTHONPATH": path}}, _node_ip_address="127.0.0.1",
            )  # fmt: skip
            break
        except Exception:
            ray.shutdown()
            if attempt == STARTS:
                raise
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, term)  # Ray puts its own in place


def _first_line(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    return (str(e).strip() or type(e).__name__).splitlines()[0][:300]


def can_simulate() -> None:
    """Nothing where Flower and Ray are installed.

    Raises:
        UserError: the line to type.
    """
    if missing := [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]:
        problem = f"'flower-sim' needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed here"
        raise UserError("federate.engine.name", problem, "pip install 'mllm-fl[flower-sim]', or use \"parallel\"")


def needs_flower() -> UserError:
    """The one line for a machine without Flower."""
    return UserError("flower", "flwr is not installed here", "pip install 'mllm-fl[flower]'")
