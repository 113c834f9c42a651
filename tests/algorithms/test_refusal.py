"""What a client sent is refused with a reason: values, shapes, names; and what is not declared cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mllm_fl.algorithms.base import Algorithm, Broadcast, FedAvg, Local, Task, Update, empty_leaf
from mllm_fl.algorithms.ccvr import CCVR
from mllm_fl.algorithms.creff import CReFF
from mllm_fl.algorithms.logitadjust import LogitAdjust
from mllm_fl.algorithms.refusal import why_answer_refused, why_refused
from mllm_fl.algorithms.scaffold import Scaffold
from mllm_fl.conformance import toy
from mllm_fl.conformance.play import play
from mllm_fl.trees import Tree, digest, why_of_another_form

WORLD = toy.world()


def sent(extra: Tree, weight: float = 3.0) -> Update:
    return Update(0, WORLD.w, weight, extra, {})


def test_forms_by_hand() -> None:
    """ "" always comes whole; a and b come whole or not at all; there is nothing else."""
    two = {"a/x": empty_leaf(2), "a/y": empty_leaf()}
    form = {"": {"n": empty_leaf(1, dtype=torch.int64)}, "a": two, "b": {"b/x": empty_leaf(3)}}
    n = {"n": torch.tensor([4])}
    whole = n | {"a/x": torch.zeros(2), "a/y": torch.tensor(1.0)}
    assert why_of_another_form(n, form) is None
    assert why_of_another_form(whole, form) is None
    assert why_of_another_form(whole | {"b/x": torch.zeros(3)}, form) is None
    assert why_of_another_form({}, form) == "n: missing"
    assert why_of_another_form({"b/x": torch.zeros(3)}, form) == "n: missing"
    assert why_of_another_form(n | {"a/y": torch.tensor(1.0)}, form) == "a/x: missing"
    assert why_of_another_form(n | {"c": torch.zeros(1), "d": torch.zeros(1)}, form) == "c: not among what is sent"
    assert why_of_another_form(n | {"b/x": torch.zeros(2)}, form) == "b/x: shape (2,) instead of (3,)"
    assert why_of_another_form({"n": torch.tensor([4.0])}, form) == "n: dtype torch.float32 instead of torch.int64"
    assert why_of_another_form({}, {}) is None


def test_weights_and_weight() -> None:
    assert why_refused(FedAvg(), WORLD.task, sent({}), WORLD.w) is None
    assert why_refused(FedAvg(), WORLD.task, sent({}, 0.5), WORLD.w) is None
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        assert why_refused(FedAvg(), WORLD.task, sent({}, weight), WORLD.w) == f"weight {weight}"
    k = "classifier.bias"
    for value, said in ((float("nan"), "NaN"), (2e6, "magnitude 2e+06 > 1e+06")):
        bad = sent({})._replace(w=WORLD.w | {k: torch.full((3,), value)})
        assert why_refused(FedAvg(), WORLD.task, bad, WORLD.w) == f"{k}: {said}"
    assert why_refused(FedAvg(), WORLD.task, bad, WORLD.w, 1e7) is None
    assert "names differ" in str(why_refused(FedAvg(), WORLD.task, sent({})._replace(w={}), WORLD.w))


def test_what_travels_beside_weights() -> None:
    task, counts = WORLD.task, {"counts": torch.ones(3)}
    assert why_refused(FedAvg(), task, sent(counts), WORLD.w) == "counts: not among what is sent"
    assert why_refused(LogitAdjust(), task, sent(counts), WORLD.w) is None
    assert (
        why_refused(LogitAdjust(), task, sent({"counts": torch.full((3,), 1e30)}), WORLD.w) is None
    )  # finite is enough
    assert why_refused(LogitAdjust(), task, sent({}), WORLD.w) == "counts: missing"
    assert why_refused(LogitAdjust(prior="local"), task, sent(counts), WORLD.w) == "counts: not among what is sent"
    assert (
        why_refused(LogitAdjust(), task, sent({"counts": torch.tensor([1, float("inf"), 1])}), WORLD.w) == "counts: Inf"
    )
    half = {"grad/1/weight": torch.zeros(3, 6)}
    assert why_refused(CReFF(), task, sent(half), WORLD.w) == "grad/1/bias: missing"
    assert why_refused(CReFF(), task, sent(half | {"grad/1/bias": torch.zeros(3)}), WORLD.w) is None
    assert why_refused(CReFF(), task, sent({}), WORLD.w) is None  # a client whose classes all vanished


def test_answers_to_a_survey() -> None:
    answer = {"1/n": torch.tensor([4]), "1/mean": torch.zeros(6), "1/cov": torch.zeros(6, 6)}
    assert why_answer_refused(CCVR(), WORLD.task, answer) is None
    assert why_answer_refused(CCVR(), WORLD.task, {k: v for k, v in answer.items() if k != "1/cov"}) == "1/cov: missing"
    assert why_answer_refused(CCVR(samples=0), WORLD.task, answer) == "1/cov: not among what is sent"
    bad = answer | {"1/mean": torch.full((6,), float("nan"))}
    assert why_answer_refused(CCVR(), WORLD.task, bad) == "1/mean: NaN"


@dataclass(frozen=True)
class Talks(Algorithm):
    """Sends something and does not say in what form."""

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, kept = super().finish(task, local, msg, mine)
        return update._replace(extra={"any": torch.ones(5)}), kept


def test_what_is_not_declared_is_only_looked_at_for_nan() -> None:
    assert Talks().upload_form(WORLD.task) is None
    assert Talks().survey_form(WORLD.task) is None
    assert why_refused(Talks(), WORLD.task, sent({"any": torch.ones(5)}), WORLD.w) is None
    assert why_refused(Talks(), WORLD.task, sent({"any": torch.tensor(float("nan"))}), WORLD.w) == "any: NaN"
    assert why_answer_refused(Talks(), WORLD.task, {"any": torch.ones(5)}) is None


WAYS = ("a leaf too many", "another shape", "another dtype", "NaN", "missing")


@pytest.mark.parametrize("way", WAYS)
def test_a_round_goes_on_without_the_spoilt_update(way: str) -> None:
    """Client 1 sends rubbish beside its weights in round 2: the run is the one in which its answer was lost."""
    method, name = Scaffold(), "classifier.bias"

    def post(t: int, u: Update) -> Update:
        if (t, u.client) != (2, 1):
            return u
        others = {k: v for k, v in u.extra.items() if k != name}
        by = dict(zip(WAYS[:4], spoilt(u.extra, name), strict=True))
        return u._replace(extra=by.get(way, others))

    spoiled = play(method, WORLD, rounds=3, post=post)
    assert [len(r) for r in spoiled.updates] == [3, 2, 3]
    without = play(method, WORLD, rounds=3, lost={(2, 1)})
    assert digest(spoiled.state.w) == digest(without.state.w)
    assert digest(spoiled.state.extra) == digest(without.state.extra)


def spoilt(extra: Tree, name: str) -> list[Tree]:
    """One leaf too many; the named leaf with another shape, with another dtype, with NaN."""
    v = extra[name]
    return [
        {**extra, "nobody asked": torch.zeros(1)},
        {**extra, name: torch.stack([v, v])},
        {**extra, name: v.double()},
        {**extra, name: v * float("nan")},
    ]
