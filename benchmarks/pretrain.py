"""What a step of stage 1b costs beside the frozen model's own pass, and what its logits and its memory come to.

    nice .venv/bin/python -m benchmarks.pretrain speed      a LLaVA of 1.4 billion random weights: step over bare forward and backward
    nice .venv/bin/python -m benchmarks.pretrain logits     peak memory with logits at the answers only, and everywhere
    nice .venv/bin/python -m benchmarks.pretrain memory     peak memory of a run, expected before its weights are loaded and measured

Each appends a line to results/bench.jsonl. One thread; medians of interleaved repeats, so that other load meets both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.models.teacher.blend import lm_loss
from mllm_fl.models.teacher.conversation import IGNORED, Sample, collate
from mllm_fl.models.teacher.families import FAMILIES
from mllm_fl.models.teacher.llava import Blueprint, LlavaTeacher
from mllm_fl.stages.pretraining import preflight
from mllm_fl.stages.pretraining.config import PretrainConfig
from mllm_fl.stages.pretraining.learner import Learner
from mllm_fl.stages.pretraining.parallel import World
from mllm_fl.stages.pretraining.samples import Batch

ANSWER = 28  # tokens of a caption, its question and its end
SHAPES = {  # language part: layers, width, inner width, heads, key-value heads, words
    "1.1b": (22, 2048, 5632, 32, 4, 32_000),
    "0.1b": (8, 1024, 2816, 16, 16, 32_000),
    "tiny": (2, 256, 512, 4, 4, 32_000),
    "7b": (32, 4096, 11008, 32, 32, 32_064),
}
SIGHTS = {"large": (24, 1024, 4096, 16), "small": (3, 128, 256, 4)}


def llava(language: str, sight: str, side: int) -> Any:
    """The configuration of a LLaVA: CLIP ViT-L/14 or a small tower at ``side`` pixels, and a Llama of a shape."""
    bridge_torchvision()
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    layers, d, inner, heads, kv, words = SHAPES[language]
    deep, wide, broad, eyes = SIGHTS[sight]
    text = LlamaConfig(
        vocab_size=words, hidden_size=d, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, max_position_embeddings=4096,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=wide, intermediate_size=broad, num_hidden_layers=deep, num_attention_heads=eyes, image_size=side, patch_size=14,
        projection_dim=768,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=31_999, image_seq_length=(side // 14) ** 2
    )


def plan_of(config: Any) -> Blueprint:
    """Its place, without a processor: pictures come ready."""
    family = FAMILIES["llava"]
    processor = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    return Blueprint("random", config, processor, family, family.place(config))


class Ready(LlavaTeacher):
    """Takes pictures as they are, float."""

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": images.to(self.projector_dtype)}


def teacher_of(plan: Blueprint, dtype: torch.dtype) -> Ready:
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(plan.config, dtype=dtype)
    parts = (plan.name, plan.config, plan.processor, plan.family, plan.place)
    return Ready(*parts, model.eval().requires_grad_(False))


def conversations(plan: Blueprint, count: int) -> list[Sample]:
    words = torch.randint(5, 31_000, (count, ANSWER), generator=torch.Generator().manual_seed(0))
    out = []
    for row in words:
        ids = torch.cat([torch.tensor([1]), torch.full((plan.place.tokens,), plan.image_token), row])
        labels = torch.full_like(ids, IGNORED)
        labels[-ANSWER + 5 :] = ids[-ANSWER + 5 :]
        out.append(Sample(ids, labels))
    return out


def learner_of(plan: Blueprint, teacher: LlavaTeacher, **change: Any) -> Learner:
    network = build_network(ModelConfig(width=64, adapter="linear", adapter_dim=plan.width), 10, 0)
    return Learner(PretrainConfig(**change), network, teacher, World(), (0.5,) * 3, (0.5,) * 3)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    wall, clock = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - clock


def speed(language: str, batch: int, repeats: int) -> dict[str, Any]:
    """Step over bare pass, at alpha = 1 (no CLIP on either side) and at 0.5 (CLIP on both)."""
    plan = plan_of(llava(language, "large", 224))
    teacher = teacher_of(plan, torch.bfloat16)
    learner = learner_of(plan, teacher)
    samples, side = conversations(plan, batch), 4 * plan.grid
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    shown = torch.randn(batch, 3, 224, 224)
    ids, mask, labels = collate(samples, 0)
    count = sum(s.predicted for s in samples)

    def step(alpha: float) -> Callable[[], object]:
        read = Batch(torch.arange(batch), torch.arange(batch), pixels, None if alpha == 1 else shown, samples)
        return lambda: learner.step(0, read, alpha, 1e-3, count, batch)

    def bare(alpha: float) -> Callable[[], object]:
        def call() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                z = None if alpha == 1 else teacher.features(shown)
                leaf = torch.zeros(batch, plan.grid**2, plan.width, requires_grad=True)
                loss = lm_loss(teacher, ids, mask, labels, leaf, alpha, z)
            torch.autograd.backward(loss, inputs=[leaf])

        return call

    calls = {f"{kind} {a:g}": f(a) for a in (1.0, 0.5) for kind, f in (("step", step), ("bare", bare))}
    for name in ("step 1", "bare 1"):
        calls[name]()  # warm
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            took[name].append(timed(call))
    cpu = {name: statistics.median(c for _, c in t) for name, t in took.items()}
    tokens = batch * (plan.place.tokens + ANSWER + 1)
    return {
        "benchmark": "pretraining step over the frozen model's own pass", "language": language, "parameters": sum(p.numel() for p in teacher.model.parameters()),
        "batch": batch, "tokens": tokens, "cpu_seconds": {k: round(v, 3) for k, v in cpu.items()},
        "wall_seconds": {n: [round(w, 2) for w, _ in t] for n, t in took.items()},
        "step_over_bare": {f"alpha {a:g}": round(statistics.median(s[1] / b[1] for s, b in zip(took[f"step {a:g}"], took[f"bare {a:g}"], strict=True)), 4) for a in (1.0, 0.5)},
        "tokens_per_cpu_second": round(tokens / cpu["step 1"], 1), "repeats": repeats,
    }  # fmt: skip


def one_logits(everywhere: bool) -> int:
    """Peak bytes over the weights of one pass of a small model with 32,000 words, 576 image tokens, batch 8."""
    plan = plan_of(llava("tiny", "small", 336))
    teacher = teacher_of(plan, torch.float32)
    ids, mask, labels = collate(conversations(plan, 8), 0)
    leaf = torch.zeros(8, plan.grid**2, plan.width, requires_grad=True)
    before = preflight.resident()
    preflight.forget_peak(torch.device("cpu"))
    if everywhere:
        out = teacher.model(inputs_embeds=teacher.embeddings(ids, leaf), attention_mask=mask, labels=labels, use_cache=False)  # fmt: skip
        loss = out.loss
    else:
        loss = lm_loss(teacher, ids, mask, labels, leaf, 1.0)
    torch.autograd.backward(loss, inputs=[leaf])
    return preflight.peak_bytes(torch.device("cpu"), before)


def logits() -> dict[str, Any]:
    """Each side in a process of its own, so that its peak is its own."""
    found = {}
    for where in ("answers", "everywhere"):
        command = [sys.executable, "-m", "benchmarks.pretrain", "one-logits", "--where", where]
        found[where] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    return {
        "benchmark": "pretraining's logits", "peak_bytes": found, "batch": 8, "positions": {"answers": ANSWER - 4, "everywhere": 577 + ANSWER},
        "words": 32_000, "one_fp32_copy_at_batch_128": {"answers": 128 * (ANSWER - 2) * 32_000 * 4, "everywhere": 128 * (576 + ANSWER) * 32_000 * 4},
    }  # fmt: skip


def memory(language: str, batch: int) -> dict[str, Any]:
    """One step of a model in fp32: what preflight expects, and the peak."""
    out: dict[str, Any] = {"benchmark": "pretraining's memory", "language": language, "batch": batch, "bytes": {}}
    for checkpointing in (False, True):
        command = [sys.executable, "-m", "benchmarks.pretrain", "one-memory", "--language", language, "--batch", str(batch)]  # fmt: skip
        command += ["--where", "twice"] if checkpointing else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        out["bytes"]["layers computed twice" if checkpointing else "plain"] = json.loads(done.stdout.splitlines()[-1])
    return out


def one_memory(language: str, batch: int, checkpointing: bool) -> dict[str, int]:
    plan = plan_of(llava(language, "small", 224))
    network = build_network(ModelConfig(width=64, adapter="linear", adapter_dim=plan.width), 10, 0)
    length = plan.place.tokens + ANSWER + 1
    expected = preflight.estimate(
        plan, network, side=64, share=batch, part=batch, tokens=length, predicted=ANSWER, half=False, checkpointing=checkpointing
    )  # fmt: skip
    before = preflight.resident()
    preflight.forget_peak(torch.device("cpu"))
    teacher = teacher_of(plan, torch.float32)
    learner = learner_of(plan, teacher, gradient_checkpointing=checkpointing)
    samples = conversations(plan, batch)
    pixels = torch.zeros(batch, 3, 64, 64, dtype=torch.uint8)
    read = Batch(torch.arange(batch), torch.arange(batch), pixels, None, samples)
    learner.step(0, read, 1.0, 1e-3, sum(s.predicted for s in samples), batch)
    return {"expected": expected["total"], "measured": preflight.peak_bytes(torch.device("cpu"), before)}


def main() -> None:
    """Measure, append, print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["speed", "logits", "memory", "one-logits", "one-memory"])
    p.add_argument("--language", choices=list(SHAPES), default="1.1b")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--where", default="")
    p.add_argument("--out", type=Path, default=Path("results/bench.jsonl"))
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.what == "one-logits":
        print(one_logits(args.where == "everywhere"))
        return
    if args.what == "one-memory":
        print(json.dumps(one_memory(args.language, args.batch, args.where == "twice")))
        return
    from mllm_fl.runs import environment

    row = speed(args.language, args.batch, args.repeats) if args.what == "speed" else logits() if args.what == "logits" else memory(args.language, args.batch)  # fmt: skip
    known = environment()
    row |= {k: known[k] for k in ("mllm_fl", "commit", "torch", "processor", "cores") if k in known}
    with args.out.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
