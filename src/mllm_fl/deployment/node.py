"""What a site does with the server's messages: says who it is and what it holds, trains its clients, answers the survey.

Everything private stays here: images, the clients' memory between rounds, teachers' logits, and the text of whatever goes wrong (``log.jsonl``). The server hears a
code, a short sentence of ours, and an exception's type.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_fl import __version__
from mllm_fl.engines.reception import OWN, PARTITION, clients_of, labels_sha256
from mllm_fl.engines.wire import Packed, Parcel, WireError, pack, unpack
from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.algorithms.base import Broadcast, Shard, Task
    from mllm_fl.config import Config
    from mllm_fl.data.images import ImageSet
    from mllm_fl.trees import Tree

SAYS = {  # all that a server can hear of a node's troubles
    "images": "it has no images of its own (data in its node.toml), and this federation asks for them",
    "labels": "its class names are not the server's",
    "no-data": "its images cannot be read (its log says why)",
    "partition": "it is not told which part of the data set it plays (partition-id, num-partitions)",
    "not-mine": "it was asked for a client that it does not play",
    "version": "it runs another version of mllm-fl",
    "config": "it cannot use the configuration (its log says why)",
    "message": "it cannot read the message",
    "failed": "its training stopped (its log says why)",
}


class Refusal(Exception):
    """Why a message is not answered: a code of :data:`SAYS`, and what else the server may hear."""

    def __init__(self, code: str, more: str = "") -> None:
        super().__init__(code)
        self.code, self.more = code, more

    @property
    def say(self) -> str:
        """The sentence that the server hears."""
        return SAYS[self.code] + (f": {self.more}" if self.more else "")


@dataclass(frozen=True)
class Home:
    """What a node knows about itself, from ``--node-config``: it decides about its own images, not the server.

    ``site``: its name. ``state``: the folder for what it remembers. ``data``: its own images; absent: part ``partition_id`` of ``num_partitions`` of
    the data set that the configuration names, from ``root``. ``share_histogram``: whether the server may know its number of images of each class.
    """

    site: str
    state: Path
    data: str | None = None
    share_histogram: bool = False
    partition_id: int | None = None
    num_partitions: int | None = None
    root: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], node: int) -> Home:
        """From Flower's node configuration."""
        part, parts = (config.get(k) for k in ("partition-id", "num-partitions"))
        state = str(config.get("state", "")) or os.path.join(os.environ.get("FLWR_HOME", "."), f"mllm-fl-{node}")
        return cls(
            str(config.get("site", "")) or (f"site-{int(part) + 1}" if part is not None else ""),
            Path(state).expanduser(),
            str(config["data"]) if config.get("data") else None,
            config.get("share-histogram") in (True, "true", 1),
            int(part) if part is not None else None,
            int(parts) if parts is not None else None,
            str(config["root"]) if config.get("root") else None,
        )

    def log(self, what: str, **fields: Any) -> None:
        """One line to ``log.jsonl``, which stays on this machine."""
        with contextlib.suppress(OSError):
            self.state.mkdir(parents=True, exist_ok=True)
            with open(self.state / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({"time": round(time.time(), 3), "what": what, **fields}) + "\n")


def handle(kind: str, packed: Packed, node_config: Mapping[str, Any], node: int) -> Packed:
    """The node's answer to one message of the server. Never raises."""
    home = Home.of(node_config, node)
    facts: dict[str, Any] = {"site": home.site, "version": __version__} if kind == "hello" else {}
    try:
        parcel = unpack(packed)
        answer = {"hello": _hello, "train": _train, "survey": _survey}[kind](home, parcel)
        return pack(Parcel(facts | answer.facts, answer.trees))
    except Refusal as e:
        home.log("refused", kind=kind, code=e.code, say=e.say)
        return pack(Parcel(facts | {"refused": e.code, "say": e.say}))
    except WireError as e:
        home.log("message", kind=kind, why=str(e))
        return pack(Parcel(facts | {"refused": "message", "say": SAYS["message"]}))
    except UserError as e:
        home.log("stopped", kind=kind, why=str(e))
        return pack(Parcel(facts | {"refused": "config", "say": SAYS["config"]}))
    except Exception as e:
        home.log("stopped", kind=kind, why=traceback.format_exc())
        return pack(Parcel(facts | {"refused": "failed", "say": f"{SAYS['failed']}: {type(e).__name__}"}))


def _hello(home: Home, parcel: Parcel) -> Parcel:
    facts = parcel.facts
    config, classes = _config(home, facts), [str(c) for c in facts["classes"]]
    if facts.get("version") != __version__:
        raise Refusal("version", f"{__version__}, the server {str(facts.get('version'))[:40]}")
    held = {k: _images(home, config, facts, k) for k in _mine(home, config, facts)}
    said: dict[str, Any] = {"labels": labels_sha256(classes), "sizes": {str(k): len(v) for k, v in held.items()}}
    if home.share_histogram and facts.get("histograms"):
        said["histograms"] = {str(k): v.class_counts() for k, v in held.items()}
    home.log("hello", clients=len(held), images=sum(map(len, held.values())))
    return Parcel(said)


def _train(home: Home, parcel: Parcel) -> Parcel:
    import torch

    from mllm_fl.engines.local import train_client

    torch.set_num_threads(1)
    facts = parcel.facts
    config, task = _task(home, facts)
    msg = _broadcast(parcel)
    told: list[dict[str, Any]] = []
    trees: dict[str, Tree] = {}
    for k in (int(k) for k in facts["clients"]):
        start = time.perf_counter()
        try:
            shard = _shard(home, config, facts, k)
        except Refusal as e:
            home.log("refused", kind="train", client=k, code=e.code, say=e.say)
            told.append({"client": k, "problem": e.say})
            continue
        kept = Kept(home.state / "memory" / _safe(facts["run"]) / str(k))
        before = int(facts["remembered"][str(k)])
        mine = kept.load(before)
        update, remembers = train_client(
            task, config.federate.method, msg, mine or {}, shard, config.federate.local, config.model.batch_norm
        )
        kept.save(remembers, shard.round, before, int(facts["checkpointed"]))
        trees |= {f"{k}/w": update.w, f"{k}/extra": update.extra}
        seconds = time.perf_counter() - start
        told.append(
            {
                "client": k,
                "weight": float(update.weight),
                "metrics": {name: float(v) for name, v in update.metrics.items()},
                "seconds": seconds,
                "remembers": bool(remembers),
                "lost": mine is None,
            }
        )
        home.log("trained", round=shard.round, client=k, seconds=round(seconds, 3), images=len(shard))
    return Parcel({"told": told}, trees)


def _survey(home: Home, parcel: Parcel) -> Parcel:
    import torch

    torch.set_num_threads(1)
    facts, msg = parcel.facts, _broadcast(parcel)
    config, task = _task(home, facts)
    clients = facts["clients"]
    answers = {str(k): config.federate.method.survey(task, msg, _shard(home, config, facts, k)) for k in clients}
    return Parcel({"told": [{"client": k} for k in clients]}, answers)


def _broadcast(parcel: Parcel) -> Broadcast:
    from mllm_fl.algorithms.base import Broadcast

    return Broadcast(parcel.trees.get("w", {}), parcel.trees.get("extra", {}))


def _config(home: Home, facts: Mapping[str, Any]) -> Config:
    from mllm_fl.config import from_dict
    from mllm_fl.toml import set_dotted

    raw = dict(facts["config"])
    if home.root is not None:
        raw = json.loads(json.dumps(raw))
        set_dotted(raw, "data.root", home.root)
    return from_dict(raw, "the server's configuration")


def _mine(home: Home, config: Config, facts: Mapping[str, Any]) -> Sequence[int]:
    """The clients that this node plays."""
    if facts["images"] == OWN:
        if home.data is None:
            raise Refusal("images")
        return [int(facts["client"])]
    if home.partition_id is None or home.num_partitions is None or not 0 <= home.partition_id < home.num_partitions:
        raise Refusal("partition")
    return clients_of(home.partition_id, home.num_partitions, config.data.clients)


def _images(home: Home, config: Config, facts: Mapping[str, Any], client: int) -> ImageSet:
    from mllm_fl.deployment.images import Mismatch, site_images
    from mllm_fl.stages.chain import federation_of

    try:
        if facts["images"] == PARTITION:
            return federation_of(config).client(client)
        assert home.data is not None
        names = [str(c) for c in facts["classes"]]
        return site_images(home.data, names, int(facts["size"]), facts["mean"], facts["std"])
    except Mismatch as e:
        home.log("labels", why=str(e))
        raise Refusal("labels", e.told) from e
    except UserError as e:
        home.log("images", why=str(e))
        raise Refusal("no-data") from e


def _shard(home: Home, config: Config, facts: Mapping[str, Any], client: int) -> Shard:
    from mllm_fl.algorithms.base import Shard

    if client not in _mine(home, config, facts):
        raise Refusal("not-mine")
    images, teacher = _images(home, config, facts, client), None
    if "teacher" in config.federate.method.needs:
        teacher = _logits(home, config, facts, client, images)
    return Shard(client, int(facts["round"]), images, int(facts["seed"]), teacher)


def _logits(home: Home, config: Config, facts: Mapping[str, Any], client: int, images: ImageSet) -> Any:
    """The frozen teacher's logits on this client's images, from this machine's own teacher, kept in its state folder."""
    from mllm_fl.models.teacher.clip import load_teacher
    from mllm_fl.models.teacher.logits import teacher_logits
    from mllm_fl.stages.chain import federation_of
    from mllm_fl.stages.server import clients_logits

    folder = home.state / "logits"
    if facts["images"] == PARTITION:  # the bits of a logit depend on its batch: as the simulator has them
        return clients_logits(config.teacher, federation_of(config), folder)[client]
    return teacher_logits(load_teacher(config.teacher), images, images.class_names, folder)


def _task(home: Home, facts: Mapping[str, Any]) -> tuple[Config, Task]:
    from mllm_fl.algorithms.base import Task
    from mllm_fl.models.network import build_network

    config, classes = _config(home, facts), tuple(str(c) for c in facts["classes"])
    net = build_network(config.model, len(classes), config.seed)
    precision = config.federate.engine.precision
    return config, Task(
        net,
        classes,
        tuple(int(n) for n in facts["population"]),
        int(facts["seed"]),
        precision="bf16" if precision == "bf16" else "fp32",
        channels_last=config.federate.engine.layout == "channels_last",
    )


class Kept:
    """One client's memory in one run, on this machine: a file for each round after which it may be asked for again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, round: int) -> Tree | None:
        """What was remembered in ``round``; {} for round 0, which is before the first visit; None if it is lost."""
        from mllm_fl.engines.checkpoint import load_checkpoint

        if round == 0:
            return {}
        try:
            return load_checkpoint(self._file(round))[0]
        except UserError:
            return None

    def save(self, tree: Tree, round: int, before: int, checkpointed: int) -> None:
        """Keep ``tree``; what a server that falls back to its checkpoint cannot ask for any more is deleted."""
        from mllm_fl.engines.checkpoint import save_checkpoint

        if tree:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(self._file(round), tree, {"round": round})
        if before <= checkpointed and self.folder.is_dir():
            for path in self.folder.glob("round-*.safetensors"):
                if int(re.sub(r"\D", "", path.stem)) < before:
                    path.unlink(missing_ok=True)

    def _file(self, round: int) -> Path:
        return self.folder / f"round-{round:06d}.safetensors"


def forget(state: Path, run: str) -> None:
    """Delete what the clients of a run remember on this machine."""
    shutil.rmtree(state / "memory" / _safe(run), ignore_errors=True)


def _safe(name: object) -> str:
    """A run's name as a folder's."""
    text = re.sub(r"[^A-Za-z0-9._-]", "_", str(name)).lstrip(".")[:100]
    return text or "run"
