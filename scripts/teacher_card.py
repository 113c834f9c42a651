"""The bundled teachers' card, measured: ``python scripts/teacher_card.py`` writes card.json, and CARD.md from it.

Mini-CLIP's zero-shot accuracy on the 1,797 real digits that it never saw; mini-LLaVA's answers on fresh glyphs against their scenes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mllm_fl.data.digits import load_digits
from mllm_fl.data.glyphs import render_glyphs
from mllm_fl.models.teacher.clip import BUNDLED, load_clip

FRESH_SEED = 987_654  # never used in training


def clip_figures(name: str) -> dict[str, Any]:
    """Zero-shot accuracy on all real digits: overall, per class, and on the test half."""
    clip = load_clip(name)
    right, labels, halves = [], [], []
    for digits in load_digits(16):
        q = clip.zero_shot(digits.read(range(len(digits))), digits.class_names)
        right.append(q.argmax(1) == torch.from_numpy(digits.labels))
        labels.append(torch.from_numpy(digits.labels))
        halves.append(float(right[-1].double().mean()))
    ok, y = torch.cat(right).double(), torch.cat(labels)
    return {
        "images": len(y), "zero_shot": float(ok.mean()), "train_half": halves[0], "test_half": halves[1],
        "per_class": [float(ok[y == c].mean()) for c in range(10)], "templates": list(clip.templates),
        "logit_scale": clip.logit_scale, "parameters": sum(p.numel() for p in clip.model.parameters()),
    }  # fmt: skip


def llava_figures(name: str, count: int) -> dict[str, Any]:
    """Answers to every kind of question on ``count`` fresh glyphs, checked against the scenes; and the same answers blind."""
    from mllm_fl.annotate.agreement import agreement
    from mllm_fl.annotate.backends.base import Request
    from mllm_fl.annotate.backends.local import LocalBackend
    from mllm_fl.annotate.prompts import prompts_for

    images, scenes = render_glyphs(count, FRESH_SEED, image_size=16)
    backend = LocalBackend(name, max_tokens=80)
    truth = {str(i): s.to_json() for i, s in enumerate(scenes)}
    out: dict[str, Any] = {"images": count, "parameters": sum(p.numel() for p in backend._model.parameters())}
    for blind in (False, True):
        records = []
        failed = 0
        for prompt in prompts_for(("caption", "conversation", "detail", "reasoning"), "glyphs"):
            asked = [prompt.questions(f"{i:012x}") for i in range(count)]
            shown = [images.read([(i + 1) % count if blind else i])[0] for i in range(count)]
            requests = [Request(x, q, prompt.system) for x, q in zip(shown, asked, strict=True)]
            replies: dict[int, Any] = {}
            backend.answer(requests, lambda done, replies=replies: replies.update(done))  # type: ignore[misc]
            for i in range(count):
                if replies[i].error:
                    failed += 1
                    continue
                records.append(prompt.record(f"{i}-{prompt.kind}", str(i), asked[i], replies[i].texts))
        out["another picture" if blind else "own picture"] = {"failed": failed, "agreement": agreement(records, truth)}
    return out


def write(folder: Path, figures: dict[str, Any]) -> None:
    """card.json and CARD.md; every number in the second comes from the first."""
    (folder / "card.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    c, v, env = figures["clip"], figures["llava"], figures["environment"]
    rows = []
    for kind, seen in v["own picture"]["agreement"].items():
        other = v["another picture"]["agreement"].get(kind, {"attributes": {}})
        for attribute, cell in seen["attributes"].items():
            blind = other["attributes"].get(attribute)
            wrong = 1 - cell["right"] / cell["stated"]
            without = f"{1 - blind['right'] / blind['stated']:.1%}" if blind else "–"
            rows.append(f"| {kind} | {attribute} | {cell['stated']} | {wrong:.1%} | {without} |")
    lies = "".join(
        f"| {kind} | {seen['records']} | {seen['false'] / seen['records']:.1%} |\n"
        for kind, seen in v["own picture"]["agreement"].items()
    )
    text = f"""# The bundled teachers

Mini-CLIP (`transformers.CLIPModel`, {c["parameters"]:,} parameters) and mini-LLaVA (`LlavaForConditionalGeneration` on mini-CLIP's vision tower,
{v["parameters"]:,} parameters) make the three stages run without network and GPU. They are toys with the real interfaces.

**What they saw:** characters rendered from fonts (`mllm_fl.data.glyphs`: digits, and capital letters without I and O), with captions, questions
and answers made from each scene's record. **They never saw a real digit.** Recipe: `mllm_fl/models/teacher/recipe.py` (`make teachers`); logs:
`TRAINING*.log`. Weights and text: Apache-2.0; the fonts are those that matplotlib ships (DejaVu, STIX, Computer Modern), only used, not contained.

Everything below was measured by `python scripts/teacher_card.py` on {env["processor"]}, torch {env["torch"]}, commit {env["commit"]}.

## Mini-CLIP: zero-shot accuracy on scikit-learn's {c["images"]:,} real handwritten digits

{c["zero_shot"]:.1%} on all ({c["train_half"]:.1%} on the training half, {c["test_half"]:.1%} on the test half), prompts: {"; ".join(f"“{t}”" for t in c["templates"])}.

| class | {" | ".join(map(str, range(10)))} |
|---|{"---|" * 10}
| accuracy | {" | ".join(f"{a:.1%}" for a in c["per_class"])} |

## Mini-LLaVA: hallucination on {v["images"]:,} fresh glyphs

Share of records in which at least one statement contradicts the scene:

| kind | records | with a false statement |
|---|---|---|
{lies}
Per attribute, and beside it the same when the model is shown another picture (what guessing gives):

| kind | attribute | stated | false | false, shown another picture |
|---|---|---|---|---|
{chr(10).join(rows)}

Answers that ended without an end token: {v["own picture"]["failed"]}.
"""
    (folder / "CARD.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    from mllm_fl.runs import environment

    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--folder", type=Path, default=BUNDLED)
    p.add_argument("--count", type=int, default=1000)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    figures = {
        "clip": clip_figures(str(args.folder / "mini-clip")),
        "llava": llava_figures(str(args.folder / "mini-llava"), args.count),
        "environment": environment(),
    }
    write(args.folder, figures)
    print((args.folder / "CARD.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
