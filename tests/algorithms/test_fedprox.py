"""FedProx in closed form: on a quadratic the proximal minimiser is a weighted mean; with large mu nothing moves."""

from __future__ import annotations

import torch
from tests import toy

from mllm_fl.algorithms.base import Broadcast, Shard, Task
from mllm_fl.algorithms.fedprox import FedProx
from mllm_fl.engines.local import LocalConfig, train_client
from mllm_fl.trees import Tree


class Quadratic(FedProx):
    """F(w) = 1/2 ||w - 3||^2 in place of cross-entropy, over the classifier's bias."""

    def objective(
        self, task: Task, w: Tree, msg: Broadcast, mine: Tree, x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        from mllm_fl.losses import proximal

        return 0.5 * (w["classifier.bias"] - 3).square().sum() + proximal(
            {k: w[k] for k in task.trainable}, msg.w, self.mu
        )


def test_converges_to_the_proximal_point() -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    w["classifier.bias"] = torch.zeros(3)
    local = LocalConfig(epochs=200, batch_size=100, lr=0.2, augment="none")
    update, _ = train_client(task, Quadratic(mu=0.5), Broadcast(w, {}), {}, Shard(0, 1, fed.client(0), 0), local)
    assert torch.allclose(update.w["classifier.bias"], torch.full((3,), 3 / 1.5), atol=1e-5)  # (3 + mu * 0) / (1 + mu)


def test_gradient_is_mu_times_the_distance() -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    anchor = Broadcast({k: v - 0.25 if k in task.trainable else v for k, v in w.items()}, {})
    x, y = fed.test.normalised([0, 5, 10]), torch.tensor([0, 1, 2])
    leaves = {k: v.clone().requires_grad_(k in task.trainable) for k, v in w.items()}
    loss = FedProx(mu=0.4).objective(task, leaves, anchor, {}, x, y) - FedProx(mu=0.0).objective(
        task, leaves, anchor, {}, x, y
    )
    grads = torch.autograd.grad(loss, [leaves[k] for k in task.trainable])
    for g in grads:
        assert torch.allclose(g, torch.full_like(g, 0.4 * 0.25), atol=1e-5)


def test_with_strong_mu_the_weights_stay() -> None:
    fed = toy.federation()
    task, w = toy.task(fed)
    local = LocalConfig(epochs=3, batch_size=8, lr=0.01, augment="none")
    moved = [
        sum(float((u.w[k] - w[k]).square().sum()) for k in task.trainable)
        for mu in (0.0, 50.0)
        for u, _ in [train_client(task, FedProx(mu=mu), Broadcast(w, {}), {}, Shard(0, 1, fed.client(0), 0), local)]
    ]
    assert moved[1] < 0.2 * moved[0]
