"""A worker process of the parallel engine: trains, asks or evaluates what it is told, in one thread, until its parent is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from mllm_fl.algorithms.base import Algorithm, Task
from mllm_fl.engines import channel
from mllm_fl.engines.evaluate import evaluate
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.errors import UserError


class Setup(NamedTuple):
    """What a federation's jobs have in common."""

    task: Task
    algorithm: Algorithm
    local: LocalConfig
    batch_norm: str


def do(kept: dict[str, Any], kind: str, args: tuple[Any, ...]) -> Any:
    """The answer to one job. ``kept``: the latest of each thing that jobs have in common: "setup", "broadcast", "model"."""
    setup: Setup = kept["setup"]
    if kind == "train":
        shard, mine = args
        return train_client(setup.task, setup.algorithm, kept["broadcast"], mine, shard, setup.local, setup.batch_norm)
    if kind == "survey":
        return setup.algorithm.survey(setup.task, kept["broadcast"], args[0])
    if kind == "evaluate":
        return evaluate(setup.task, kept["model"], *args)
    return None  # "hello": all that it needs has arrived


def main(fd: int, life: int) -> None:
    """Serve the parent at the other end of the socket ``fd``; end at once when the pipe ``life`` closes, for then it is gone.

    An interrupt from the keyboard is the parent's business.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(life,), daemon=True).start()
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    conn = Connection(fd)
    kept: dict[str, Any] = {}
    broken = ""
    channel.send(conn, channel.pack(("ready",))[0])
    while True:
        try:
            message = channel.receive(conn)
        except (EOFError, ConnectionError):
            return
        except Exception as e:  # the message is here, but what it names cannot be imported
            broken = f"{type(e).__name__}: {e}"
            continue
        if message[0] in ("shared", "pixels"):
            channel.attach(conn, *message)
        elif message[0] == "keep":
            kept[message[1]] = message[2]
        elif broken:
            channel.send(conn, channel.pack(("broken", broken, ""))[0])
            broken = ""
        else:
            channel.send(conn, _answer(kept, *message))


def _answer(kept: dict[str, Any], kind: str, *args: Any) -> bytes:
    start = time.perf_counter()
    try:
        found = do(kept, kind, args)
        return channel.pack(("done", found, time.perf_counter() - start))[0]
    except UserError as e:
        return channel.pack(("refused", str(e), ""))[0]
    except Exception as e:
        return channel.pack(("failed", f"{type(e).__name__}: {e}", traceback.format_exc()))[0]


def _follow(life: int) -> None:
    os.read(life, 1)  # nothing is ever written; it returns when the parent's end is closed
    os._exit(0)
