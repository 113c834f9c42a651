"""What stage 2 gets beside the backbone: the adapter or a fresh one, and a classifier, fresh or from CLIP's text embeddings.

The paper does not say what is handed over. CLIP2FL keeps the adapter; a fresh classifier on a pooled feature that lies far from zero
learns little in a few steps of SGD (docs/pretraining.md), so these are options with names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mllm_fl.errors import UserError
from mllm_fl.models.network import Network
from mllm_fl.models.teacher.clip import ClipTeacher
from mllm_fl.trees import Tree


@torch.no_grad()
def text_classifier(clip: ClipTeacher, class_names: Sequence[str], network: Network) -> Tree:
    """Weight (C, d) and bias (C,) of a classifier on the compact model's feature, from CLIP's embeddings t_c of the class names.

    CLIP's own logit of an image token f is t_c . P (gamma * LN(f) + beta), P its projection and gamma, beta of its last LayerNorm: with
    ``model.feature_norm = "layernorm"`` this is a linear layer on the normalised feature, weight gamma * (P^T t_c) and bias t_c . P beta. Both are
    scaled together until a row is as long as a freshly initialised one, 1 / sqrt(3) on average, so that softmax begins soft. Where the feature
    has the width of the embedding itself, the weight is t_c.

    Raises:
        UserError: the feature has another width than CLIP's tokens and embeddings; names them.
    """
    texts = clip.class_embeddings(class_names).float()
    d = network.feature_dim
    projection: Any = getattr(clip.model, "visual_projection", None)
    bias = torch.zeros(len(texts))
    if projection is not None and projection.weight.shape[1] == d:
        weight = texts @ projection.weight.float()
        norm: Any = next((m for k, m in clip.model.named_modules() if k.endswith("post_layernorm")), None)
        if norm is not None and network.normalise:
            bias = weight @ norm.bias.float()
            weight = weight * norm.weight.float()
    elif texts.shape[1] == d:
        weight = texts
    else:
        inner = "" if projection is None else f", its image tokens {projection.weight.shape[1]}"
        raise UserError(
            "pretrain.classifier",
            f'is "text", but the feature has {d} channels, the text embeddings of {clip.name!r} have {texts.shape[1]}{inner}',
            'set model.adapter_dim to one of them, or pretrain.classifier = "fresh"',
        )
    scale = 3**-0.5 / weight.norm(dim=1).mean().clamp(min=1e-12)
    return {"classifier.weight": weight * scale, "classifier.bias": bias * scale}


def handed_over(tree: Tree, before: Tree, hand_over: str, classifier: Tree | None) -> Tree:
    """The pretrained state with what stage 2 is to get: ``before`` is the network's state at the beginning.

    Raises:
        UserError: a classifier for another number of classes.
    """
    out = dict(tree)
    if hand_over == "backbone":
        out |= {k: v for k, v in before.items() if k.startswith("adapter.")}
    for k, v in (classifier or {}).items():
        if v.shape != before[k].shape:
            raise UserError(
                k, f"is {tuple(v.shape)}, the network's is {tuple(before[k].shape)}", "check the class names"
            )
        out[k] = v.to(before[k].dtype)
    return out
