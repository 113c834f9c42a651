"""Stage 1b, Dynamic Weighted Pretraining (MLLM-LLaVA-FL, arXiv:2409.06067, §3.1): the compact model learns inside a frozen LLaVA.

    (1)  H_v = W Z_v
    (2)  Z_v = (1 - alpha) g(X) + alpha g_fl(X),   alpha from 0 to 1 by a cosine over the first half of training, then 1

g (CLIP), W (projector) and the language model are frozen; the loss is LLaVA's over the answers' tokens. The paper gives lr 2e-3, batch
128, 4 epochs; optimiser, warm-up and clipping are those of LLaVA's own pretraining script, per-step granularity of alpha is ours.
So is the form of the text: every record, a caption too, becomes a conversation in the teacher's chat form (``USER: <image> question ASSISTANT:
answer``), where LLaVA's first stage has the plain form, the picture and then its caption (``form = "plain"``).
While alpha is small the gradient of g_fl is small too, and Adam turns it into full steps all the same: ``alpha = "one"``,
``drive`` and ``objective = "features"`` are there because the paper's rule need not be the best one at every scale.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from mllm_fl.annotate.corpus import Corpus
from mllm_fl.engines.checkpoint import fit, load_checkpoint
from mllm_fl.errors import UserError
from mllm_fl.events import Progress, silent
from mllm_fl.models.network import Network
from mllm_fl.models.resnet8 import STRIDE, ResNet8
from mllm_fl.models.teacher.llava import Blueprint, LlavaTeacher, open_llava
from mllm_fl.models.teacher.located import fingerprint
from mllm_fl.runs import read_json
from mllm_fl.stages.pretraining.config import PretrainConfig
from mllm_fl.stages.pretraining.handover import handed_over
from mllm_fl.stages.pretraining.parallel import together
from mllm_fl.stages.pretraining.reading import digests
from mllm_fl.stages.pretraining.run import Rgb, Run, device_of
from mllm_fl.stages.pretraining.schedules import alpha_at, lr_at
from mllm_fl.stages.pretraining.store import alone, same
from mllm_fl.toml import to_dict
from mllm_fl.trees import Tree, clone, digest

__all__ = ["PretrainConfig", "alpha_at", "lr_at", "pretrain"]

FREE = ("checkpoint_every", "overfit")  # what the weights do not depend on


def pretrain(
    config: PretrainConfig,
    network: Network,
    corpus: Corpus | Path,
    folder: Path,
    *,
    seed: int = 0,
    teacher: LlavaTeacher | None = None,
    mean: Rgb = (0.5, 0.5, 0.5),
    std: Rgb = (0.5, 0.5, 0.5),
    side: int | None = None,
    classifier: Tree | None = None,
    progress: Progress = silent,
) -> Tree:
    """Pretrain a copy of ``network`` on ``corpus``; returns its whole state, with ``classifier`` if one is given, else its own as it was.

    ``folder`` gets preflight.json and index.arrow first, then pretrain.jsonl (a row per step), pretrained.safetensors and, last,
    pretrain.json. Killed at any moment, the same call resumes and ends with the same bytes. ``mean`` and ``std`` normalise the compact
    model's input and must be those of stage 2. ``side``: pixels a side of the federation's images, for a network that is not ResNet-8 (see
    ``image_size``); absent means the pictures' own. Started by ``torchrun``, the processes share every batch; the first one writes.

    Raises:
        UserError: no corpus, a teacher that does not fit, a sample with nothing to predict, a diverging loss, or a folder that was
            begun with other settings or is in use.
    """
    path = corpus.folder if isinstance(corpus, Corpus) else corpus
    device = device_of(config)
    with together(device) as world:
        if world.first:
            folder.mkdir(parents=True, exist_ok=True)
        what = {
            "config": {k: v for k, v in to_dict(config).items() if k not in FREE}, "seed": seed, "mean": list(mean), "std": list(std),
            "corpus": world.shared(digests(path) if world.first else None), "network": digest(network.state_dict()),
            "side": _side_of(config, network, None, side), "teacher": teacher.fingerprint if teacher is not None else fingerprint(config.teacher),
            "classifier": None if classifier is None else digest(classifier),
        }  # fmt: skip
        like = clone(network.state_dict())
        done = folder / "pretrain.json"
        if world.shared(done.exists()):  # finished: several runs may read it at a time, so no lock
            same(done, what, read_json(done)["what"])
            if world.first:
                (folder / "checkpoint.safetensors").unlink(missing_ok=True)
            return fit(load_checkpoint(folder / "pretrained.safetensors")[0], like, folder / "pretrained.safetensors")
        with alone(folder) if world.first else nullcontext():
            plan = teacher or open_llava(config.teacher, network.feature_dim)
            what["teacher"] = what["teacher"] or plan.fingerprint  # a hub id may have been fetched only now
            if network.feature_dim != plan.width:
                raise UserError(
                    "model.adapter_dim",
                    f"is {network.feature_dim}, but the projector of {plan.name!r} takes {plan.width} channels",
                    f"set it to {plan.width}",
                )
            config = replace(config, image_size=_side_of(config, network, plan, side))
            run = Run(config, copy.deepcopy(network), path, plan, folder, seed, what, world, progress)
            try:
                run.prepare(teacher, device, mean, std)
                tree = run.train()
            finally:
                run.close()
            tree = handed_over(tree, like, config.hand_over, classifier)
            run.finish(tree)
            return tree


def _side_of(config: PretrainConfig, network: Network, plan: Blueprint | None, side: int | None) -> int | None:
    """Pixels a side of the compact model's input; None where the teacher decides it and is not at hand, or the pictures do."""
    if config.image_size is not None:
        return config.image_size
    if isinstance(network.backbone, ResNet8):
        return None if plan is None else STRIDE * plan.grid
    return side
