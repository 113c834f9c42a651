"""Does pretraining help? Table 4's form: a few labels, trained centrally from each initialisation. ``python scripts/table4.py experiments/table4_cifar10.toml``.

For each arm of the file, and two that are no configuration (``supervised``: the compact network trained on the open images' captions as classes;
``clip-tower``: mini-CLIP's own image tower, frozen as it came, then trained), for each percentage of the training labels and each seed: balanced
subset, SGD 0.01 with momentum 0.9, batch 32, crop and flip, 30 epochs; accuracy after every epoch on 1,000 fixed test images, and on all test images
after the last. A line a run goes to --out; lines that are there are not run again, pretraining resumes from its folder. "best" is selected on test
images, as the paper's table seems to do: an upper bound. ``--page`` writes the table into docs/pretraining.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_fl.config import Config, load
from mllm_fl.data.augment import augment
from mllm_fl.data.cifar import MEAN, STD, load_cifar
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError
from mllm_fl.events import Event
from mllm_fl.models.network import Network, build_network
from mllm_fl.models.teacher.clip import load_clip, load_teacher
from mllm_fl.report.marked import fill
from mllm_fl.runs import config_hash, environment
from mllm_fl.seeds import numpy_stream, seed_of, stream
from mllm_fl.stages.pretrain import pretrain
from mllm_fl.stages.pretraining.handover import text_classifier
from mllm_fl.stages.pretraining.reading import records
from mllm_fl.toml import to_dict
from mllm_fl.trees import digest

EXTRA = ("supervised", "clip-tower")
TARGET = {"cifar10": 25.0, "cifar100": 15.0}  # the paper's
CURVE = 1_000  # test images a point of the curve


def subset(images: ImageSet, percent: float, seed: int) -> list[int]:
    """Positions of a class-balanced part of the labels."""
    each = max(1, round(len(images) * percent / 100 / len(images.class_names)))
    rng = numpy_stream(seed, "table4 subset")
    return sorted(int(i) for c in range(len(images.class_names)) for i in rng.permutation(np.flatnonzero(images.labels == c))[:each])  # fmt: skip


@lru_cache(maxsize=1)
def images(source: str, root: str | None) -> tuple[ImageSet, ImageSet]:
    """Training and test images, decoded once."""
    return load_cifar(source, root)


def narrate(event: Event) -> None:
    if event.done % 50 == 0 or event.done == event.total:
        print(f"{event.stage} {event.done}/{event.total} {event.note}", file=sys.stderr, flush=True)


class Tower(nn.Module):
    """Mini-CLIP's image tower and its projection with a classifier: images (n, 3, 32, 32), normalised as CLIP's -> (feature, logits)."""

    def __init__(self, clip: Any, classes: int, seed: int) -> None:
        super().__init__()
        self.clip = copy.deepcopy(clip.model.vision_model).requires_grad_(True)
        self.projection = copy.deepcopy(clip.model.visual_projection).requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "table4 tower"))
            self.classifier = nn.Linear(self.projection.out_features, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        back = x * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
        feature = F.layer_norm(self.projection(self.clip(pixel_values=back * 2 - 1).pooler_output), (self.projection.out_features,))  # fmt: skip
        return feature, self.classifier(feature)


def supervised(config: Config, network: Network, folder: Path, seed: int) -> None:
    """Train backbone and adapter on the open images with their distinct captions as classes; as many steps as the paper's arm, the same optimiser."""
    assert config.pretrain is not None and config.pretrain.corpus is not None
    done = folder / "supervised.safetensors"
    from safetensors.torch import load_file, save_file

    if done.exists():
        network.load_state_dict(load_file(done), strict=False)
        return
    from mllm_fl.data.decode import to_array, to_rgb

    root = Path(config.pretrain.corpus)
    said = [(r.image, r.answers[0]) for r in records(root)]
    kinds = {c: i for i, c in enumerate(dict.fromkeys(c for _, c in said))}
    x = torch.stack([torch.from_numpy(to_array(to_rgb(root / image)).copy()) for image, _ in said])
    y = torch.tensor([kinds[c] for _, c in said])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "table4 supervised"))
        head = nn.Linear(network.feature_dim, len(kinds))
    weights = [p for k, p in network.named_parameters() if not k.startswith("classifier.")] + list(head.parameters())
    optimiser = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.0)
    epochs, draws = config.pretrain.epochs, stream(seed, "table4 supervised")
    steps = config.pretrain.steps if epochs is None else max(1, round(epochs * len(x) / 128))
    network.train()
    for step in range(steps):
        batch = torch.randint(len(x), (min(128, len(x)),), generator=draws)
        with torch.autocast("cpu", torch.bfloat16):
            feature = network(normalised(x[batch]))[0]
            loss = F.cross_entropy(head(feature).float(), y[batch])
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        narrate(Event("supervised", step + 1, steps, f"loss {float(loss.detach()):.3f}"))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items() if not k.startswith("classifier.")}, done)


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x.float() / 255 - mean) / std


def initialised(config: Config, arm: str, names: tuple[str, ...], root: Path) -> nn.Module:
    """The network of an arm before it sees a label of the target."""
    network = build_network(config.model, len(names), config.seed)
    if arm == "clip-tower":
        return Tower(load_clip(config.teacher.name), len(names), config.seed)
    if config.pretrain is None:
        return network
    assert config.pretrain.corpus is not None
    key = config_hash({"pretrain": to_dict(config.pretrain), "model": to_dict(config.model), "seed": config.seed, "arm": arm})  # fmt: skip
    if arm == "supervised":
        supervised(config, network, root / f"supervised-{key}", config.seed)
        return network
    classifier = text_classifier(load_teacher(config.teacher), names, network) if config.pretrain.classifier == "text" else None  # fmt: skip
    tree = pretrain(
        config.pretrain, network, Path(config.pretrain.corpus), root / f"pretrain-{key}",
        seed=config.seed, mean=MEAN, std=STD, side=32, classifier=classifier, progress=narrate,
    )  # fmt: skip
    network.load_state_dict(tree)
    return network


@torch.no_grad()
def accuracy(net: nn.Module, images: ImageSet, positions: list[int]) -> float:
    net.eval()
    right = 0
    for a in range(0, len(positions), 250):
        part = positions[a : a + 250]
        with torch.autocast("cpu", torch.bfloat16):
            right += int((net(normalised(images.read(part)))[1].argmax(1) == torch.from_numpy(images.labels[part])).sum())  # fmt: skip
    return 100 * right / len(positions)


def finetuned(net: nn.Module, train: ImageSet, test: ImageSet, positions: list[int], seed: int, epochs: int, lr: float) -> dict[str, Any]:  # fmt: skip
    """Accuracy after each epoch on the same 1,000 test images, and on all of them after the last."""
    net.requires_grad_(True)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    x, y, draws = train.read(positions), torch.from_numpy(train.labels[positions]), stream(seed, "table4 tuning")
    few = sorted(numpy_stream(0, "table4 curve").choice(len(test), min(CURVE, len(test)), replace=False).tolist())
    curve = []
    for _ in range(epochs):
        net.train()
        for batch in torch.randperm(len(y), generator=draws).split(32):
            seen = augment(normalised(x[batch]), draws, padding=4, flip=True, mode="sample")
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(seen)[1].float(), y[batch])
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
        curve.append(accuracy(net, test, few))
    return {"curve": curve, "last_all": accuracy(net, test, list(range(len(test))))}


def one(config: Config, arm: str, percent: float, root: Path, epochs: int, lr: float) -> dict[str, Any]:
    """The line of one run."""
    train, test = images(config.data.source, config.data.root)
    clock, wall = time.process_time(), time.perf_counter()
    net = initialised(config, arm, train.class_names, root)
    made, chosen = time.process_time() - clock, subset(train, percent, config.seed)
    start = digest({k: v for k, v in net.state_dict().items() if isinstance(v, Tensor)})
    out = finetuned(net, train, test, chosen, config.seed, epochs, lr)
    curve, target = out["curve"], TARGET.get(config.data.source, 25.0)
    reached = next((i + 1 for i, a in enumerate(curve) if a >= target), None)
    return {
        "table": 4, "dataset": config.data.source, "arm": arm, "percent": percent, "images": len(chosen), "seed": config.seed,
        "target": target, "epochs_to_target": reached, "best": max(curve), "last": curve[-1], **out, "epochs": epochs, "lr": lr,
        "cpu_seconds": {"pretraining": round(made, 1), "fine-tuning": round(time.process_time() - clock - made, 1)},
        "seconds": round(time.perf_counter() - wall, 1), "start_sha256": start, "config_hash": config_hash(config.resolved()),
        "pretrain": to_dict(config.pretrain) if config.pretrain is not None else None, "environment": environment(),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row an arm, mean and sample standard deviation over seeds."""
    groups: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        groups[r["dataset"], r["percent"]][r["arm"]].append(r)
    out = ["| data | labels | arm | seeds | epochs to target | last epoch, all test images | best epoch\\* |", "|:---|---:|:---|---:|---:|---:|---:|"]  # fmt: skip
    for (data, percent), arms in sorted(groups.items()):
        for arm, runs in sorted(arms.items()):
            reached = [r["epochs_to_target"] for r in runs]
            epochs = "–" if None in reached else f"{statistics.mean(reached):.1f}"
            cells = []
            for key in ("last_all", "best"):
                values = [r[key] for r in runs]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            out.append(f"| {data} | {percent:g} % | {arm} | {len(runs)} | {epochs} | {' | '.join(cells)} |")
    return "\n".join([*out, "", "\\* Selected on test images: an upper bound, not a result."])


def main() -> None:
    """Run what is not there yet; print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("config", type=Path)
    p.add_argument("--percent", type=float, nargs="+", default=[1.0, 0.4])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--arms", nargs="+", help="only these")
    p.add_argument("--epochs", type=int, default=30)
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--runs", type=Path, default=Path("runs/table4"))
    p.add_argument("--out", type=Path, default=Path("results") / "table4.jsonl")
    p.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help='for example --set pretrain.steps=20')  # fmt: skip
    p.add_argument("--page", type=Path, help="a Markdown file whose <!-- table4 --> block is replaced")
    args = p.parse_args()
    torch.set_num_threads(1)
    changes = {k: json.loads(v) for k, v in (s.split("=", 1) for s in args.set)}
    plan = load(args.config)
    arms: dict[str, Config] = {c.name: c for c in plan.runs}
    arms |= {name: replace(arms["paper"], name=name) for name in EXTRA}
    arms = {
        name: arms[name] for name in args.arms or arms if name in arms
    } | arms  # in the order in which they are named
    unknown = set(args.arms or []) - set(arms)
    if unknown:
        raise UserError("--arms", f"unknown {sorted(unknown)[0]!r}", f"arms: {', '.join(arms)}")
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for percent in args.percent:
        for seed in args.seeds:
            for arm, config in arms.items():
                if args.arms and arm not in args.arms:
                    continue
                config = replace(config, seed=seed)
                if config.pretrain is not None and changes:
                    config = replace(config, pretrain=replace(config.pretrain, **{k.removeprefix("pretrain."): v for k, v in changes.items()}))  # fmt: skip
                key = (config.data.source, arm, percent, seed, config_hash(config.resolved()), args.epochs, args.lr)
                have = {(r["dataset"], r["arm"], r["percent"], r["seed"], r["config_hash"], r["epochs"], r["lr"]) for r in rows}  # fmt: skip
                if key in have:
                    continue
                rows.append(one(config, arm, percent, args.runs, args.epochs, args.lr))
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(rows[-1]) + "\n")
    text = table(rows)
    if args.page is not None:
        fill(args.page, {"table4": text})
    print(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
