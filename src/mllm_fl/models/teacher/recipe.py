"""How the bundled teachers were made: ``python -m mllm_fl.models.teacher.recipe`` (or ``make teachers``).

Both see rendered characters only (:mod:`mllm_fl.data.glyphs`), never a real digit. Mini-CLIP is trained by contrast between
glyphs and captions made from their scenes; mini-LLaVA puts a projector and a small language model behind its frozen vision tower
and learns to answer the questions of :mod:`mllm_fl.models.teacher.questions`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.data.glyphs import DIGITS, LETTERS, Scene, render_glyphs
from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.clip import BUNDLED, load_clip
from mllm_fl.models.teacher.questions import QUESTIONS, ZERO_SHOT, answer, clip_caption
from mllm_fl.models.teacher.words import make_tokenizer
from mllm_fl.seeds import numpy_stream, seed_of, stream

SIZE, WIDTH = 16, 128
Log = Callable[[str], None]


def learning_rate(step: int, steps: int, peak: float, warm: float = 0.05) -> float:
    """Linear warm-up, then half a cosine to zero."""
    at = step / steps
    return (
        peak * at / warm
        if at < warm
        else peak * 0.5 * (1 + float(torch.cos(torch.tensor(3.14159265 * (at - warm) / (1 - warm)))))
    )


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness and noise on preprocessed images, drawn anew at every step; geometry already varies between glyphs."""
    gain = 0.8 + 0.4 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return (x + 1) * gain - 1 + 0.05 * torch.randn(x.shape, generator=generator)


def train_clip(count: int, steps: int, seed: int, log: Log) -> tuple[Any, Any, Any]:
    """(CLIPModel, image processor, tokenizer) after ``steps`` of contrast on ``count`` glyphs, batches of 256.

    A pair counts as matching when the two show the same character (unified contrast): with 34 characters in a batch of 256 the
    plain loss would push equal ones apart. A second, plain term on exact pairs keeps stroke and lean in the features.
    """
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    images, scenes = render_glyphs(count, seed, characters=DIGITS * 2 + LETTERS, image_size=SIZE)
    tokenizer = make_tokenizer(append=True)
    processor = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_center_crop=False,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True, resample=2,
    )  # fmt: skip
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(
        text_config=tower | {
            "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=tower | {"num_hidden_layers": 5, "image_size": SIZE, "patch_size": 4},
        projection_dim=WIDTH,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "mini-clip init"))
        model = CLIPModel(config)
    x = images.read(range(count)).float() / 127.5 - 1
    labels = torch.from_numpy(images.labels)
    words = numpy_stream(seed, "captions")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    draws = stream(seed, "mini-clip batches")
    started, losses = time.perf_counter(), []
    model.train()
    for step in range(steps):
        batch = torch.randint(count, (256,), generator=draws)
        text = tokenizer([clip_caption(scenes[i], words) for i in batch.tolist()], padding=True, return_tensors="pt")
        u = F.normalize(model.get_image_features(pixel_values=jitter(x[batch], draws)).pooler_output, dim=1)
        v = F.normalize(model.get_text_features(**text).pooler_output, dim=1)
        logits = model.logit_scale.exp().clamp(max=100) * u @ v.T
        same = (labels[batch][:, None] == labels[batch][None]).float()
        same = same / same.sum(1, keepdim=True)
        exact = torch.arange(256)
        loss = F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)
        loss = loss / 2 + 0.1 * (F.cross_entropy(logits, exact) + F.cross_entropy(logits.T, exact)) / 2
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 250 == 0:
            log(
                f"mini-clip step {step + 1}/{steps} loss {sum(losses[-250:]) / 250:.4f} seconds {time.perf_counter() - started:.0f}"
            )
    return model.eval(), processor, tokenizer


def questions_of(scene: Scene, kind: str, draw: int) -> list[tuple[str, str]]:
    """The (question, answer) turns of one training conversation of a kind; ``draw`` chooses the wording."""
    asked = QUESTIONS[kind]
    if kind == "conversation":
        asked = tuple(asked[(draw + i) % len(asked)] for i in range(3))
    else:
        asked = (asked[draw % len(asked)],)
    return [(q, answer(scene, q)) for q in asked]


def conversation_ids(tokenizer: Any, turns: list[tuple[str, str]], image_tokens: int) -> tuple[list[int], list[int]]:
    """Token ids and labels (-100 but on answers and their <eos>) of a conversation in the prompt's form."""
    ids, labels = [tokenizer.bos_token_id], [-100]
    for i, (question, said) in enumerate(turns):
        head = "USER: " + ("<image> " * image_tokens if i == 0 else "") + question + " ASSISTANT:"
        before = tokenizer(head, add_special_tokens=False)["input_ids"]
        after = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids += before + after
        labels += [-100] * len(before) + after
    return ids, labels


def train_llava(clip: Any, processor: Any, count: int, steps: int, seed: int, log: Log) -> tuple[Any, Any]:
    """(LlavaForConditionalGeneration, LlavaProcessor) with mini-CLIP's frozen vision tower, after ``steps`` batches of 64."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    images, scenes = render_glyphs(count, seed + 1, characters=DIGITS * 2 + LETTERS, image_size=SIZE)
    tokenizer = make_tokenizer(append=False)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
        ),
        image_token_id=image_id, vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=(SIZE // 4) ** 2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "mini-llava init"))
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(
        {k.removeprefix("vision_model."): v for k, v in clip.state_dict().items() if k.startswith("vision_model.")}
        if not any(k.startswith("vision_model.") for k in model.model.vision_tower.state_dict())
        else {k: v for k, v in clip.state_dict().items() if k.startswith("vision_model.")}
    )
    model.model.vision_tower.requires_grad_(False)
    x = images.read(range(count)).float() / 127.5 - 1
    tokens = config.image_seq_length
    kinds = list(QUESTIONS)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=2e-3, weight_decay=0.01)
    draws = stream(seed, "mini-llava batches")
    started, losses = time.perf_counter(), []
    model.train()
    for step in range(steps):
        batch = torch.randint(count, (64,), generator=draws).tolist()
        chosen = torch.randint(1000, (64, 2), generator=draws).tolist()
        said = [
            conversation_ids(tokenizer, questions_of(scenes[i], kinds[a % 4], b), tokens)
            for i, (a, b) in zip(batch, chosen, strict=True)
        ]
        longest = max(len(ids) for ids, _ in said)
        ids = torch.tensor([i + [tokenizer.pad_token_id] * (longest - len(i)) for i, _ in said])
        labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y in said])
        out = model(
            input_ids=ids, pixel_values=x[batch], attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels
        )
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        optimiser.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        losses.append(float(out.loss.detach()))
        if (step + 1) % 250 == 0:
            log(
                f"mini-llava step {step + 1}/{steps} loss {sum(losses[-250:]) / 250:.4f} seconds {time.perf_counter() - started:.0f}"
            )
    llava_processor = LlavaProcessor(
        image_processor=processor, tokenizer=tokenizer, patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return model.eval(), llava_processor


def _save(parts: tuple[Any, ...], folder: Path, texts: dict[str, str]) -> None:
    """All parts and texts into ``folder``, which is replaced whole once they are written."""
    new = folder.with_name(folder.name + ".new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for part in parts:
            part.save_pretrained(new)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    except OSError as e:
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"--out {folder.parent}", f"cannot be written ({e.strerror})", "name another folder") from e


def main(argv: list[str] | None = None) -> None:
    """Train both on one thread (the sums' order, and so the weights, depend on it), save them, keep a log of each beside them."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=BUNDLED)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--glyphs", type=int, default=20_000)
    p.add_argument("--clip-steps", type=int, default=1_600)
    p.add_argument("--llava-steps", type=int, default=2_000)
    p.add_argument(
        "--only", choices=["clip", "llava"], help="train one of the two; mini-llava then takes the saved mini-clip"
    )
    args = p.parse_args(argv)
    bridge_torchvision()
    torch.set_num_threads(1)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as e:
        raise UserError(f"--out {args.out}", f"cannot be written ({e.strerror})", "name another folder") from e
    head = f"seed {args.seed}, {args.glyphs} glyphs, torch {torch.__version__}, threads {torch.get_num_threads()}"
    logs: dict[str, list[str]] = {"clip": [head], "llava": [head]}

    def log_of(part: str) -> Log:
        def log(line: str) -> None:
            logs[part].append(line)
            print(line, file=sys.stderr, flush=True)

        return log

    def keep(part: str) -> None:
        (args.out / f"TRAINING-{part}.log").write_text("\n".join(logs[part]) + "\n", encoding="utf-8")

    if args.only == "llava":
        saved = load_clip(str(args.out / "mini-clip"))
        clip, processor = saved.model, saved.processor
    else:
        clip, processor, tokenizer = train_clip(args.glyphs, args.clip_steps, args.seed, log_of("clip"))
        prompts = "".join(f"{t}\n" for t in ZERO_SHOT)
        _save((clip, processor, tokenizer), args.out / "mini-clip", {"templates.txt": prompts})
        keep("clip")
    if args.only != "clip":
        parts = train_llava(clip, processor, args.glyphs // 2, args.llava_steps, args.seed, log_of("llava"))
        _save(parts, args.out / "mini-llava", {})
        keep("llava")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
