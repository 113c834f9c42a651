"""A small LLaVA that can say something about photographs and drawn shapes: ``python scripts/open_annotator.py --out FOLDER``.

It stands in for a real multimodal LLM where none can be had, so that a corpus of thousands of real images is annotated, checked and reviewed
through the same commands; what it says is often wrong, and the corpus card says how often. The vision tower is that of scripts/cifar_teacher.py (frozen). Projector
and language model learn from three sources: CIFAR-100's training images up to number 40,000 with sentences made
from their labels, easy-VQA's 4,000 training images with their questions, Flickr8k's 6,000 training photos with their captions. As LLaVA they learn in two stages:
the picture and then its caption, without an instruction (``--plain`` steps of 64: short texts, where most of the time goes into learning to look), then our own
instructions (annotate/prompts.py; ``--steps`` of 16). Without the first stage it wrote one sentence under most pictures: docs/LOG.md. The images that
scripts/open_corpus.py annotates are none of these.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from mllm_fl.annotate.objects import everyday
from mllm_fl.annotate.prompts import INSTRUCT
from mllm_fl.annotate.records import IMAGE
from mllm_fl.data.cifar import data_root
from mllm_fl.data.decode import fit, to_array, to_rgb
from mllm_fl.models.bridge import bridge_torchvision
from mllm_fl.models.teacher.clip import load_clip
from mllm_fl.models.teacher.recipe import learning_rate
from mllm_fl.seeds import numpy_stream, seed_of, stream

CIFAR_SEEN = 40_000  # training images of CIFAR-100 before this number teach, those after it may be annotated
PROBE = "Is there {} in the picture? Answer yes or no."
WORDS, WIDTH, LAYERS, SIZE, PATCH = 2_000, 128, 3, 32, 4
KINDS = (
    "caption",
    "probe",
)  # what it learns; "conversation" and "detail" are prepared too, and cost three times the time
Draw = np.random.Generator


def article(thing: str) -> str:
    """``"oak tree"`` -> ``"an oak tree"``."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


@dataclass(frozen=True)
class Source:
    """Encoded pictures and what can be said about the i-th: (kind, draw) -> (question or "", answer)."""

    pictures: list[bytes]
    say: Callable[[int, str, Draw], tuple[str, str]]


def rows(root: Path, name: str, split: str) -> list[dict[str, Any]]:
    """All rows of a split in Hugging Face's Parquet form."""
    found: list[dict[str, Any]] = pq.read_table(root / name / f"{split}-00000-of-00001.parquet").to_pylist()
    return found


def pixels(content: bytes) -> Tensor:
    """uint8 (3, 32, 32): decoded at the tower's size."""
    return torch.from_numpy(to_array(fit(to_rgb(content), SIZE)).copy())


def dialogue(*pairs: tuple[str, str]) -> str:
    """The JSON that our conversation prompt asks for."""
    return json.dumps({"turns": [{"question": q, "answer": a} for q, a in pairs]})


def cifar(root: Path) -> Source:
    """Photographs of 100 things in 20 groups."""
    found = rows(root, "cifar100", "train")[:CIFAR_SEEN]
    features = json.loads(pq.read_schema(root / "cifar100" / "train-00000-of-00001.parquet").metadata[b"huggingface"])[
        "info"
    ]["features"]
    names = [n.replace("_", " ") for n in features["fine_label"]["names"]]
    groups = [n.replace("_", " ").rstrip(" 12") for n in features["coarse_label"]["names"]]

    def say(i: int, kind: str, draw: Draw) -> tuple[str, str]:
        thing, group = names[found[i]["fine_label"]], groups[found[i]["coarse_label"]]
        other = names[int(draw.integers(100))]
        if kind == "caption":
            return "", f"A photo of {article(thing)}."
        if kind == "detail":
            return (
                "",
                f"The picture shows {article(thing)}. It belongs to the group of {group}. Nothing else can be made out.",
            )
        if kind == "conversation":
            there = "Yes." if other == thing else "No."
            return "", dialogue(("What is in the picture?", f"It is {article(thing)}."), ("What kind of thing is it?", f"It belongs to the group of {group}."),
                                (f"Is there {article(other)} in the picture?", there))  # fmt: skip
        yes = draw.random() < 0.5
        return PROBE.format(
            article(thing if yes or other == thing else other)
        ), "Yes." if yes or other == thing else "No."

    return Source([r["img"]["bytes"] for r in found], say)


SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")


def shapes(root: Path) -> Source:
    """Drawn shapes: colour and form are taken from the questions' answers."""
    found = rows(root, "easy_vqa", "train")

    def say(i: int, kind: str, draw: Draw) -> tuple[str, str]:
        form, colour = scene(found[i]["qa"])
        what = " ".join(w for w in (colour, form or "shape") if w)
        asked = [(q["question"].capitalize(), f"{q['answer'].capitalize()}.") for q in found[i]["qa"]]
        if kind == "caption":
            return "", f"A drawing of {article(what)}."
        if kind == "detail":
            return "", f"The picture shows {article(what)} on a light ground. Nothing else can be made out."
        if kind == "conversation":
            first = ("What is in the picture?", f"It is {article(what)}.")
            return "", dialogue(first, *(asked[int(j)] for j in draw.integers(len(asked), size=2)))
        if draw.random() < 0.5:
            return asked[int(draw.integers(len(asked)))]
        other = (SHAPES if form and draw.random() < 0.5 else COLOURS)[int(draw.integers(3))]
        if not colour or not form:
            return asked[0]
        if other in SHAPES:
            return PROBE.format(article(other)), "Yes." if other == form else "No."
        return PROBE.format(article(f"{other} shape")), "Yes." if other == colour else "No."

    return Source([r["image"]["bytes"] for r in found], say)


def scene(qa: list[dict[str, str]]) -> tuple[str, str]:
    """(form, colour) of an easy-VQA picture, empty where no question tells."""
    answers = [q["answer"] for q in qa]
    words = [*answers, *(w for q in qa if q["question"].startswith("what") for w in q["question"].strip("?").split())]
    return next((w for w in words if w in SHAPES), ""), next((w for w in words if w in COLOURS), "")


def photos(root: Path) -> Source:
    """Flickr8k: five captions by people for each photograph."""
    found = rows(root, "flickr8k", "train")
    texts = [[c.strip().rstrip(" .").strip() + "." for c in r["captions"] if len(c.split()) > 3] for r in found]
    things = [sorted({t for c in r["captions"] for t in everyday().named(c)}) for r in found]
    common = sorted({t for ts in things for t in ts})

    def say(i: int, kind: str, draw: Draw) -> tuple[str, str]:
        first, second = (texts[i][int(j)] for j in draw.permutation(len(texts[i]))[:2])
        there = bool(things[i]) and draw.random() < 0.5
        pool = (
            things[i]
            if there
            else [t for t in (things[int(draw.integers(len(things)))] or common) if t not in things[i]] or common
        )
        thing = pool[int(draw.integers(len(pool)))]
        probe = PROBE.format(article(thing)), "Yes." if thing in things[i] else "No."
        if kind == "caption":
            return "", first
        if kind == "detail":
            return "", f"{first} {second}"
        return ("", dialogue(("What can be seen?", first), probe)) if kind == "conversation" else probe

    return Source([r["image"]["bytes"] for r in found], say)


def sample(source: Source, i: int, kind: str, draw: Draw) -> tuple[str, str]:
    """(prompt in LLaVA's form with one <image>, answer) of a picture; of the kind "plain" the picture alone, and its caption."""
    if kind == "plain":
        return IMAGE, f" {source.say(i, 'caption', draw)[1]}"
    question, answer = source.say(i, kind, draw)
    system = ""
    if kind != "probe":
        prompt = INSTRUCT[kind]
        wording = prompt.variants[int(draw.integers(len(prompt.variants)))]
        question, system = wording[0], prompt.system
    return f"{system} USER: {IMAGE}\n{question} ASSISTANT:".strip(), f" {answer}"


def make_tokenizer(texts: Iterator[str]) -> Any:
    """A byte-level BPE of ``WORDS`` pieces: everything can be said, JSON too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<unk>", "<bos>", "<eos>", IMAGE]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=[IMAGE], model_max_length=512, padding_side="right", clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def build(clip: Any, tokenizer: Any, seed: int) -> Any:
    """LlavaForConditionalGeneration behind the CLIP's vision tower, which is frozen."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=512, bos_token_id=2, eos_token_id=3, pad_token_id=0, tie_word_embeddings=False,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE), vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=(SIZE // PATCH) ** 2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "open annotator init"))
        model = LlavaForConditionalGeneration(config)
    tower, saved = model.model.vision_tower, clip.state_dict()
    nested = any(k.startswith("vision_model.") for k in tower.state_dict())
    tower.load_state_dict(
        {k if nested else k.removeprefix("vision_model."): v for k, v in saved.items() if k.startswith("vision_model.")}
    )
    tower.requires_grad_(False)
    return model


def train(
    model: Any, tokenizer: Any, sources: list[Source], share: list[float], kinds: tuple[str, ...], steps: int, batch: int, seed: int
) -> list[float]:  # fmt: skip
    """AdamW 2e-3, cosine with warm-up, bf16 autocast; returns the mean loss of each 50 steps."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.95))
    draw, flips = numpy_stream(seed, "open annotator batches", *kinds), stream(seed, "open annotator flips", *kinds)
    log, losses, started = [], [], time.perf_counter()
    model.train()
    for step in range(steps):
        kind = kinds[int(draw.integers(len(kinds)))]  # one kind a batch: texts of similar length
        ids, x, longest = [], [], 0
        for s in draw.choice(len(sources), size=batch, p=share):
            i = int(draw.integers(len(sources[s].pictures)))
            prompt, answer = sample(sources[s], i, kind, draw)
            before = tokenizer(prompt.replace(IMAGE, IMAGE * (SIZE // PATCH) ** 2))["input_ids"]
            after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            ids.append((before, after))
            longest = max(longest, len(after))
            x.append(pixels(sources[s].pictures[i]))
        width = max(
            len(b) + len(a) for b, a in ids
        )  # padded on the left: all answers end the row, and only their logits are computed
        padded = torch.tensor([[0] * (width - len(b) - len(a)) + b + a for b, a in ids])
        wanted = torch.tensor([[-100] * (longest - len(a)) + a for _, a in ids])
        values = torch.stack(x).float() / 127.5 - 1
        mirrored = torch.rand(batch, 1, 1, 1, generator=flips) < 0.5
        values = torch.where(mirrored, values.flip(-1), values)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(
                input_ids=padded, pixel_values=values, attention_mask=(padded != 0).long(), logits_to_keep=longest + 1
            ).logits
        loss = F.cross_entropy(out[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=-100)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 2e-3)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            log.append(round(sum(losses[-50:]) / 50, 4))
            print(
                f"{kinds[0]} {step + 1}/{steps} loss {log[-1]} seconds {time.perf_counter() - started:.0f}",
                file=sys.stderr,
                flush=True,
            )
    return log


def main() -> None:
    """Train on one thread, save in Hugging Face's layout, write the card last."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument(
        "--tower", default="runs/cifar-clip", help="a CLIP by scripts/cifar_teacher.py (default: runs/cifar-clip)"
    )
    p.add_argument("--plain", type=int, default=500, help="steps of 64 pictures with their captions alone, first")
    p.add_argument("--steps", type=int, default=300, help="steps of --batch pictures with instructions")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if (args.out / "CARD.json").exists():
        print(f"{args.out}: there already")
        return
    torch.set_num_threads(1)
    bridge_torchvision()
    from transformers import LlavaProcessor

    root = Path(data_root(None, "cifar100"))
    clip = load_clip(args.tower)
    sources = [cifar(root), shapes(root), photos(root)]
    draw = numpy_stream(args.seed, "open annotator words")
    texts = (
        "".join(sample(s, int(draw.integers(len(s.pictures))), KINDS[n % len(KINDS)], draw))
        for s in sources
        for n in range(3_000)
    )
    tokenizer = make_tokenizer(texts)
    model = build(clip.model, tokenizer, args.seed)
    started, spent = time.perf_counter(), time.process_time()
    share = [0.45, 0.2, 0.35]
    log = train(model, tokenizer, sources, share, ("plain",), args.plain, 64, args.seed) if args.plain else []
    log += train(model, tokenizer, sources, share, KINDS, args.steps, args.batch, args.seed)
    processor = LlavaProcessor(
        image_processor=clip.processor, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", image_token=IMAGE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    new = args.out.with_name(args.out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    model.eval().save_pretrained(new)
    processor.save_pretrained(new)
    card = {
        "taught by": "CIFAR-100 train rows 0-39,999 (labels), easy-VQA train (questions), Flickr8k train (captions)", "tower": clip.fingerprint,
        "prompts": {k: v.version for k, v in INSTRUCT.items() if k in KINDS}, "plain steps": args.plain, "steps": args.steps, "batch": args.batch, "seed": args.seed,
        "loss per 50 steps": log, "seconds": round(time.perf_counter() - started), "cpu seconds": round(time.process_time() - spent), "torch": torch.__version__,
    }  # fmt: skip
    (new / "CARD.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(args.out, ignore_errors=True)
    new.rename(args.out)
    print(json.dumps(card))


if __name__ == "__main__":
    main()
