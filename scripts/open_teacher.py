"""A small CLIP and a small LLaVA from open images, and the corpus to pretrain on: ``python scripts/open_teacher.py --open cifar100 --out FOLDER``.

For "does pretraining help?" (experiments/table4_*.toml) where no real LLaVA can be had. FOLDER gets mini-clip/, mini-llava/, corpus/ (pictures and
records.json) and CARD.json, which says what the teacher saw. ``--open cifar100``: CIFAR-100's training images, for CIFAR-10; captions are made from
their fine and coarse LABELS. ``--open natural``: CIFAR-10's training images (captions from LABELS), Flickr8k (people's own captions) and one ImageNet image
a class (captions from LABELS), for CIFAR-100. An open image that is a test image of the data set it is for, byte for byte, is left out and counted.
A finished part is not made again. Numbers: one thread, named streams. The defaults are SMALL, for a few minutes of one core: a ViT of 5 layers on 16 patches of
8 x 8 pixels, 1,500 batches of 256 for CLIP, 800 of 64 for LLaVA; in fp32, which is faster here than bf16 at this width.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.annotate.backends.base import png
from mllm_fl.annotate.records import Record, Turn, save
from mllm_fl.atomic import write_atomic
from mllm_fl.data.augment import augment
from mllm_fl.data.check import pixel_hashes
from mllm_fl.data.cifar import data_root, load_cifar
from mllm_fl.data.decode import fit, to_array, to_rgb
from mllm_fl.errors import UserError
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.clip import load_clip
from mllm_fl.models.teacher.recipe import conversation_ids, learning_rate
from mllm_fl.seeds import seed_of, stream

SIZE, PATCH, WIDTH, WORDS = 32, 8, 128, 2_000
ASKED = "describe the picture ."
FOR = {"cifar100": "cifar10", "natural": "cifar100"}


def spoken(name: str) -> str:
    return name.replace("_", " ").lower()


def gathered(source: str, limit: int | None) -> tuple[Tensor, list[str], dict[str, int]]:
    """(pictures uint8 (n, 3, 32, 32), a caption each, how many from where); at most ``limit`` of each source."""
    pictures: list[Tensor] = []
    captions: list[str] = []
    counts: dict[str, int] = {}

    def add(name: str, images: Tensor, texts: list[str]) -> None:
        pictures.append(images[:limit])
        captions.extend(texts[:limit])
        counts[name] = len(images[:limit])

    import pyarrow.parquet as pq

    if source == "cifar100":
        train, _ = load_cifar("cifar100", None, SIZE)
        table = pq.read_table(
            data_root(None, "cifar100") / "cifar100/train-00000-of-00001.parquet", columns=["coarse_label"]
        )
        kinds = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["coarse_label"]["names"]
        coarse = table.column("coarse_label").to_pylist()
        few = range(min(limit or len(train), len(train)))
        texts = [f"a photo of a {spoken(train.class_names[train.labels[i]])} , one of {spoken(kinds[coarse[i]])} ." for i in few]  # fmt: skip
        add("CIFAR-100 train (captions from labels)", train.read(few), texts)
        return torch.cat(pictures), captions, counts
    train, _ = load_cifar("cifar10", None, SIZE)
    few = range(min(limit or len(train), len(train)))
    add("CIFAR-10 train (captions from labels)", train.read(few), [f"a photo of a {spoken(train.class_names[train.labels[i]])} ." for i in few])  # fmt: skip
    root = data_root(None, "cifar10")
    prompts = json.loads((root / "prompts/clip_zeroshot_prompts.json").read_text(encoding="utf-8"))
    classes = prompts["imagenet"]["classes_open_clip"]
    for file, name in (
        ("flickr8k/train", "Flickr8k train (people's captions)"),
        ("imagenet_sample_1k/validation", "ImageNet sample (captions from labels)"),
    ):
        rows = pq.read_table(root / f"{file}-00000-of-00001.parquet").slice(0, limit or 10**9).to_pylist()
        drawn = torch.stack([torch.from_numpy(to_array(fit(to_rgb(r["image"]["bytes"]), SIZE)).copy()) for r in rows])
        texts = [r["captions"][0].lower() if "captions" in r else f"a photo of a {spoken(classes[r['label']])} ." for r in rows]  # fmt: skip
        add(name, drawn, texts)
    return torch.cat(pictures), captions, counts


def tokenizer_of(captions: list[str], clip: bool) -> Any:
    """Word by word; the 2,000 most frequent words, the others are <unk>. ``clip``: with start and end around a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    found = Counter(w for c in captions for w in c.split())
    words = ["<pad>", "<unk>", "<bos>", "<eos>", "<image>"]  # the end is 3: CLIP reads an end of 2 otherwise
    words += sorted({"user", "assistant", ":", ".", ",", *ASKED.split(), *(w for w, _ in found.most_common(WORDS))})
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if clip else "<bos> $A", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", padding_side="right",
        additional_special_tokens=["<image>"], model_max_length=160, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train_clip(pictures: Tensor, captions: list[str], steps: int, seed: int) -> tuple[Any, Any, Any]:
    """(CLIPModel, image processor, tokenizer) after ``steps`` of contrast, batches of 256; equal captions count as matching."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer, side = tokenizer_of(captions, True), {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2
    )
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH, "hidden_act": "gelu"}  # fmt: skip
    text = tower | {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
    config = CLIPConfig(
        text_config=text, vision_config=tower | {"num_hidden_layers": 5, "image_size": SIZE, "patch_size": PATCH}, projection_dim=WIDTH
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "open clip"))
        model = CLIPModel(config)
    kinds = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    kind, texts = torch.tensor([kinds[c] for c in captions]), list(kinds)
    draws, optimiser = stream(seed, "open clip"), torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        batch = torch.randint(len(captions), (256,), generator=draws)
        x = augment(pictures[batch].float() / 127.5 - 1, draws, padding=4, flip=True, mode="sample")
        there, place = kind[batch].unique(return_inverse=True)  # a caption that several pictures share is read once
        words = tokenizer([texts[k] for k in there.tolist()], padding=True, truncation=True, max_length=32, return_tensors="pt")  # fmt: skip
        u = model.get_image_features(pixel_values=x).pooler_output
        v = model.get_text_features(**words).pooler_output[place]
        logits = model.logit_scale.exp().clamp(max=100) * F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
        same = (kind[batch][:, None] == kind[batch][None]).float()
        same = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
        _update(model, optimiser, loss, learning_rate(step, steps, 1e-3))
        if (step + 1) % 100 == 0:
            say(f"clip {step + 1}/{steps} loss {float(loss.detach()):.3f} seconds {time.perf_counter() - started:.0f}")
    return model.eval(), processor, tokenizer


def _update(model: Any, optimiser: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimiser.step()


def train_llava(clip: Any, processor: Any, pictures: Tensor, captions: list[str], steps: int, layers: int, seed: int) -> tuple[Any, Any]:  # fmt: skip
    """(LlavaForConditionalGeneration, LlavaProcessor) around the frozen tower, after ``steps`` batches of 64 captions."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer, tokens = tokenizer_of(captions, False), (SIZE // PATCH) ** 2
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=layers, num_attention_heads=4,
            max_position_embeddings=256, bos_token_id=2, eos_token_id=3, pad_token_id=0, tie_word_embeddings=False,
        ),
        image_token_id=4, vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=tokens,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "open llava"))
        model = LlavaForConditionalGeneration(config)
    tower = model.model.vision_tower
    known = {k.removeprefix("vision_model."): v for k, v in clip.state_dict().items() if k.startswith("vision_model.")}
    tower.load_state_dict({k: known[k.removeprefix("vision_model.")] for k in tower.state_dict()})
    tower.requires_grad_(False)
    draws = stream(seed, "open llava")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.01)
    started = time.perf_counter()
    model.train()
    for step in range(steps):
        batch = torch.randint(len(captions), (64,), generator=draws).tolist()
        said = [conversation_ids(tokenizer, [(ASKED, captions[i])], tokens) for i in batch]
        longest = max(len(ids) for ids, _ in said)
        ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in said])
        labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y in said])
        x = pictures[batch].float() / 127.5 - 1
        loss = model(input_ids=ids, pixel_values=x, attention_mask=(ids != 0).long(), labels=labels).loss
        _update(model, optimiser, loss, learning_rate(step, steps, 2e-3))
        if (step + 1) % 100 == 0:
            say(f"llava {step + 1}/{steps} loss {float(loss.detach()):.3f} seconds {time.perf_counter() - started:.0f}")
    return model.eval(), LlavaProcessor(
        image_processor=processor, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip


def write_corpus(folder: Path, pictures: Tensor, captions: list[str]) -> None:
    """PNG files and records.json, which is written last."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, x in enumerate(pictures):
        path = folder / f"images/{i:06d}.png"
        if not path.exists():
            write_atomic(path, png(x))
    turns = [(Turn("human", f"<image>\n{ASKED}"), Turn("gpt", c)) for c in captions]
    save([Record(str(i), f"images/{i:06d}.png", t, "caption") for i, t in enumerate(turns)], folder / "records.json")


def main() -> None:
    """Gather, train what is not there yet, write the card."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--open", choices=list(FOR), required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--limit", type=int, help="at most so many pictures of each source")
    p.add_argument("--clip-steps", type=int, default=1_500)
    p.add_argument("--llava-steps", type=int, default=800)
    p.add_argument("--layers", type=int, default=2, help="of LLaVA's language model")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    bridge_torchvision()
    started = time.process_time()
    pictures, captions, counts = gathered(args.open, args.limit)
    _, test = load_cifar(FOR[args.open], None, SIZE)
    test_prints = set(pixel_hashes(test))
    from mllm_fl.data.images import ImageSet, MemoryPixels

    own = pixel_hashes(ImageSet("open", MemoryPixels(pictures), torch.zeros(len(pictures), dtype=torch.int64).numpy(), ("x",)))  # fmt: skip
    keep = torch.tensor([h not in test_prints for h in own])
    dropped = int((~keep).sum())
    pictures, captions = pictures[keep], [c for c, k in zip(captions, keep.tolist(), strict=True) if k]
    if not (args.out / "corpus/records.json").exists():
        write_corpus(args.out / "corpus", pictures, captions)
    if not (args.out / "mini-clip/model.safetensors").exists():
        for part in reversed(train_clip(pictures, captions, args.clip_steps, args.seed)):
            part.save_pretrained(args.out / "mini-clip")
    clip = load_clip(str(args.out / "mini-clip"))
    if not (args.out / "mini-llava/model.safetensors").exists():
        for part in reversed(
            train_llava(clip.model, clip.processor, pictures, captions, args.llava_steps, args.layers, args.seed)
        ):
            part.save_pretrained(args.out / "mini-llava")
    card = {
        "seen": counts, "left out as test images": dropped, "distinct captions": len(set(captions)), "for": FOR[args.open],
        "clip steps": args.clip_steps, "llava steps": args.llava_steps, "seed": args.seed, "cpu seconds of this call": round(time.process_time() - started),
        "patch": PATCH, "layers": args.layers, "torch": torch.__version__,
    }  # fmt: skip
    if not (args.out / "CARD.json").exists():
        write_atomic(args.out / "CARD.json", (json.dumps(card, indent=1) + "\n").encode())
    print(json.dumps(card))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        say(str(e))
        sys.exit(2)
