"""D_align by name: what each source gives, that it fits the clients' images, and that no test image slips in. With MLLM_FL_DATA, on CIFAR-10."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests import toy
from tests.data.pictures import write_folder

from mllm_fl.data.check import known, leaks, pixel_hashes
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import Federation, build
from mllm_fl.data.images import ImageSet, Joined
from mllm_fl.errors import UserError
from mllm_fl.stages.align import AlignConfig, make_aligner
from mllm_fl.stages.alignment_images import alignment_set, dealt, in_domain


def brightest(images: ImageSet) -> torch.Tensor:
    """A teacher that looks at which channel is brightest: the toy's classes."""
    return images.read(range(len(images))).float().mean((2, 3)) / 10


def save(images: ImageSet, folder: Path, by_class: bool) -> Path:
    for i, (x, y) in enumerate(zip(images.read(range(len(images))), images.labels, strict=True)):
        place = folder / images.class_names[y] if by_class else folder / "images"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(place / f"{i:05}.png")
    return folder


def test_open_images_are_collected_by_what_the_teacher_takes_them_for(tmp_path: Path) -> None:
    fed = toy.federation()
    web = toy.images(6, seed=5)
    folder = save(web, tmp_path / "corpus", by_class=False)
    images = alignment_set(AlignConfig(source=f"open:{folder}", per_class=2), fed, DataConfig(), brightest)
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2] and images.class_names == fed.class_names
    p = brightest(web).softmax(1)
    stored = pixel_hashes(web)
    for c in range(3):  # the two surest of those that are likest to the class, the surest first
        mine = [i for i in range(len(web)) if int(p[i].argmax()) == c]
        best = sorted(mine, key=lambda i: -float(p[i, c]))[:2]
        assert pixel_hashes(images)[2 * c : 2 * c + 2] == [stored[i] for i in best]
    assert (images.mean, images.std) == (fed.train.mean, fed.train.std)
    assert images.name == "corpus, collected by the teacher, 2 a class"
    with pytest.raises(
        UserError, match=r"\d of 18 images in .*corpus are likest to 'class 0', 9 asked for; ask for fewer"
    ):
        alignment_set(AlignConfig(source=f"open:{folder}", per_class=9), fed, DataConfig(), brightest)
    with pytest.raises(UserError, match="needs a teacher"):
        alignment_set(AlignConfig(source=f"open:{folder}"), fed, DataConfig())
    with pytest.raises(UserError, match="nowhere: holds no image"):
        alignment_set(AlignConfig(source=f"open:{tmp_path}/nowhere"), fed, DataConfig(), brightest)


def test_a_broken_open_image_is_named(tmp_path: Path) -> None:
    folder = save(toy.images(2, seed=5), tmp_path / "corpus", by_class=False)
    (folder / "images" / "00001.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError, match="00001.png") as found:
        alignment_set(AlignConfig(source=f"open:{folder}", per_class=1), toy.federation(), DataConfig(), brightest)
    assert "\n" not in str(found.value)


def test_whether_d_align_is_in_domain_follows_from_its_source_unless_said() -> None:
    asked = {"leftover": True, "val": True, "glyphs": False, "open:x": False, "folder:x": None, "hf:x": None}
    assert {s: in_domain(AlignConfig(source=s)) for s in asked} == asked
    assert in_domain(AlignConfig(source="folder:x", in_domain=True)) is True
    assert in_domain(AlignConfig(source="leftover", in_domain=False)) is False


def test_a_folder_that_lacks_a_class_or_names_it_otherwise_is_one_line(tmp_path: Path) -> None:
    fed = toy.federation()
    write_folder(tmp_path, {"class 0": 2, "Class 1": 2, "class 2": 2})
    with pytest.raises(UserError, match="has no class 'class 1'; one folder a class, same names"):
        alignment_set(AlignConfig(source=f"folder:{tmp_path}", per_class=1), fed, DataConfig())


def test_dealt_to_the_clients_every_image_lies_at_one_of_them() -> None:
    fed = toy.federation(imbalance=4)
    extra = toy.images(4, seed=9, name="extra")
    both = dealt(fed, extra)
    assert sum(both.population) == sum(fed.population) + 12 and len(both.clients) == len(fed.clients)
    assert both.class_counts == [a + 4 for a in fed.class_counts]
    new = [[h for h in pixel_hashes(both.client(k)) if h not in set(pixel_hashes(fed.client(k)))] for k in range(4)]
    assert [h for row in zip(*new, strict=True) for h in row] == pixel_hashes(extra)  # one by one
    assert sorted(pixel_hashes(both.leftover)) == sorted(pixel_hashes(fed.leftover))
    assert both.manifest.sha256 != fed.manifest.sha256 and both.test is fed.test
    assert torch.equal(both.train.read([61, 0]), torch.cat([extra.read([1]), fed.train.read([0])]))
    with pytest.raises(UserError, match="virtual clients cannot be dealt images"):
        dealt(dataclasses.replace(fed, manifest=dataclasses.replace(fed.manifest, partition="virtual")), extra)


def test_joined_pixels_are_read_in_any_order() -> None:
    a, b = toy.images(2, seed=1), toy.images(1, seed=2)
    both = Joined((a.pixels, b.pixels))
    assert len(both) == 9 and both.read([]).shape == (0, 3, 8, 8)
    assert torch.equal(both.read([7, 0, 8, 5]), torch.cat([b.read([1]), a.read([0]), b.read([2]), a.read([5])]))
    assert [p[0].tobytes() for p in both.pairs([6, 1])] == [
        next(b.pairs([0]))[0].tobytes(),
        next(a.pairs([1]))[0].tobytes(),
    ]


@pytest.fixture(scope="module")
def cifar() -> tuple[DataConfig, Federation]:
    data = DataConfig(source="cifar10", imbalance_factor=100)
    return data, build(data)


@pytest.mark.data
def test_the_sources_on_cifar(cifar: tuple[DataConfig, Federation], tmp_path: Path) -> None:
    """Leftovers, a folder and a hub data set of real images: balanced, of the clients' form, none a client's but where the name says so, none of the test set."""
    data, fed = cifar
    test, held = known(fed.test), set(pixel_hashes(fed.subset))
    left = alignment_set(AlignConfig(per_class=100), fed, data)
    assert left.class_counts() == [100] * 10 and left.name.endswith("(100 of them also at clients), 100 a class")
    assert sum(h in held for h in pixel_hashes(left)) == 100  # airplanes: the long tail keeps all of them
    few = left.subset([i for c in range(10) for i in range(100 * c, 100 * c + 3)])
    folder = save(few, tmp_path / "web", by_class=True)
    found = alignment_set(AlignConfig(source=f"folder:{folder}", per_class=3), fed, data)
    assert sorted(pixel_hashes(found)) == sorted(pixel_hashes(few)) and found.labels.tolist() == few.labels.tolist()
    hub = f"hf:{Path(os.environ['MLLM_FL_DATA']) / 'cifar10'}"
    drawn = alignment_set(AlignConfig(source=hub, per_class=2), fed, data)
    assert drawn.class_counts() == [2] * 10 and set(pixel_hashes(drawn)) <= set(pixel_hashes(fed.train))
    for images in (left, found, drawn):
        assert leaks(images, test) == 0 and (images.mean, images.std) == (fed.train.mean, fed.train.std)
    copied = save(fed.test.subset(np.flatnonzero(fed.test.labels == 0)[:3].tolist()), tmp_path / "web", by_class=True)
    again = alignment_set(AlignConfig(source=f"folder:{copied}", per_class=3, seed=1), fed, data)
    assert leaks(again, test) == sum(h in set(pixel_hashes(fed.test)) for h in pixel_hashes(again)) > 0


@pytest.mark.data
def test_open_images_on_cifar_are_collected_with_the_labels_that_the_teacher_gives(
    cifar: tuple[DataConfig, Federation], tmp_path: Path
) -> None:
    data, fed = cifar
    pool = alignment_set(AlignConfig(per_class=6, seed=3), fed, data)
    folder = save(pool, tmp_path / "open", by_class=False)
    order = torch.from_numpy(pool.labels)

    def teacher(images: ImageSet) -> torch.Tensor:
        assert pixel_hashes(images) == pixel_hashes(pool)  # the files' order
        return 4 * F.one_hot((order + 1) % 10, 10).float()  # it takes every airplane for an automobile

    images = alignment_set(AlignConfig(source=f"open:{folder}", per_class=5), fed, data, teacher)
    assert images.class_counts() == [5] * 10
    by_hash = dict(zip(pixel_hashes(pool), pool.labels.tolist(), strict=True))
    assert [(by_hash[h] + 1) % 10 for h in pixel_hashes(images)] == images.labels.tolist()
    aligner = make_aligner(AlignConfig(), images, lambda s: 4 * F.one_hot(torch.from_numpy(s.labels), 10).float())
    assert aligner.zero_shot == 1.0 and aligner.x.shape == (50, 3, 32, 32)
