"""The suite sees what it is there to see: each planted fault is a small class, and the check that must name it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.algorithms.base import Algorithm, Broadcast, FedAvg, Local, Server, Shard, Task, Update, empty_leaf
from mllm_fl.algorithms.fedavgm import FedAvgM
from mllm_fl.algorithms.scaffold import Scaffold
from mllm_fl.conformance import toy
from mllm_fl.conformance.row import Row
from mllm_fl.conformance.suite import CHECKS, judge, run
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.errors import UserError
from mllm_fl.losses import distillation, kl
from mllm_fl.trees import Tree, weighted_mean


@dataclass(frozen=True)
class Unsquared(Algorithm):
    """FedProx with a norm where its square belongs, in torch's form."""

    mu: float = 0.1
    neutral: ClassVar[dict[str, Any]] = {"mu": 0.0}

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        loss = super().objective(task, w, msg, mine, x, y)
        gaps = [(w[k] - msg.w[k]).flatten() for k in task.trainable]
        return loss + self.mu / 2 * self.size(torch.cat(gaps))

    @staticmethod
    def size(v: Tensor) -> Tensor:
        out: Tensor = torch.linalg.vector_norm(v)
        return out


@dataclass(frozen=True)
class Rooted(Unsquared):
    """The same as a root of squares, which has no slope at 0."""

    @staticmethod
    def size(v: Tensor) -> Tensor:
        return v.square().sum().sqrt()


@dataclass(frozen=True)
class PerTensor(Unsquared):
    """The same, one norm a tensor, as one released code has it."""

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        loss = Algorithm.objective(self, task, w, msg, mine, x, y)
        return loss + self.mu / 2 * torch.stack([(w[k] - msg.w[k]).norm() for k in task.trainable]).sum()


@dataclass(frozen=True)
class ForgetsMomentum(FedAvgM):
    """v is computed, used, and not returned."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        return replace(super().server(task, s, updates), extra=s.extra)


@dataclass(frozen=True)
class NeverHadMomentum(Algorithm):
    """v is looked for in the state, and nobody puts it there."""

    momentum: float = 0.9
    neutral: ClassVar[dict[str, Any]] = {"momentum": 0.0}

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        mean = weighted_mean((u.weight, u.w) for u in updates)
        v = {k: self.momentum * s.extra.get(k, torch.zeros_like(mean[k])) for k in task.trainable}
        return replace(s, w=mean | {k: mean[k] + v[k] for k in v})


@dataclass(frozen=True)
class LeavesBuffers(Algorithm):
    """The server averages what is trained, and nothing else."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        mean = weighted_mean((u.weight, {k: u.w[k] for k in task.trainable}) for u in updates)
        return replace(s, w=s.w | mean)


@dataclass(frozen=True)
class ForgetsMemory(Scaffold):
    """The client's variate is computed, sent, and not returned."""

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        return super().finish(task, local, msg, mine)[0], {}


@dataclass(frozen=True)
class KeepsOldMemory(Scaffold):
    """The same, with the memory made in ``begin`` and returned as it came."""

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        return mine or {k: torch.zeros_like(v) for k, v in msg.extra.items()}

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        return super().finish(task, local, msg, mine)[0], mine


@dataclass(frozen=True)
class MemoryOfBegin(KeepsOldMemory):
    """The same, with nothing returned."""

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        return super().finish(task, local, msg, mine)[0], {}


@dataclass(frozen=True)
class ChangesBroadcast(Algorithm):
    """finish makes the difference in place."""

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        msg.w["classifier.bias"].add_(local.w["classifier.bias"])
        return super().finish(task, local, msg, mine)


@dataclass(frozen=True)
class Distils(Algorithm):
    """Distillation from the teacher, as it should be."""

    alpha: float = 1.0
    temperature: float = 3.0
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0}
    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    adds: ClassVar[tuple[str, ...]] = ("distillation", "alpha", "temperature")

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        return mine if shard.teacher is None else {"each/teacher": shard.teacher}

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        logits = task.forward(w, x)[1]
        loss = F.cross_entropy(logits, y)
        return loss if self.alpha == 0 else loss + self.alpha * self.term(mine["each/teacher"], logits)

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        return super().finish(task, local, msg, mine)[0], {}

    def term(self, teacher: Tensor, logits: Tensor) -> Tensor:
        return distillation(teacher, logits, self.temperature)


@dataclass(frozen=True)
class WrongDirection(Distils):
    """The student is the target."""

    adds: ClassVar[Any] = None

    def term(self, teacher: Tensor, logits: Tensor) -> Tensor:
        return distillation(logits, teacher, self.temperature)


@dataclass(frozen=True)
class SwappedKlDiv(Distils):
    """torch's kl_div takes the input's log first; here its arguments are the other way round."""

    adds: ClassVar[Any] = None

    def term(self, teacher: Tensor, logits: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(teacher, 1), F.softmax(logits, 1), reduction="batchmean")


@dataclass(frozen=True)
class PushesAway(Distils):
    """A sign is wrong."""

    adds: ClassVar[Any] = None

    def term(self, teacher: Tensor, logits: Tensor) -> Tensor:
        return -0.1 * kl(teacher, logits, self.temperature)


@dataclass(frozen=True)
class NoSquaredTemperature(Distils):
    """T**2 is left out, which only a declared formula can show."""

    def term(self, teacher: Tensor, logits: Tensor) -> Tensor:
        return kl(teacher, logits, self.temperature)


@dataclass(frozen=True)
class HalfTheTerm(Unsquared):
    """A proximal term without its 1/2, which only a declared formula can show."""

    adds: ClassVar[tuple[str, ...]] = ("proximal", "mu")

    @staticmethod
    def size(v: Tensor) -> Tensor:
        return 2 * v.square().sum()


@dataclass(frozen=True)
class Peeks(Algorithm):
    """The server looks at test images that it holds in a place of its own."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        state = super().server(task, s, updates)
        secret = toy.world().test
        task.forward(dict(state.w), secret.normalised(range(len(secret))), train=False)
        return state


@dataclass(frozen=True)
class OnServerImages(Algorithm):
    """Nothing is wrong with the method; its row hands it test images."""

    needs: ClassVar[tuple[str, ...]] = ("unlabelled",)


def with_test_images(*args: Any, **options: Any) -> toy.World:
    """The toy federation whose server set is half made of test images."""
    world = toy.world(*args, **options)
    own, secret = world.task.unlabelled, world.test
    if own is None:
        return world
    pixels = torch.cat([own.read(range(3)), secret.read(range(3))])
    mixed = ImageSet("mixed", MemoryPixels(pixels), np.full(6, -1), ())
    return replace(world, task=replace(world.task, unlabelled=mixed))


SEVEN = [  # fault, the check that must see it, words of its sentence
    (Row(Unsquared), "smooth", "a norm that should be squared is not"),
    (Row(PerTensor), "smooth", "a norm that should be squared is not"),
    (Row(Rooted), "smooth", "not finite at the broadcast weights"),
    (Row(ForgetsMomentum), "differs", "computed and not returned"),
    (Row(ForgetsMomentum), "server-state", "'backbone.conv.weight' is still zero after three rounds"),
    (Row(NeverHadMomentum), "server-state", "looks for 'backbone.conv.weight' in the server's state"),
    (Row(LeavesBuffers), "buffers", "backbone.bn.running_mean stays at the old global value"),
    (Row(ForgetsMemory), "client-memory", "looks for 'backbone.conv.weight' in the client's memory"),
    (Row(KeepsOldMemory), "client-memory", "'backbone.conv.weight' is still zero after three visits"),
    (Row(MemoryOfBegin), "client-memory", "finish does not return it"),
    (Row(ChangesBroadcast), "arguments", "finish changes its argument 'msg'"),
    (Row(WrongDirection), "direction", "the wrong direction"),
    (Row(SwappedKlDiv), "direction", "the wrong direction"),
    (Row(PushesAway), "direction", "a sign is wrong"),
    (Row(Peeks), "test-images", "test images pass through the network"),
    (Row(OnServerImages, build=with_test_images), "test-images", "3 of the 6 unlabelled server images are test images"),
]


@pytest.mark.parametrize(("row", "check", "says"), SEVEN, ids=[f"{r.method.__name__}-{c}" for r, c, _ in SEVEN])
def test_planted_fault_is_named(row: Row, check: str, says: str) -> None:
    verdict = judge(row, check)
    assert verdict.status == "fails"
    assert says in verdict.sentence
    assert "\n" not in verdict.sentence


def test_the_sound_originals_pass() -> None:
    """The checks that name the faults find nothing in the methods that the faults were made from."""
    for row in (Row(Distils), Row(FedAvgM), Row(Scaffold), Row(OnServerImages, {}, {"differs": "it is FedAvg"})):
        assert [v for v in run(row) if v.status == "fails"] == []


def test_declared_terms_are_held() -> None:
    said = judge(Row(NoSquaredTemperature), "declared-term").sentence
    assert said.startswith("it declares to add distillation(alpha, temperature) = ")
    assert judge(Row(HalfTheTerm), "declared-term").status == "fails"
    assert judge(Row(NoSquaredTemperature), "direction").status == "ok"


@dataclass(frozen=True)
class OnSelf(Algorithm):
    """A round counter that the next process does not have."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        object.__setattr__(self, "rounds", getattr(self, "rounds", 0) + 1)
        return super().server(task, s, updates)


SEEN: dict[int, int] = {}


@dataclass(frozen=True)
class OnTheModule(Algorithm):
    """How often a client came, in a dictionary of the module."""

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        SEEN[local.client] = SEEN.get(local.client, 0) + 1
        update, mine = super().finish(task, local, msg, mine)
        return update._replace(weight=update.weight + SEEN[local.client]), mine


@dataclass(frozen=True)
class OnTheClass(Algorithm):
    """The same, on the class."""

    visits: ClassVar[list[int]] = []

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        self.visits.append(local.client)
        return super().finish(task, local, msg, mine)


@dataclass(frozen=True)
class DrawsGlobally(Algorithm):
    """Noise from torch's global generator."""

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, mine = super().finish(task, local, msg, mine)
        noisy = {k: v + 1e-3 * torch.randn(v.shape) if v.is_floating_point() else v for k, v in update.w.items()}
        return update._replace(w=noisy), mine


@dataclass(frozen=True)
class SeedsGlobally(Algorithm):
    """Draws nothing, but seeds NumPy's global generator."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        np.random.seed(0)
        return super().server(task, s, updates)


@dataclass(frozen=True)
class ReadsTwice(Algorithm):
    """Asks for the updates a second time."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        total = sum(u.weight for u in updates)
        assert total > 0
        return super().server(task, s, updates)


@dataclass(frozen=True)
class FloatCounter(Algorithm):
    """Everything is averaged as float32."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        return replace(s, w=weighted_mean((u.weight, {k: v.float() for k, v in u.w.items()}) for u in updates))


@dataclass(frozen=True)
class FirstWins(Algorithm):
    """The first client in the list decides."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        return replace(s, w=next(iter(updates)).w)


@dataclass(frozen=True)
class SumsUp(Algorithm):
    """Adds changes and forgets to divide."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        held = list(updates)
        mean = super().server(task, s, held).w
        return replace(s, w=mean | {k: s.w[k] + (mean[k] - s.w[k]) * len(held) for k in task.trainable})


@dataclass(frozen=True)
class DividesByOthers(Algorithm):
    """Weighs a client by its images beyond the first."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        held = [u._replace(weight=u.weight - 1) for u in updates]
        total = sum(u.weight for u in held)
        w = {k: torch.stack([u.w[k] * (u.weight / max(total, 0.0)) if total else u.w[k] / torch.zeros(1) for u in held]).sum(0) for k in task.trainable}  # fmt: skip
        return replace(s, w=held[0].w | w)


@dataclass(frozen=True)
class SaysNothing(Algorithm):
    """Sends a number a client and says that it sends nothing."""

    def finish(self, task: Task, local: Local, msg: Broadcast, mine: Tree) -> tuple[Update, Tree]:
        update, mine = super().finish(task, local, msg, mine)
        return update._replace(extra={"n": torch.ones(3)}), mine


@dataclass(frozen=True)
class SaysNothingInWords(SaysNothing):
    """Says it in numbers only."""

    def upload_bytes(self, task: Task, present: int) -> int:
        return 12


@dataclass(frozen=True)
class SaysAnotherForm(SaysNothing):
    """Declares four numbers and sends three."""

    def upload_form(self, task: Task) -> dict[str, Tree]:
        return {"": {"n": empty_leaf(4)}}


@dataclass(frozen=True)
class SurveysAtWill(Algorithm):
    """Asks clients for numbers and does not say how many."""

    concludes: ClassVar[bool] = True

    def survey(self, task: Task, msg: Broadcast, shard: Shard) -> Tree:
        return {"n": torch.ones(2)}


@dataclass(frozen=True)
class SurveysOtherwise(SurveysAtWill):
    """Declares one number and answers two."""

    def survey_form(self, task: Task) -> dict[str, Tree]:
        return {"": {"n": empty_leaf(1)}}


@dataclass(frozen=True)
class HalfPrecision(Algorithm):
    """Averages in bfloat16 where passes run in it."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        state = super().server(task, s, updates)
        half = {k: v.bfloat16() for k, v in state.w.items() if v.is_floating_point()}
        return replace(state, w=state.w | half) if task.precision == "bf16" else state


@dataclass(frozen=True)
class NeedsEveryGradient(Algorithm):
    """Takes every parameter's gradient for granted."""

    def correct(self, grads: Tree, msg: Broadcast, mine: Tree) -> Tree:
        return {k: grads[k] for k, v in msg.w.items() if not k.startswith("backbone.bn")}


@dataclass(frozen=True)
class NotNeutral(Algorithm):
    """Its neutral value leaves a term in."""

    mu: float = 0.1
    neutral: ClassVar[dict[str, Any]] = {"mu": 0.0}

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        return super().objective(task, w, msg, mine, x, y) * (1.1 + self.mu)


@dataclass(frozen=True)
class NeutralInAnotherOrder(Algorithm):
    """FedAvg, summed in float32."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        held = list(updates)
        total = sum(u.weight for u in held)
        mean = weighted_mean((u.weight, u.w) for u in held)
        w = {k: torch.stack([u.w[k] * (u.weight / total) for u in held]).sum(0) for k in task.trainable}
        return replace(s, w=mean | w)


@dataclass(frozen=True)
class WrongArguments(Algorithm):
    """A hook as another framework has it."""

    def finish(self, task: Task, local: Local, msg: Broadcast) -> tuple[Update, Tree]:  # type: ignore[override]
        return Update(local.client, local.w, 1.0, {}, {}), {}


@dataclass(frozen=True)
class OutsideTheState(Algorithm):
    """Server state in an attribute of the state, which no checkpoint keeps."""

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        before = getattr(s, "before", None)
        state = super().server(task, s, updates)
        moved = {k: state.w[k] + 0.5 * (state.w[k] - before[k]) for k in task.trainable} if before else {}
        state = replace(state, w=state.w | moved)
        object.__setattr__(state, "before", s.w)
        return state


@dataclass(frozen=True)
class UsesTheNet(Algorithm):
    """Asks the network object, whose weights are nobody's."""

    def deploy(self, task: Task, s: Server) -> Tree:
        return {**s.w, task.head[1]: task.net.get_parameter(task.head[1]).detach()}


@dataclass(frozen=True)
class LosesABit(Algorithm):
    """Cross-entropy as a mean of its own: gradients are equal, the loss differs in its last digit."""

    def objective(self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(task.forward(w, x)[1], y, reduction="none").mean()


OTHERS = [
    (UsesTheNet, "net", "the network object's own weights"),
    (LosesABit, "neutral", "the losses that it records differ"),
    (OnSelf, "self", "server stores 'rounds' on the method"),
    (OnTheClass, "self", "finish stores 'visits' on the method"),
    (OnTheModule, "global-state", "kept in a module"),
    (DrawsGlobally, "global-random", "the global generator of torch is used"),
    (SeedsGlobally, "global-random", "the global generator of numpy is used"),
    (ReadsTwice, "one-client", "ValueError in server (test_faults.py:"),
    (FloatCounter, "buffers", "num_batches_tracked becomes torch.float32"),
    (FloatCounter, "shapes", "num_batches_tracked: dtype torch.float32 instead of torch.int64"),
    (FirstWins, "arrival", "treats the first or the last client differently"),
    (SumsUp, "identical-clients", "weights are not normalised"),
    (DividesByOthers, "odd-clients", "with nothing but a client that has one image"),
    (SaysNothing, "bytes", "sends 12 bytes beyond weights, upload_bytes says 0"),
    (SaysNothingInWords, "bytes", "uploads says 'nothing', and 12 bytes are counted"),
    (SaysNothing, "form", "clients send 'n' beside weights and upload_form does not say so"),
    (SaysAnotherForm, "form", "an update as finish makes it is refused (n: shape (3,) instead of (4,))"),
    (SurveysAtWill, "form", "clients answer 'n' and survey_form does not say so"),
    (SurveysOtherwise, "form", "an answer as survey makes it is refused (n: shape (2,) instead of (1,))"),
    (HalfPrecision, "precision", "becomes torch.bfloat16"),
    (NeedsEveryGradient, "no-gradient", "KeyError in <dictcomp> (test_faults.py:"),
    (NotNeutral, "neutral", "a term does not vanish there"),
    (NeutralInAnotherOrder, "neutral", "FedAvg's in another order"),
    (WrongArguments, "declarations", "finish takes (task, local, msg) where the contract hands it"),
    (SumsUp, "declarations", "declares no neutral value"),
]


@pytest.mark.parametrize(("cls", "check", "says"), OTHERS, ids=[f"{c.__name__}-{k}" for c, k, _ in OTHERS])
def test_other_faults_are_named(cls: type[Algorithm], check: str, says: str) -> None:
    verdict = judge(Row(cls), check)
    assert verdict.status == "fails"
    assert says in verdict.sentence


def test_state_in_an_attribute_does_not_survive() -> None:
    """The round loop's own ``replace`` loses such an attribute at once, so the method is FedAvg."""
    assert "never acts" in judge(Row(OutsideTheState), "differs").sentence


def test_waived_checks_say_why_and_must_exist() -> None:
    verdict = judge(Row(FedAvg, waives={"smooth": "a kink is meant"}), "smooth")
    assert (verdict.status, verdict.sentence) == ("waived", "a kink is meant")
    with pytest.raises(UserError, match="waives 'smoth', which is no check; known: declarations"):
        list(run(Row(FedAvg, waives={"smoth": "x"})))
    with pytest.raises(UserError, match="no check 'x'"):
        judge(Row(FedAvg), "x")


def test_a_slow_method_is_stopped() -> None:
    @dataclass(frozen=True)
    class Slow(FedAvg):
        """Never ends, and catches what it can."""

        def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
            while True:
                with contextlib.suppress(Exception):
                    list(updates)

    assert "not done after 0 seconds" in judge(Row(Slow), "shapes", limit=0.2).sentence


def test_every_check_has_a_sentence() -> None:
    assert all((check.__doc__ or "").strip() for check in CHECKS.values())
