"""What pretraining on CC-595K for the paper's 4 epochs would cost with LLaVA-1.5-7B: ``python -m benchmarks.pretrain_cost --page docs/pretraining.md``.

Counted: the weights of both parts and the operations of one step, by PyTorch's counter on tensors without storage; memory, by the preflight of stage 1b.
ASSUMED: the share of a chip's peak rate that is reached (--utilisation, 0.4, never measured here: no GPU), and captions of 30 tokens with a question of 15.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from benchmarks.pretrain import llava, plan_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.report.marked import fill
from mllm_fl.stages.pretraining import preflight

SAMPLES, EPOCHS, BATCH, PART = 595_375, 4, 128, 16
CHIPS = {
    "A100 80 GB": (312e12, 80),
    "H100 80 GB": (989e12, 80),
    "H200": (989e12, 141),
}  # dense bf16 operations a second, GB
TEXT, ANSWER = 45, 30


def operations(side: int) -> dict[str, float]:
    """Operations of one sample: CLIP forward, language model forward and backward to its inputs, compact model forward and backward."""
    plan = plan_of(llava("7b", "large", side))
    length = plan.place.tokens + TEXT
    network = build_network(ModelConfig(width=64, adapter="linear", adapter_dim=plan.width), 10, 0).to("meta")
    with FakeTensorMode():
        model = plan.skeleton(torch.bfloat16)
        with FlopCounterMode(display=False) as sees, torch.no_grad():
            model.get_submodule("model.vision_tower")(torch.empty(1, 3, side, side, dtype=torch.bfloat16))
        with FlopCounterMode(display=False) as reads:
            x = torch.empty(1, length, 4096, dtype=torch.bfloat16, requires_grad=True)
            hidden = model.get_submodule("model.language_model")(inputs_embeds=x, use_cache=False).last_hidden_state
            logits = model.get_submodule("lm_head")(hidden[:, -ANSWER - 1 :])
            torch.autograd.backward(logits.sum(), inputs=[x])
    with FlopCounterMode(display=False) as learns:
        out = network.tokens(torch.empty(2, 3, 4 * plan.grid, 4 * plan.grid, device="meta"), plan.grid)
        torch.autograd.backward(out.sum())
    return {"CLIP": sees.get_total_flops(), "LLaVA": reads.get_total_flops(), "compact": learns.get_total_flops() / 2}


def table(utilisation: float) -> str:
    """Markdown."""
    seen = SAMPLES * EPOCHS
    out = [f"| picture | tokens a sample | operations | of them CLIP, compact model | {' | '.join(f'hours on one {c}' for c in CHIPS)} | memory of a process, {PART} conversations at a time |", f"|:---|---:|---:|---:|{'---:|' * len(CHIPS)}---:|"]  # fmt: skip
    for side in (224, 336):
        plan = plan_of(llava("7b", "large", side))
        ops = operations(side)
        total = seen * (ops["CLIP"] / 2 + ops["LLaVA"] + ops["compact"])  # CLIP is run in the first half only
        hours = [total / (peak * utilisation) / 3600 for peak, _ in CHIPS.values()]
        network = build_network(ModelConfig(width=64, adapter="linear", adapter_dim=plan.width), 10, 0)
        size = {
            twice: preflight.estimate(
                plan, network, side=4 * plan.grid, share=BATCH, part=PART, tokens=plan.place.tokens + TEXT, predicted=ANSWER, half=True,
                checkpointing=twice,
            )["total"] / 1e9
            for twice in (False, True)
        }  # fmt: skip
        share = [seen * ops["CLIP"] / 2 / total, seen * ops["compact"] / total]
        cells = [f"{side} px", str(plan.place.tokens + TEXT), f"{total:.1e}", f"{share[0]:.1%}, {share[1]:.1%}", *(f"{h:.0f}" for h in hours)]  # fmt: skip
        out.append(f"| {' | '.join(cells)} | {size[False]:.0f} GB; {size[True]:.0f} GB with layers computed twice |")
    lines = f"{SAMPLES:,} samples, {EPOCHS} epochs, {SAMPLES * EPOCHS // BATCH:,} steps of {BATCH}. **Assumed, not measured**: {utilisation:.0%} of the chip's dense bf16 rate ({', '.join(f'{c} {p / 1e12:.0f}' for c, (p, _) in CHIPS.items())} TFLOP/s), {TEXT} tokens of text a sample. Several devices divide the hours, less their communication. Layers computed twice add a third to the operations."  # fmt: skip
    return "\n".join([*out, "", lines])


def main() -> None:
    """Print the table, or put it into a page."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--utilisation", type=float, default=0.4)
    p.add_argument("--page", type=Path)
    args = p.parse_args()
    text = table(args.utilisation)
    if args.page is not None:
        fill(args.page, {"pretrain-cost": text})
    print(text)


if __name__ == "__main__":
    main()
