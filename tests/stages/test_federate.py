"""The round loop: who is drawn, what is dropped, what is recorded, and what a second call does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import toy

from mllm_fl.algorithms.base import Broadcast, FedAvg, Local, Server, Task, Update
from mllm_fl.algorithms.fedavgm import FedAvgM
from mllm_fl.data.federation import Federation
from mllm_fl.data.images import ImageSet
from mllm_fl.data.longtail import groups
from mllm_fl.engines.checkpoint import load_checkpoint, save_checkpoint
from mllm_fl.engines.local import LocalConfig
from mllm_fl.errors import UserError
from mllm_fl.events import Event
from mllm_fl.runs import RunFolder, read_rows
from mllm_fl.seeds import stream
from mllm_fl.stages.align import AlignConfig, Aligner, make_aligner
from mllm_fl.stages.alignment_images import balanced
from mllm_fl.stages.federate import federate
from mllm_fl.stages.outcome import outcome
from mllm_fl.stages.schedule import FederateConfig, online_clients
from mllm_fl.trees import Tree, clone, digest, nbytes

LOCAL = LocalConfig(epochs=1, batch_size=8, lr=0.05, augment="none")
BASE = FederateConfig(rounds=3, clients_per_round=2, local=LOCAL)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run", {"a": 1}) as folder:
        yield folder


@dataclasses.dataclass(frozen=True)
class Sends(FedAvg):
    """A client that sends nonsense: ``what`` is put into its update; client 0 always, the others if ``all_of_them``."""

    what: str = "nan"
    all_of_them: bool = False

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, mine = super().finish(task, local, msg, mine)
        if local.client != 0 and not self.all_of_them:
            return update, mine
        w = clone(update.w)
        if self.what == "shape":
            w["classifier.bias"] = torch.zeros(99)
        elif self.what == "weight":
            return update._replace(weight=float("nan")), mine
        else:
            w["classifier.bias"][0] = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30}[self.what]
        return update._replace(w=w), {"touched": torch.ones(1)}


def test_first_five_online_sets_are_creffs() -> None:
    first = [set(s) for s in itertools.islice(online_clients(FederateConfig(), 20, 7, 0), 5)]
    assert first == [
        {1, 17, 2, 5, 11, 0, 18, 6}, {18, 7, 15, 14, 17, 3, 1, 10}, {8, 2, 6, 1, 17, 4, 5, 11},
        {6, 16, 14, 19, 0, 10, 8, 12}, {7, 6, 1, 8, 11, 2, 18, 10},
    ]  # fmt: skip


def test_uniform_sampling_depends_on_the_run_seed() -> None:
    config = FederateConfig(sampling="uniform")
    draws = [list(itertools.islice(online_clients(config, 20, 7, seed), 3)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(s)) == 8 for s in draws[0])
    assert len({tuple(s) for s in draws[0]}) == 3  # each round draws anew


def test_the_training_loss_of_a_round_weighs_clients_by_their_images(run: RunFolder) -> None:
    fed = toy.federation(clients=2, per_class=7)
    task, w = toy.task(fed)
    federate(dataclasses.replace(BASE, rounds=1), task, fed, w, run)
    (row,), clients = (read_rows(run.path / n) for n in ("rounds.jsonl", "clients.jsonl"))
    (a, b), (n, m) = [c["loss"] for c in clients], [c["samples"] for c in clients]
    assert {n, m} == {10, 11}
    assert row["train_loss"] == pytest.approx((a * n + b * m) / 21, rel=1e-12)
    assert row["train_loss"] != pytest.approx((a + b) / 2, rel=1e-4)


def test_learns_and_records(run: RunFolder) -> None:
    fed = toy.federation()
    task, w = toy.task(fed, width=4)
    config = dataclasses.replace(BASE, rounds=6, evaluate_every=2, evaluate_last=1)
    state = federate(config, task, fed, w, run)
    rows, clients = read_rows(run.path / "rounds.jsonl"), read_rows(run.path / "clients.jsonl")
    assert [r["evaluated"] for r in rows] == [False, True, False, True, False, True]
    assert rows[-1]["accuracy"] > 0.5 > 1 / 3
    assert len(clients) == 12
    size = nbytes(w)
    assert rows[0]["bytes_up"] == rows[0]["bytes_down"] * 1 == 2 * size
    assert clients[0]["steps"] == 2 and clients[0]["samples"] == 15
    final = outcome(config, task, state, fed.test, groups(fed.class_counts), run)
    assert final["last"]["accuracy"] == rows[-1]["accuracy"]
    assert final["max"]["note"] == "selected on test"
    assert final["bytes_up"] == 12 * size
    assert set(final["seconds"]) == {"clients", "server", "align", "evaluate"}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nan", "classifier.bias: NaN"),
        ("inf", "classifier.bias: Inf"),
        ("huge", "magnitude"),
        ("shape", "shape (99,)"),
        ("weight", "weight nan"),
    ],
)
def test_a_bad_update_is_dropped_and_the_rest_renormalised(tmp_path: Path, what: str, reason: str) -> None:
    fed = toy.federation(clients=2)
    task, w = toy.task(fed)
    with RunFolder(tmp_path / "bad", {}) as bad:
        state = federate(dataclasses.replace(BASE, rounds=1, method=Sends(what=what)), task, fed, w, bad)
        rows = read_rows(bad.path / "clients.jsonl")
        assert [r["status"] for r in rows] == ["rejected", "ok"]
        assert reason in rows[0]["reason"]
        assert read_rows(bad.path / "rounds.jsonl")[0]["rejected"] == 1
    only = dataclasses.replace(fed, manifest=dataclasses.replace(fed.manifest, clients=((), fed.manifest.clients[1])))
    with RunFolder(tmp_path / "good", {}) as good:
        expected = federate(dataclasses.replace(BASE, rounds=1), task, only, w, good)
    assert digest(state.w) == digest(expected.w)  # as if the dropped client had not been there


def test_if_no_valid_update_is_left_the_weights_stay_and_the_event_says_so(run: RunFolder) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    state = federate(dataclasses.replace(BASE, rounds=1, method=Sends(all_of_them=True)), task, fed, w, run)
    assert digest(state.w) == digest(w)
    assert any("global weights stay" in e["event"] for e in read_rows(run.path / "events.jsonl"))
    row = read_rows(run.path / "rounds.jsonl")[0]
    assert row["rejected"] == 2 and row["train_loss"] is None


def test_a_second_call_does_nothing_and_changes_nothing(run: RunFolder) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    first = federate(BASE, task, fed, w, run)
    rows = (run.path / "rounds.jsonl").read_bytes()
    assert digest(federate(BASE, task, fed, w, run).w) == digest(first.w)
    assert (run.path / "rounds.jsonl").read_bytes() == rows


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    fed = toy.federation()
    seen = []
    for i, seed in enumerate((0, 0, 1)):
        torch.rand(i)  # something else draws
        task, w = toy.task(fed, seed)
        with RunFolder(tmp_path / str(i), {}) as folder:
            seen.append(digest(federate(BASE, task, fed, w, folder).w))
    assert seen[0] == seen[1] != seen[2]


def test_too_many_online_clients_are_refused(run: RunFolder) -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    with pytest.raises(UserError, match="9 online clients, but the federation has 4"):
        federate(dataclasses.replace(BASE, clients_per_round=9), task, fed, w, run)


def test_checkpoint_of_another_model_is_refused(run: RunFolder) -> None:
    fed = toy.federation()
    federate(BASE, *_args(fed, 2), run)
    with pytest.raises(
        UserError,
        match=r"checkpoint of another model: backbone.conv.weight is \(2, 3, 3, 3\) there, \(4, 3, 3, 3\) here",
    ):
        federate(BASE, *_args(fed, 4), run)


def test_truncated_checkpoint_is_refused(run: RunFolder) -> None:
    fed = toy.federation()
    federate(BASE, *_args(fed, 2), run)
    path = run.path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint.safetensors: truncated or damaged"):
        federate(BASE, *_args(fed, 2), run)


def test_a_damaged_record_in_a_whole_checkpoint_is_refused(run: RunFolder) -> None:
    fed = toy.federation()
    federate(BASE, *_args(fed, 2), run)
    path = run.path / "checkpoint.safetensors"
    whole = path.read_bytes()
    at = whole.index(b'"record":"{') + len(b'"record":"')
    path.write_bytes(whole[:at] + b"[" + whole[at + 1 :])
    with pytest.raises(UserError, match=r"checkpoint.safetensors: damaged checkpoint \(its record"):
        federate(BASE, *_args(fed, 2), run)


def test_flipped_bit_in_a_checkpoint_is_refused(run: RunFolder) -> None:
    fed = toy.federation()
    federate(BASE, *_args(fed, 2), run)
    path = run.path / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="digest differs"):
        federate(BASE, *_args(fed, 2), run)


def _stopped(run: RunFolder, config: FederateConfig, fed: Any, aligner: Aligner | None = None) -> tuple[Task, Tree]:
    """A run that somebody stopped after its second of three rounds."""

    def stop(event: Event) -> None:
        if event.done == 2:
            raise KeyboardInterrupt

    task, w = toy.task(fed)
    with pytest.raises(KeyboardInterrupt):
        federate(config, task, fed, w, run, aligner=aligner, progress=stop)
    return task, w


def test_a_resumed_server_goes_on_with_its_extra_leaves(tmp_path: Path) -> None:
    fed, config = toy.federation(), dataclasses.replace(BASE, algorithm="fedavgm", method=FedAvgM(momentum=0.9))
    with RunFolder(tmp_path / "whole", {}) as folder:
        whole = federate(config, *_args(fed, 2), folder)
    with RunFolder(tmp_path / "stopped", {}) as folder:
        task, w = _stopped(folder, config, fed)
        resumed = federate(config, task, fed, w, folder)
    assert any(v.any() for v in whole.extra.values())
    assert (digest(resumed.w), digest(resumed.extra)) == (digest(whole.w), digest(whole.extra))


def test_extra_leaves_of_another_form_are_refused(run: RunFolder) -> None:
    fed, config = toy.federation(), dataclasses.replace(BASE, algorithm="fedavgm", method=FedAvgM(momentum=0.9))
    task, w = _stopped(run, config, fed)
    path = run.path / "checkpoint.safetensors"
    tensors, record = load_checkpoint(path)
    name = "extra/classifier.bias"
    for leaf, says in (
        (None, f"it lacks {name}"),
        (torch.zeros(4), rf"{name} is \(4,\) there, \(3,\) here"),
        (torch.zeros(3, dtype=torch.float64), f"{name} is torch.float64 there, torch.float32 here"),
    ):
        save_checkpoint(path, {k: v for k, v in (tensors | {name: leaf}).items() if v is not None}, record)
        with pytest.raises(UserError, match=says):
            federate(config, task, fed, w, run)
    save_checkpoint(path, tensors | {"extra/besides": torch.zeros(1)}, record)
    with pytest.raises(UserError, match="it has extra/besides besides"):
        federate(config, task, fed, w, run)


@dataclasses.dataclass(frozen=True)
class Grows(FedAvg):
    """A server that finds a new leaf on its way."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        return dataclasses.replace(super().server(task, s, updates), extra={"late": torch.zeros(1)})


def test_a_method_whose_server_state_changes_its_form_is_told_in_the_first_round(run: RunFolder) -> None:
    fed = toy.federation()
    with pytest.raises(UserError, match=r"Server\.extra\['late'\] has another form after round 1 than after init"):
        federate(dataclasses.replace(BASE, method=Grows()), *_args(fed, 2), run)


def test_other_inputs_are_named_and_refused_on_resuming(run: RunFolder) -> None:
    """The same folder and configuration, but other weights, another federation, other alignment images, or another teacher."""
    fed = toy.federation()
    images = balanced(fed.train, 4, stream(0, "x"))

    def aligner(kept: ImageSet = images, q: float = 0.0) -> Aligner:
        config = AlignConfig(per_class=4, steps=1, batch_size=6, augment="none")
        y = torch.from_numpy(kept.labels)
        return make_aligner(config, kept, lambda x: 5.0 * torch.nn.functional.one_hot(y, 3).float() + q)

    task, w = _stopped(run, BASE, fed, aligner())

    def refused(says: str, task: Task = task, fed: Federation = fed, w: Tree = w, by: Aligner | None = None) -> None:
        with pytest.raises(
            UserError, match=rf"checkpoint.safetensors: was begun with other inputs \(SHA-256\): {says}"
        ) as e:
            federate(BASE, task, fed, w, run, aligner=by or aligner())
        assert "; restore them, or delete the run folder" in str(e.value)
        assert "\n" not in str(e.value)

    refused(r"w0 \(", w=w | {"classifier.bias": w["classifier.bias"] + 1})
    swapped = (fed.manifest.clients[1], fed.manifest.clients[0], *fed.manifest.clients[2:])
    refused(r"manifest \(", fed=dataclasses.replace(fed, manifest=dataclasses.replace(fed.manifest, clients=swapped)))
    refused(r"align\.x \(", by=aligner(dataclasses.replace(images, mean=(0.4, 0.5, 0.5))))
    refused(r"align\.q \(", by=aligner(q=0.5))
    refused(r"unlabelled \(absent", task=dataclasses.replace(task, unlabelled=images))
    refused(r"labelled \(absent", task=dataclasses.replace(task, labelled=images))
    refused(r"texts \(absent", task=dataclasses.replace(task, texts=torch.ones(3, 2)))
    assert federate(BASE, task, fed, w, run, aligner=aligner()).round == 3


def _args(fed: Any, width: int) -> tuple[Any, Any, Any]:
    task, w = toy.task(fed, width=width)
    return task, fed, w


def test_a_run_says_that_it_began_and_where_it_goes_on(run: RunFolder) -> None:
    """Before the first round is over, which may be minutes; a resumed run says from where; a finished one says nothing."""
    fed, config = toy.federation(), dataclasses.replace(BASE, rounds=3)
    task, w = _stopped(run, config, fed)
    seen: list[Event] = []
    federate(config, task, fed, w, run, progress=seen.append)
    assert (seen[0].done, seen[0].note) == (2, "resumed") and [e.done for e in seen] == [2, 3]
    federate(config, task, fed, w, run, progress=lambda e: pytest.fail(f"{e}"))
