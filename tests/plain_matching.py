"""The server part of CReFF and CLIP2FL as one would first write it: autograd through autograd, one class and one batch at a time.

The reference for ``mllm_fl.matching``, and what ``benchmarks/creff_server.py`` times it against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def distance(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Tensor:
    """Sum over the rows of the weight, and the bias as one row, of 1 - cosine, 1e-6 beside the product of norms."""
    total = torch.zeros((), dtype=got[0].dtype)
    for a, b in ((got[0], wanted[0]), (got[1][None], wanted[1][None])):
        total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def query(features: Tensor, c: int, weight: Tensor, bias: Tensor, *, twice: bool = False) -> tuple[Tensor, ...]:
    """The head's gradient on features of class c, by autograd; ``twice``: to be differentiated again."""
    head = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    loss = F.cross_entropy(F.linear(features, *head), torch.full((len(features),), c))
    return torch.autograd.grad(loss, head, create_graph=twice)


def supervised_contrast(features: Tensor, labels: Tensor, texts: Tensor, temperature: float) -> Tensor:
    """Khosla et al. 2020 (arXiv:2004.11362), eq. (2), with feature i as anchor i and the text of row j's class as sample j; pair (i, i) is left out."""
    samples = texts[labels]
    losses = []
    for i in range(len(features)):
        others = torch.arange(len(features)) != i
        log_p = torch.log_softmax((samples[others] @ features[i]) / temperature, 0)
        losses.append(-log_p[labels[others] == labels[i]].mean())
    return torch.stack(losses).mean()


def feature_match(
    features: Tensor, labels: Tensor, grads: dict[int, tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor, *,
    steps: int, lr: float, texts: Tensor | None = None, contrast: float = 0.0, temperature: float = 0.1,
) -> Tensor:  # fmt: skip
    """SGD on the features, the loss being the sum of distances over the classes in ``grads`` (+ contrast * loss against texts)."""
    moved = features.clone().requires_grad_()
    optimiser = torch.optim.SGD([moved], lr=lr)
    for _ in range(steps):
        loss = torch.zeros((), dtype=features.dtype)
        for c, wanted in grads.items():
            loss = loss + distance(query(moved[labels == c], c, weight, bias, twice=True), wanted)
        if texts is not None:
            loss = loss + contrast * supervised_contrast(moved, labels, texts, temperature)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return moved.detach()


def retrain_head(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, generator: torch.Generator, *,
    epochs: int, lr: float, batch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """SGD on the cross-entropy of a Linear, batch by batch."""
    head = torch.nn.Linear(features.shape[1], len(bias), dtype=features.dtype)
    head.load_state_dict({"weight": weight, "bias": bias})
    optimiser = torch.optim.SGD(head.parameters(), lr=lr)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(batch):
            optimiser.zero_grad()
            F.cross_entropy(head(features[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return head.weight.detach(), head.bias.detach()
