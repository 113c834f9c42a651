"""A small CLIP for CIFAR-10, where no real CLIP can be had: ``python scripts/cifar_teacher.py --out FOLDER``.

A surrogate, and every table that uses it says so. It is trained by contrast between images and "a photo of a {class}", as transformers' CLIPModel with
a ViT, or, ``--tower cnn``, as an open_clip model with timm's resnet10t on images of 48 pixels, which learns more in a quarter of the time,
on the CIFAR-10 training images *outside* the long tail (imbalance 100, the federation of experiments/methods_r.toml). The long tail keeps all 5,000
airplanes, so airplanes it must see from the clients' images: a real CLIP has seen airplanes too, but this one has seen theirs. It never sees a test image; its
zero-shot accuracy on the test images is measured once, at the end, and written to FOLDER/CARD.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllm_fl.data.augment import augment
from mllm_fl.data.check import pixel_hashes
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation, build
from mllm_fl.data.images import ImageSet
from mllm_fl.data.strong import DRAWS, strong_view
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.clip import load_clip
from mllm_fl.models.teacher.recipe import learning_rate
from mllm_fl.seeds import seed_of, stream
from mllm_fl.stages.align import AlignConfig
from mllm_fl.stages.alignment_images import alignment_set

PROMPT = "a photo of a {}"
DATA = DataConfig(source="cifar10", imbalance_factor=100, partition="creff", alpha=0.5, clients=20)


def pictures(federation: Federation, apart: bool = False) -> ImageSet:
    """All images that no client holds, and the held ones of classes that have none left; ``apart``: none of stage 3's D_align by default."""
    free = set(range(len(federation.train))) - {i for client in federation.clients for i in client}
    without = set(range(len(federation.class_names))) - {int(federation.train.labels[i]) for i in free}
    held = {i for i, y in enumerate(federation.train.labels.tolist()) if y in without}
    images = federation.train.subset(sorted(free | held), "outside the long tail")
    if not apart:
        return images
    taken = set(pixel_hashes(alignment_set(AlignConfig(), federation, DATA)))
    kept = [i for i, h in enumerate(pixel_hashes(images)) if h not in taken]
    return images.subset(kept, "outside the long tail and D_align")


def make_tokenizer(names: tuple[str, ...]) -> Any:
    """A word-level tokenizer over the prompt's and the classes' words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<bos>", "<eos>", *sorted({w for n in names for w in PROMPT.format(n).lower().split()})]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        model_max_length=16, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@dataclass(frozen=True)
class Student:
    """``images``: (n, 3, 32, 32) in [-1, 1] -> (n, d); ``texts``: the classes' (C, d), anew each step; ``scale``: logits a cosine; ``save``: to a folder."""

    model: nn.Module
    images: Callable[[Tensor], Tensor]
    texts: Callable[[], Tensor]
    scale: nn.Parameter
    save: Callable[[Path], None]


def vit(names: tuple[str, ...], width: int, layers: int, seed: int) -> Student:
    """transformers' CLIPModel: patches of 4 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = make_tokenizer(names)
    processor = CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=False,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True, resample=3,
    )  # fmt: skip
    tower = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "projection_dim": width, "hidden_act": "gelu",
    }  # fmt: skip
    config = CLIPConfig(
        text_config=tower | {
            "num_hidden_layers": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
            "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
        },
        vision_config=tower | {"num_hidden_layers": layers, "image_size": 32, "patch_size": 4},
        projection_dim=width, attn_implementation="eager",  # the fused one is slower at this width in bf16 on one core
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "cifar teacher init"))
        model: Any = CLIPModel(config)
    tokens = tokenizer([PROMPT.format(n) for n in names], padding=True, return_tensors="pt")

    def save(folder: Path) -> None:
        for part in (model, processor, tokenizer):
            part.save_pretrained(folder)

    return Student(
        model, lambda x: model.get_image_features(pixel_values=x).pooler_output,
        lambda: model.get_text_features(**tokens).pooler_output, model.logit_scale, save,
    )  # fmt: skip


def cnn(names: tuple[str, ...], width: int, layers: int, seed: int) -> Student:
    """open_clip's model with timm's resnet10t for images and ``layers`` of a text transformer; saved as open_clip does for a hub."""
    import open_clip
    from safetensors.torch import save_file

    network = {
        "embed_dim": width,
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": 48},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": layers},
    }  # fmt: skip
    seen = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "cifar teacher init"))
        model: Any = open_clip.CLIP(**network)
    model.visual.to(memory_format=torch.channels_last)
    tokens = open_clip.SimpleTokenizer(context_length=16)([PROMPT.format(n) for n in names])

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
        text = json.dumps({"model_cfg": network, "preprocess_cfg": seen}, indent=1)
        (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")

    def images(x: Tensor) -> Tensor:
        x = F.interpolate(x, size=48, mode="bicubic").clamp(-1, 1)
        out: Tensor = model.encode_image(x.contiguous(memory_format=torch.channels_last))
        return out

    return Student(model, images, lambda: model.encode_text(tokens), model.logit_scale, save)


def train(student: Student, images: ImageSet, epochs: int, seed: int) -> None:
    """Batches of 128, AdamW, crop, flip and a strong view of half the batch, bf16 autocast."""
    model = student.model
    y, draws = torch.from_numpy(images.labels), stream(seed, "cifar teacher")
    steps = epochs * (len(y) // 128)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    model.train()
    started, total, step = time.perf_counter(), 0.0, 0
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=draws).split(128)[: steps // epochs]:
            x = images.read(batch.tolist()).float() / 127.5 - 1
            x = augment(x, draws, padding=4, flip=True, mode="sample")
            x = torch.cat([x[:64], strong_view(x[64:], torch.rand(64, DRAWS, generator=draws))])
            with torch.autocast("cpu", torch.bfloat16):
                u, v = student.images(x).float(), student.texts().float()
            logits = student.scale.exp().clamp(max=100) * F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
            loss = F.cross_entropy(logits, y[batch], label_smoothing=0.05)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, 1e-3)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            total, step = total + float(loss.detach()), step + 1
            if step % 100 == 0:
                print(
                    f"step {step}/{steps} loss {total / 100:.3f} seconds {time.perf_counter() - started:.0f}",
                    file=sys.stderr,
                )
                total = 0.0
    model.eval()


def main() -> None:
    """Train on one thread, save in Hugging Face's layout, measure, write the card."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--tower", choices=("vit", "cnn"), default="vit")
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--layers", type=int, default=4, help="of the ViT, or of the text tower beside the CNN")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--apart", action="store_true", help="leave out the images that experiments/alignment_r.toml aligns on"
    )
    args = p.parse_args()
    torch.set_num_threads(1)
    bridge_torchvision()
    federation = build(DATA)
    images = pictures(federation, args.apart)
    started = time.perf_counter()
    student = {"vit": vit, "cnn": cnn}[args.tower](images.class_names, args.width, args.layers, args.seed)
    train(student, images, args.epochs, args.seed)
    student.save(args.out)
    seconds = time.perf_counter() - started
    clip = load_clip(str(args.out) if args.tower == "vit" else f"open_clip:local-dir:{args.out}")
    test = federation.test
    right = clip.zero_shot(test.read(range(len(test))), test.class_names).argmax(1) == torch.from_numpy(test.labels)
    card = {
        "trained on": f"{len(images)} CIFAR-10 training images {images.name}, and the held airplanes",
        "class counts": images.class_counts(), "zero-shot accuracy on the test images": round(float(right.float().mean()), 4),
        "tower": args.tower, "epochs": args.epochs, "seed": args.seed, "seconds": round(seconds), "fingerprint": clip.fingerprint, "torch": torch.__version__,
    }  # fmt: skip
    (args.out / "CARD.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(card))


if __name__ == "__main__":
    main()
