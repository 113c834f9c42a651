"""The teacher's logits: what the definition says, computed once a set, in another file for another anything, again when damaged."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from tests import toy
from torch import Tensor

from mllm_fl.data.digits import load_digits
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError
from mllm_fl.models.teacher.clip import load_clip
from mllm_fl.models.teacher.logits import logits_key, teacher_logits

NAMES = ("red", "green", "blue")


@dataclasses.dataclass
class Counting:
    """A teacher that embeds an image by its mean colour and a class by a fixed axis, and counts the images that it is shown."""

    templates: tuple[str, ...] = ("a photo of a {}",)
    fingerprint: str = "one"
    logit_scale: float = 10.0
    shown: int = 0
    broken: bool = False

    def encode_images(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        return F.normalize(images.float().mean((2, 3)), dim=1) * (float("nan") if self.broken else 1)

    def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        return torch.eye(3)[: len(class_names)]


def test_logits_by_their_definition(tmp_path: Path) -> None:
    images = toy.images(4)
    got = teacher_logits(Counting(), images, NAMES, tmp_path)
    assert torch.equal(got, 10 * F.normalize(images.read(range(12)).float().mean((2, 3)), dim=1))
    assert got.dtype == torch.float32 and (got.argmax(1) == torch.from_numpy(images.labels)).all()


def test_the_bundled_clip_agrees_with_its_own_zero_shot(tmp_path: Path) -> None:
    clip, images = load_clip("mini"), load_digits(16)[1].subset(range(260))  # more than one batch
    got = teacher_logits(clip, images, images.class_names, tmp_path)
    assert torch.allclose(got, clip.zero_shot(images.read(range(260)), images.class_names), atol=1e-3)
    assert torch.equal(got, teacher_logits(clip, images, images.class_names, tmp_path))


def test_every_image_is_shown_once_whoever_asks(tmp_path: Path) -> None:
    teacher = Counting()
    first = teacher_logits(teacher, toy.images(4), NAMES, tmp_path / "new" / "folder")
    again = Counting()
    assert torch.equal(teacher_logits(again, toy.images(4), NAMES, tmp_path / "new" / "folder"), first)
    assert (teacher.shown, again.shown) == (12, 0)


def test_a_finished_file_is_read_without_touching_the_folder(tmp_path: Path) -> None:
    teacher_logits(Counting(), toy.images(4), NAMES, tmp_path)
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    teacher_logits(Counting(), toy.images(4), NAMES, tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


def test_two_that_ask_at_once_compute_once(tmp_path: Path) -> None:
    both, shown = threading.Barrier(2), list[int]()

    class Slow(Counting):
        def class_embeddings(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
            time.sleep(0.2)  # the other one is waiting for the lock by now
            return super().class_embeddings(class_names, templates)

    def ask() -> Tensor:
        teacher = Slow()
        both.wait()
        logits = teacher_logits(teacher, toy.images(4), NAMES, tmp_path)
        shown.append(teacher.shown)
        return logits

    with ThreadPoolExecutor(2) as pool:
        first, second = (asked.result() for asked in [pool.submit(ask), pool.submit(ask)])
    assert torch.equal(first, second) and sorted(shown) == [0, 12]


def one_pixel_other(images: ImageSet) -> ImageSet:
    x = images.read(range(len(images))).clone()
    x[3, 0, 0, 0] ^= 1
    return dataclasses.replace(images, pixels=dataclasses.replace(images.pixels, tensor=x))  # type: ignore[type-var]


IMAGES = toy.images(4)
OTHERS: dict[str, Callable[[Path], Tensor]] = {
    "teacher": lambda p: teacher_logits(Counting(fingerprint="two", logit_scale=5.0), IMAGES, NAMES, p),
    "prompts": lambda p: teacher_logits(Counting(), IMAGES, NAMES, p, ("a drawing of a {}",)),
    "class names": lambda p: teacher_logits(Counting(), IMAGES, ("red", "green", "violet"), p),
    "number of classes": lambda p: teacher_logits(Counting(), IMAGES, NAMES[:2], p),
    "one pixel": lambda p: teacher_logits(Counting(), one_pixel_other(IMAGES), NAMES, p),
    "order": lambda p: teacher_logits(Counting(), IMAGES.subset(range(11, -1, -1)), NAMES, p),
    "a subset": lambda p: teacher_logits(Counting(), IMAGES.subset(range(5)), NAMES, p),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_anything_is_another_file(what: str, tmp_path: Path) -> None:
    teacher_logits(Counting(), IMAGES, NAMES, tmp_path)
    fresh = OTHERS[what](tmp_path / "fresh")
    assert torch.equal(OTHERS[what](tmp_path), fresh)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_what_does_not_matter_does_not_count() -> None:
    """Labels, the set's name, the normalisation, and prompts that are written out although they are the teacher's own."""
    other = dataclasses.replace(IMAGES, name="other", labels=np.zeros_like(IMAGES.labels), mean=(0.1, 0.2, 0.3))
    assert logits_key(Counting(), IMAGES, NAMES) == logits_key(Counting(), other, NAMES, ("a photo of a {}",))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": _flip,
    "another form": lambda path: path.write_bytes(save({"logits": torch.zeros(12, 3)})),
    "no logits": lambda path: path.write_bytes(save({"x": torch.zeros(12, 3)})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path) -> None:
    wanted = teacher_logits(Counting(), IMAGES, NAMES, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    DAMAGES[damage](path)
    teacher = Counting()
    assert torch.equal(teacher_logits(teacher, IMAGES, NAMES, tmp_path), wanted)
    assert teacher.shown == 12 and path.read_bytes() == whole
    assert [p.suffix for p in sorted(tmp_path.iterdir())] == [".safetensors", ".lock"]  # nothing half-written


def test_a_file_of_another_key_under_this_name_is_not_believed(tmp_path: Path) -> None:
    teacher_logits(Counting(), IMAGES, NAMES, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    OTHERS["prompts"](tmp_path)
    (other,) = set(tmp_path.glob("*.safetensors")) - {path}
    other.replace(path)
    teacher = Counting()
    teacher_logits(teacher, IMAGES, NAMES, tmp_path)
    assert teacher.shown == 12


def test_no_images_are_no_rows(tmp_path: Path) -> None:
    assert teacher_logits(Counting(), IMAGES.subset([]), NAMES, tmp_path).shape == (0, 3)


def test_a_broken_teacher_and_a_folder_that_is_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="teacher: zero-shot logits of toy are not finite"):
        teacher_logits(Counting(broken=True), IMAGES, NAMES, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: the teacher's logits cannot be cached \(File exists\); choose"):
        teacher_logits(Counting(), IMAGES, NAMES, tmp_path / "file")
