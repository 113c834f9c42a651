"""What a federation does with nodes that are late, gone, wrong or not who they say: it goes on, and writes down why."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from tests.deployment.grid import failing

from mllm_fl.deployment.home import Kept
from mllm_fl.deployment.means import SAYS
from mllm_fl.deployment.node import handle
from mllm_fl.deployment.sites import write_sites
from mllm_fl.engines import exchange
from mllm_fl.engines.flower import from_content, to_content
from mllm_fl.engines.reception import Reception, Site, labels_sha256
from mllm_fl.engines.wire import Packed, Parcel, pack, unpack, with_facts
from mllm_fl.errors import UserError
from mllm_fl.runs import read_rows

Run = Callable[..., dict[str, Any]]
ONE = "federate.rounds = 1, federate.clients_per_round = 5"


def folder(tmp_path: Path) -> Path:
    [path] = (tmp_path / "runs" / "deployed").iterdir()
    return path


def events(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_rows(folder(tmp_path) / "events.jsonl") if e["event"] == kind]


def tampered(change: Callable[[Packed], Packed | RecordDict]) -> Any:
    """A node whose answers to "train" are changed on their way."""

    def fault(message: Message, answer: Callable[[], Message]) -> Message:
        reply = answer()
        if message.metadata.message_type != "train":
            return reply
        found = change(from_content(reply.content))
        return Message(to_content(found) if isinstance(found, Packed) else found, reply_to=message)

    return fault


def only(kind: str, fault: Any) -> Any:
    """The fault for messages of this type alone."""
    return lambda message, answer: fault(message, answer) if message.metadata.message_type == kind else answer()


def biases(change: Callable[[Any], Any]) -> Callable[[Packed], Packed]:
    def changed(packed: Packed) -> Packed:
        parcel = unpack(packed)
        for tree in parcel.trees.values():
            for name in tree:
                if name.endswith("classifier.bias"):
                    tree[name] = change(tree[name])
        return pack(parcel)

    return changed


def huge(packed: Packed) -> Packed:
    """Twenty megabytes in the place of a few kilobytes."""
    parcel = unpack(packed)
    parcel.trees["0/extra"] = {"ballast": biases_of(20 << 20)}
    return pack(parcel)


def biases_of(count: int) -> Any:
    import torch

    return torch.zeros(count, dtype=torch.uint8)


def strangers(packed: Packed) -> RecordDict:
    return RecordDict({"weights": ArrayRecord({"a": Array(np.ones(3))}), "config": ConfigRecord({"a": 1})})


def objects(packed: Packed) -> Packed:
    """A pickle in the place of an .npy."""
    import io

    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([{}], dtype=object), allow_pickle=True)  # what an attacker would send
    blob = file.getvalue().ljust(len(packed.blobs[0]), b" ")[: len(packed.blobs[0])]
    return Packed(packed.note, (blob, *packed.blobs[1:]))


def untrue(packed: Packed, note: str) -> RecordDict:
    """A note that our own code would not send."""
    content = to_content(packed)
    content["note"]["json"] = note
    return content  # type: ignore[no-any-return]


def head(blob: bytes) -> bytes:
    """The same length, but a head that Python's own reader stumbles over."""
    return blob[:10] + b"{" * 40 + blob[50:]


BAD = {
    "NaN": (biases(lambda v: v * float("nan")), "0/w rejected NaN"),
    "1e30": (biases(lambda v: v + 1e30), "magnitude 1e+30 > 1e+06"),
    "a wrong shape": (biases(lambda v: v[:3]), "shape (3,) instead of (10,)"),
    "a wrong type": (biases(lambda v: v.double()), "dtype torch.float64 instead of torch.float32"),
    "no tensors": (lambda p: Packed(json.dumps(json.loads(p.note) | {"leaves": []})), "names differ"),
    "too much": (huge, "unreadable answer"),
    "another app's record": (strangers, "unreadable answer: not a message of mllm-fl"),
    "a pickle": (objects, "unreadable answer"),
    "a number instead of a list": (lambda p: with_facts(p, {"told": 5}), "its node did not answer for it"),
    "no table of facts": (
        lambda p: Packed(json.dumps(json.loads(p.note) | {"facts": [1]}), p.blobs),
        "unreadable answer",
    ),
    "no facts at all": (
        lambda p: Packed(json.dumps({k: v for k, v in json.loads(p.note).items() if k != "facts"}), p.blobs),
        "unreadable answer",
    ),
    "brackets without end": (lambda p: untrue(p, "[" * 100_000), "unreadable answer: not a note"),
    "a shape without end": (
        lambda p: untrue(p, p.note.replace("[10]", "[Infinity]")),
        "unreadable answer: not a note",
    ),
    "a head that is no array's": (lambda p: Packed(p.note, (head(p.blobs[0]), *p.blobs[1:])), "not a .npy"),
    "a weight beyond all numbers": (
        lambda p: Packed(re.sub(r'"weight": [^,]*', f'"weight": {10**400}', p.note), p.blobs),
        "its answer is not in our form",
    ),
    "nobody's client": (lambda p: with_facts(p, {"told": []}), "its node did not answer for it"),
    "no facts": (lambda p: with_facts(p, {"told": [{"client": 0}, {"client": 3}]}), "its answer is not in our form"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_node_that_sends_nonsense_is_left_out_and_the_others_go_on(what: str, deployed: Run, tmp_path: Path) -> None:
    change, says = BAD[what]
    final = deployed(ONE, {101: tampered(change)})
    [row] = read_rows(folder(tmp_path) / "rounds.jsonl")
    told = [str(r["reason"]) for r in read_rows(folder(tmp_path) / "clients.jsonl") if r["status"] == "rejected"]
    told += list(row.get("dropped", {}).values())
    assert len(told) == 2 and all(says.removeprefix("0/w rejected ") in why for why in told)  # clients 0 and 3
    assert final["last"]["accuracy"] > 0 and row["train_loss"] > 0


GONE = {1: "could not be loaded", 2: "in the node's log", 3: "before the deadline", 5: "went away", 8: "process died"}


@pytest.mark.parametrize("code", GONE)
def test_flowers_errors_are_reasons_and_the_mean_is_over_the_others(code: int, deployed: Run, tmp_path: Path) -> None:
    secret = "/home/anna/patients/0001.png"
    deployed(ONE, {102: only("train", failing(code, f"<class 'OSError'>:<'{secret}'>"))})
    [row] = read_rows(folder(tmp_path) / "rounds.jsonl")
    assert set(row["dropped"]) == {"1", "4"} and all(GONE[code] in why for why in row["dropped"].values())
    weights = [r["weight"] for r in read_rows(folder(tmp_path) / "clients.jsonl")]
    assert len(weights) == 3 and row["train_loss"] > 0
    assert secret not in (folder(tmp_path) / "events.jsonl").read_text()


def test_a_dropped_client_leaves_the_mean_of_the_others(deployed: Run, config: Path, tmp_path: Path) -> None:
    """Against the simulator with the same clients and none of the dropped one's: the weights are renormalised."""
    from mllm_fl.algorithms.base import FedAvg, Server, Shard
    from mllm_fl.config import load
    from mllm_fl.deployment.server import dotted
    from mllm_fl.engines.config import EngineConfig
    from mllm_fl.engines.serial import SerialEngine
    from mllm_fl.stages import chain
    from mllm_fl.trees import clone, digest

    final = deployed(ONE, {102: only("train", failing(5))})
    [alone] = load(config, dotted(ONE)).runs
    federation = chain.federation_of(alone)
    from mllm_fl.models.network import build_network

    network = build_network(alone.model, 10, alone.seed)
    w = clone(network.state_dict())
    task = chain.task_of(alone, federation, network, EngineConfig(precision="fp32", layout="nchw"))
    shards = [Shard(k, 1, federation.client(k), alone.seed) for k in (0, 2, 3)]
    with SerialEngine(EngineConfig(), task, FedAvg(), alone.federate.local) as engine:
        updates = [r.update for r in engine.clients(FedAvg().broadcast(Server(w)), shards, {})]
    assert digest(FedAvg().server(task, Server(w), updates).w) == final["weights_sha256"]


def test_a_node_that_owes_an_answer_gets_no_other_message_until_it_has_answered(
    deployed: Run, grids: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Silent in round 1; its answer comes during round 2, is thrown away, and it is asked again in round 3."""
    held: list[Message] = []

    def slow(message: Message, answer: Callable[[], Message]) -> Message | None:
        if message.metadata.group_id == "1":
            held.append(answer())
            return None
        return answer()

    def releases(message: Message, answer: Callable[[], Message]) -> Message:
        if message.metadata.group_id == "2" and held:
            late = held.pop()
            grids[-1].waiting[late.metadata.reply_to_message_id] = late
        return answer()

    monkeypatch.setattr(exchange, "GRACE", 0.0)
    faults = {102: only("train", slow), 101: only("train", releases)}
    deployed("federate.clients_per_round = 5", faults, deadline=0.5)
    rows = read_rows(folder(tmp_path) / "rounds.jsonl")
    assert [sorted(set(r.get("dropped", {}).values())) for r in rows] == [
        ["no answer before the deadline"],
        ["its node still owes an answer"],
        [],
    ]
    assert [t for n, t in grids[-1].pushed if n == 102] == ["query", "train", "train"]
    assert [e["site"] for e in events(tmp_path, "late answer")] == ["site-2"]
    assert grids[-1].ttls == {0.5}


def test_a_node_that_was_started_again_is_not_waited_for(
    deployed: Run, grids: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its message went with its old process, and Flower says nothing of it until the deadline."""
    monkeypatch.setattr(exchange, "LOOK", 0.0)
    silent: list[str] = []

    def reborn(message: Message, answer: Callable[[], Message]) -> Message | None:
        grids[-1].since[102] = f"{len(silent)} o'clock"
        silent.append("train")
        return None if len(silent) == 1 else answer()

    final = deployed(ONE, {102: only("train", reborn)}, minimum=5, deadline=3600.0)
    [event] = events(tmp_path, "too few answers")
    assert event["reasons"] == ["its node was started again"]
    assert final["weights_sha256"] == deployed(ONE, runs=str(tmp_path / "calm"))["weights_sha256"]


def test_too_few_answers_play_the_round_again_and_the_bits_are_those_of_an_unhurt_run(
    deployed: Run, tmp_path: Path
) -> None:
    calm = deployed(ONE)
    seen: list[str] = []

    def once(message: Message, answer: Callable[[], Message]) -> Message:
        seen.append("train")
        return failing(8)(message, answer) if len(seen) == 1 else answer()  # type: ignore[return-value]

    hurt = deployed(ONE, {101: only("train", once)}, minimum=5, runs=str(tmp_path / "again"))
    assert hurt["weights_sha256"] == calm["weights_sha256"]
    [path] = (tmp_path / "again" / "deployed").iterdir()
    [event] = [e for e in read_rows(path / "events.jsonl") if e["event"] == "too few answers"]
    assert (event["answers"], event["minimum"], event["reasons"]) == (3, 5, ["the client's process died"])


def test_a_round_that_never_has_enough_stops_with_one_line(deployed: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"round 1: 3 answers, 5 are the minimum \(the client's process died\).*resume"):
        deployed(ONE, {101: only("train", failing(8))}, minimum=5, attempts=2, wait=0.1)
    assert "3 answers" in json.loads((folder(tmp_path) / "status.json").read_text())["stopped"]


def test_a_node_that_claims_anothers_name_is_refused_and_recorded(
    deployed: Run, nodes: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    nodes[102]["site"] = "site-1"
    with pytest.raises(
        UserError, match="site site-2: not admitted.*says it is 'site-1', but its key is that of 'site-2'"
    ):
        deployed(ONE, wait=0.2)
    assert [e["reason"][:20] for e in events(tmp_path, "site refused")] == ["says it is 'site-1',"]


def test_a_site_that_was_mended_and_started_again_is_heard_again(
    deployed: Run, nodes: dict[int, dict[str, Any]], grids: list[Any], tmp_path: Path
) -> None:
    nodes[102]["site"] = "site-1"
    asked: list[str] = []

    def mended(message: Message, answer: Callable[[], Message]) -> Message:
        asked.append(message.metadata.message_type)
        reply = answer()
        if len(asked) == 1:
            grids[-1].nodes[102]["site"], grids[-1].since[102] = "site-2", "later"
        return reply

    deployed(ONE, {102: mended})
    assert asked == ["query", "query", "train"]
    assert [
        e["event"] for k in ("site refused", "site admitted") for e in events(tmp_path, k) if e["site"] == "site-2"
    ] == [
        "site refused",
        "site admitted",
    ]


def test_a_key_that_belongs_to_no_site_is_refused_and_the_run_goes_on_without_it(
    deployed: Run, nodes: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    nodes[999] = nodes[101] | {"state": str(tmp_path / "impostor")}
    deployed(ONE)
    [event] = events(tmp_path, "site refused")
    assert (event["node"], event["reason"]) == (
        "999",
        "its key belongs to no site of this federation (it says it is 'site-1')",
    )


def test_a_node_is_not_asked_for_a_client_that_its_own_configuration_does_not_give_it(
    deployed: Run, nodes: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    nodes[102]["partition-id"] = 0
    with pytest.raises(UserError, match=r"plays clients \[0, 3\], but 'site-2' has \[1, 4\]"):
        deployed(ONE, wait=0.2)


def test_what_a_client_remembers_outlives_a_server_that_forgot_its_last_round(tmp_path: Path) -> None:
    """The server fell back to its checkpoint of round 2: it asks for round 2's memory although round 3 was trained."""
    import torch

    kept = Kept(tmp_path)
    for t in (1, 2, 3):
        kept.save({"c": torch.tensor([float(t)])}, t, before=t - 1, checkpointed=t - 1)
    assert [float(kept.load(t)["c"]) for t in (2, 3)] == [2.0, 3.0]  # type: ignore[index]
    assert kept.load(1) is None and kept.load(0) == {}


def test_a_memory_that_is_gone_is_recorded_and_the_client_begins_anew(
    deployed: Run, nodes: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    import shutil

    def robbed(message: Message, answer: Callable[[], Message]) -> Message:
        shutil.rmtree(Path(nodes[101]["state"]) / "memory", ignore_errors=True)
        return answer()

    deployed('federate.algorithm = "scaffold", federate.clients_per_round = 5', {101: only("train", robbed)})
    lost = events(tmp_path, "a client has lost its memory")
    assert [(e["round"], e["client"], e["site"]) for e in lost] == [(t, k, "site-1") for t in (2, 3) for k in (0, 3)]


def test_another_version_is_refused_in_words_that_name_both(
    deployed: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mllm_fl.deployment.node as node

    monkeypatch.setattr(node, "__version__", "0.0.1")
    with pytest.raises(UserError, match="another version of mllm-fl: 0.0.1, the server"):
        deployed(ONE, wait=0.2)


def test_another_version_says_so_even_where_it_cannot_read_the_configuration(
    nodes: dict[int, dict[str, Any]],
) -> None:
    facts = {"version": "9.9", "config": {"federate": {"of_the_future": 1}}, "classes": ["a"]}
    said = unpack(handle("hello", pack(Parcel(facts)), nodes[101], 101)).facts
    assert said["refused"] == "version" and "the server 9.9" in said["say"]


@pytest.mark.parametrize(("count", "says"), [(10**12, "more than 10000000"), (float("inf"), "not in our form")])
def test_a_site_that_boasts_is_refused(count: float, says: str) -> None:
    """The server makes a list of a site's images by their number."""
    door = Reception([Site("a", 1)], 1, ["cat"])
    assert says in door.admit(1, {"site": "a", "labels": labels_sha256(["cat"]), "sizes": {"0": count}})
    assert door.admit(1, {"site": "a", "labels": labels_sha256(["cat"]), "sizes": {"0": 5}}) == ""


def test_an_exception_at_a_site_tells_the_server_its_type_and_the_site_everything(
    deployed: Run, nodes: dict[int, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import mllm_fl.engines.local as local

    def breaks(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("/home/anna/patients/0001.png")

    monkeypatch.setattr(local, "train_client", breaks)
    with pytest.raises(UserError, match=f"{SAYS['failed'][:20]}.*RuntimeError".replace("(", r"\(")):
        deployed(ONE, minimum=1, attempts=1, wait=0.1)
    everything = b"".join(p.read_bytes() for p in folder(tmp_path).iterdir() if p.is_file())
    assert b"anna" not in everything
    assert "anna" in (Path(nodes[101]["state"]) / "log.jsonl").read_text()


def test_the_payload_is_what_the_method_declares(deployed: Run, grids: list[Any], tmp_path: Path) -> None:
    """Bytes of tensors up: weights and CReFF's declared extras of each client, counted on the wire by what Flower carried."""
    final = deployed(
        'federate.algorithm = "creff", federate.rounds = 1, federate.clients_per_round = 5, federate.method.features = 2, '
        "federate.method.match_steps = 1, federate.method.head_epochs = 1"
    )
    rows = read_rows(folder(tmp_path) / "clients.jsonl")
    [sent] = events(tmp_path, "train exchanged")
    assert sent["payload_up"] == sum(r["bytes_up"] for r in rows) == final["bytes_up"]
    assert sent["payload_up"] < sent["wire_up"] < grids[-1].bytes_up < 1.6 * sent["wire_up"]


def test_sites_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "sites.json"
    write_sites(path, [Site("a", 2**63 + 5), Site("b")])
    from mllm_fl.deployment.sites import read_sites

    assert read_sites(path) == [Site("a", 2**63 + 5), Site("b", None)]
    write_sites(path, [Site("a", 1), Site("b", 1)])
    with pytest.raises(UserError, match="a site or a node twice"):
        read_sites(path)
    assert dataclasses.asdict(Site("a")) == {"name": "a", "node": None}
