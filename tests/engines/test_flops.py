"""Operations, against what one can count by hand for a linear network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from tests import toy
from torch import Tensor, nn

from mllm_fl.algorithms.base import Algorithm, Broadcast, Server, Shard, Task, Update
from mllm_fl.engines.flops import counted, of_client, of_image, of_server
from mllm_fl.engines.local import LocalConfig
from mllm_fl.trees import Tree, clone

PIXELS, CLASSES = 3 * 8 * 8, 3


class Linear(nn.Module):
    """Pixels to logits by one matrix: 2 * 192 * 3 operations an image forward, as many for the gradient of the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(PIXELS, CLASSES, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), self.classifier(x.flatten(1))


@dataclass(frozen=True)
class Busy(Algorithm):
    """One product of 2 × 2 matrices (16 operations) at each visit per class held, and one per update at the server."""

    def begin(self, task: Task, msg: Broadcast, mine: Tree, shard: Shard) -> Tree:
        for _ in shard.y.unique():
            torch.ones(2, 2) @ torch.ones(2, 2)
        return mine

    def server(self, task: Task, s: Server, updates: Iterable[Update]) -> Server:
        for _ in updates:
            torch.ones(2, 2) @ torch.ones(2, 2)
        return s


def linear() -> tuple[Task, Tree, Shard]:
    fed = toy.federation(clients=1)
    net = Linear()
    task = Task(net, fed.class_names, (60,), 0)
    return task, clone(net.state_dict()), Shard(0, 1, fed.client(0), 0)


def test_a_step_is_the_forward_pass_and_the_gradient_of_the_weights() -> None:
    task, w, shard = linear()
    forward = 2 * PIXELS * CLASSES
    assert of_image(task, w, shard.images) == forward
    step, visit, _ = of_client(task, Algorithm(), Server(w), shard, LocalConfig(epochs=7, batch_size=16))
    assert (step, visit) == (2 * forward, 0)


def test_what_a_visit_does_once_is_not_multiplied_by_its_steps() -> None:
    task, w, shard = linear()
    step, visit, update = of_client(task, Busy(), Server(w), shard, LocalConfig(batch_size=16))
    assert step == 4 * PIXELS * CLASSES
    assert visit == 3 * 16 / 60  # three classes, spread over the client's 60 images
    assert of_server(task, Busy(), Server(w), update, [0, 4, 7]) == 3 * 16
    assert of_server(task, Algorithm(), Server(w), update, [0, 4, 7]) == 0


def test_counting_changes_nothing() -> None:
    task, w, shard = linear()
    before = clone(w)
    of_client(task, replace(Algorithm()), Server(w), shard, LocalConfig(batch_size=16))
    assert all(torch.equal(before[k], w[k]) for k in w)
    assert counted(lambda: 3) == (3, 0)
