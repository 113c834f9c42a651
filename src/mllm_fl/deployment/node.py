"""What a site does with the server's messages: says who it is and what it holds, trains its clients, answers the survey.

Everything private stays here: images, the clients' memory between rounds, teachers' logits, and the text of whatever goes wrong (``log.jsonl``). The server hears a
code, a short sentence of ours, and an exception's type.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mllm_fl import __version__
from mllm_fl.deployment.home import Home, Kept, safe
from mllm_fl.deployment.means import SAYS, Refusal, clients_here, config_of, images_of, shard_of, task_of
from mllm_fl.engines.reception import labels_sha256
from mllm_fl.engines.wire import Packed, Parcel, WireError, pack, unpack
from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.algorithms.base import Broadcast
    from mllm_fl.trees import Tree


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
    if facts.get("version") != __version__:  # before its configuration, which another version may not know how to read
        raise Refusal("version", f"{__version__}, the server {str(facts.get('version'))[:40]}")
    config, classes = config_of(home, facts), [str(c) for c in facts["classes"]]
    held = {k: images_of(home, config, facts, k) for k in clients_here(home, config, facts)}
    said: dict[str, Any] = {"labels": labels_sha256(classes), "sizes": {str(k): len(v) for k, v in held.items()}}
    if home.share_histogram and facts.get("histograms"):
        said["histograms"] = {str(k): v.class_counts() for k, v in held.items()}
    home.log("hello", clients=len(held), images=sum(map(len, held.values())))
    return Parcel(said)


def _train(home: Home, parcel: Parcel) -> Parcel:
    import torch

    from mllm_fl.engines import answers
    from mllm_fl.engines.local import train_client

    torch.set_num_threads(1)
    facts = parcel.facts
    config, task = task_of(home, facts)
    msg = _broadcast(parcel)
    told: list[dict[str, Any]] = []
    trees: dict[str, Tree] = {}
    for k in (int(k) for k in facts["clients"]):
        start = time.perf_counter()
        try:
            shard = shard_of(home, config, facts, k)
        except Refusal as e:
            home.log("refused", kind="train", client=k, code=e.code, say=e.say)
            told.append({"client": k, "problem": e.say})
            continue
        kept = Kept(home.state / "memory" / safe(facts["run"]) / str(k))
        before = int(facts["remembered"][str(k)])
        mine = kept.load(before)
        update, remembers = train_client(
            task, config.federate.method, msg, mine or {}, shard, config.federate.local, config.model.batch_norm
        )
        kept.save(remembers, shard.round, before, int(facts["checkpointed"]))
        trees |= answers.trees(k, update)
        seconds = time.perf_counter() - start
        told.append(answers.told(k, update, seconds, bool(remembers), lost=mine is None))
        home.log("trained", round=shard.round, client=k, seconds=round(seconds, 3), images=len(shard))
    return Parcel({"told": told}, trees)


def _survey(home: Home, parcel: Parcel) -> Parcel:
    import torch

    torch.set_num_threads(1)
    facts, msg = parcel.facts, _broadcast(parcel)
    config, task = task_of(home, facts)
    clients = facts["clients"]
    found = {str(k): config.federate.method.survey(task, msg, shard_of(home, config, facts, k)) for k in clients}
    return Parcel({"told": [{"client": k} for k in clients]}, found)


def _broadcast(parcel: Parcel) -> Broadcast:
    from mllm_fl.algorithms.base import Broadcast

    return Broadcast(parcel.trees.get("w", {}), parcel.trees.get("extra", {}))
