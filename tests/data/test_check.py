"""Broken, duplicate, near-duplicate and leaking images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.pictures import encoded, noise, write_folder, write_parquet
from tests.data.test_cifar import binary_root
from tests.data.test_decode import bomb

from mllm_fl.data.check import check, check_sets, leaks, pixel_hashes, prints
from mllm_fl.data.cifar import load_cifar
from mllm_fl.data.config import DataConfig
from mllm_fl.data.decode import EncodedPixels, FileContents
from mllm_fl.data.digits import load_digits
from mllm_fl.data.federation import build
from mllm_fl.data.folder import all_images
from mllm_fl.data.glyphs import render_glyphs
from mllm_fl.data.hub import load_hub
from mllm_fl.data.images import ImageSet, MemoryPixels
from mllm_fl.data.pack import load_pack, pack
from mllm_fl.errors import UserError


def image_set(name: str, pictures: list[np.ndarray]) -> ImageSet:
    tensor = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
    return ImageSet(name, MemoryPixels(tensor), np.zeros(len(pictures), dtype=np.int64), ("thing",))


def test_leaks_count_images_with_the_pixels_of_a_test_image() -> None:
    test = image_set("test", [noise(1), noise(2)])
    assert leaks(image_set("a", [noise(2), noise(3), noise(2)]), test) == 2
    assert leaks(image_set("a", [noise(3)]), test) == 0
    assert leaks(image_set("a", [noise(1)[:, ::-1]]), test) == 0  # mirrored is another image to an exact check
    assert pixel_hashes(test) == test.hashes()


def test_the_embedded_digits_do_not_leak() -> None:
    train, test = load_digits()
    assert leaks(train, test) == 0


def both(images: ImageSet) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Height and width of the first image, as stored and as used."""
    return [(a.shape[1:], b.shape[1:]) for a, b in images.pairs([0])]


def write_files(folder: Path, pictures: list[np.ndarray]) -> Path:
    (folder / "thing").mkdir(parents=True)
    for i, x in enumerate(pictures):
        (folder / "thing" / f"{i}.png").write_bytes(encoded(x))
    return folder


def test_a_file_that_two_sets_read_at_different_sizes_or_cuts_is_a_leak(tmp_path: Path) -> None:
    """The mutant that compares what is used sees nothing: no pixel of the two readings is equal."""
    pictures = [noise(i, 48, 64) for i in range(10)]  # enough that files are decoded by several threads
    folder = write_files(tmp_path / "web", [noise(99, 50, 50), *pictures])
    test = all_images(write_files(tmp_path / "test", pictures), 32)
    for size in (32, 24):
        web = all_images(folder, size)
        assert leaks(web, test) == 10
    cut = ImageSet(
        "cut", EncodedPixels(FileContents(tuple(sorted(folder.rglob("*.png")))), 32, 256 / 224), web.labels, ()
    )
    assert not set(pixel_hashes(cut)) & set(pixel_hashes(test))
    assert (leaks(cut, test), leaks(test, cut)) == (10, 10)
    assert both(cut) == [((50, 50), (32, 32))]


def test_neither_cache_nor_its_absence_changes_what_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "web", [noise(i, 20 + i, 32) for i in range(14)])
    kept = list(prints(all_images(folder, 32)))
    monkeypatch.setattr("mllm_fl.data.decode.CACHE_LIMIT", 0)
    read = list(prints(all_images(folder, 32)))
    assert read == kept
    assert sum(a == b for a, b in kept) == 1  # one of them is 32 x 32 as it lies


def test_what_is_stored_is_found_behind_every_store(tmp_path: Path) -> None:
    """Digits and glyphs: 8 x 8 counts. Parquet: the encoded picture. CIFAR's archive: 32 x 32. A pack: what was packed."""
    small, large = load_digits(16)[1], load_digits(32)[1]
    assert leaks(small, large) == len(small) and both(small) == [((8, 8), (16, 16))]
    glyphs = [render_glyphs(12, 5, image_size=size)[0] for size in (16, 32)]
    assert leaks(*glyphs) == 12 and both(glyphs[1]) == [((8, 8), (32, 32))]
    for split, first in (("train", 0), ("test", 8)):
        write_parquet(
            tmp_path / "p" / f"{split}.parquet", [encoded(noise(first + i)) for i in range(8)], [0, 1] * 4, ["a", "b"]
        )
    train, test = load_hub(str(tmp_path / "p"), 20)
    assert leaks(load_hub(str(tmp_path / "p"), 24)[1], test) == 8 and leaks(train, test) == 0
    assert both(train.subset([3])) == [((32, 32), (20, 20))]
    federation = build(DataConfig(source=f"hf:{tmp_path / 'p'}", image_size=20, clients=2, min_size=0))
    pack(federation, tmp_path / "pack")
    packed = load_pack(tmp_path / "pack", 16)
    assert both(packed.test) == both(packed.train.subset([3])) == [((20, 20), (16, 16))]
    assert leaks(packed.test, test) == 8  # what was packed is what the maker of the pack used
    root = str(binary_root(tmp_path / "c"))
    for size in (32, 16):
        assert both(load_cifar("cifar10", root, size)[0]) == [((32, 32), (size, size))]


def test_near_duplicates_are_found_and_unlike_images_are_not() -> None:
    faint = (noise(1).astype(int) + np.random.default_rng(0).integers(-3, 4, (32, 32, 3))).clip(0, 255).astype(np.uint8)
    report = check_sets(
        [("train", image_set("a", [noise(1), faint, noise(2), noise(2)])), ("test", image_set("t", [noise(1), faint]))]
    )
    first, second = report.sets
    assert (first.duplicates, first.near_duplicates, second.near_duplicates) == (1, 1, 1)
    assert first.near_examples == [["a: image 0", "a: image 1"]]
    assert (report.overlaps[0].exact, report.overlaps[0].near, report.leaks) == (2, 2, 2)
    assert not report.clean


def test_all_pairs_are_seen_across_blocks() -> None:
    many = [noise(i, 16, 16) for i in range(60)]
    from mllm_fl.data.check import _fingerprints, _near_pairs

    prints = _fingerprints(image_set("a", many + many))
    assert _near_pairs(prints.bits, prints.grey, block=7).tolist() == [[i, i + 60] for i in range(60)]


def test_a_folder_with_everything_wrong_is_reported_not_raised(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_folder(root, {"cat": 4, "dog": 1})
    (root / "cat" / "cut.jpg").write_bytes(encoded(noise(9, 64, 64), "JPEG")[:300])
    (root / "cat" / "bomb.png").write_bytes(bomb())
    (root / "cat" / "text.png").write_text("hello")
    (root / "cat" / "copy.png").write_bytes((root / "dog" / "000.png").read_bytes())
    report = check([f"folder:{root}"])
    (found,) = report.sets
    assert {Path(place).name for place, _ in found.broken} == {"cut.jpg", "bomb.png", "text.png"}
    assert found.single_image_classes == ["dog"] and found.duplicates == 1 and found.images == 9
    text = report.text()
    assert "3 broken" in text and "class 'dog' has one image" in text and "leaks into test sets: 0" in text
    assert json.loads(json.dumps(report.to_dict()))["clean"] is False


def test_open_images_are_held_against_every_test_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets" / "train", {"cat": 3})
    write_folder(tmp_path / "pets" / "test", {"cat": 3}, seed=50)
    (tmp_path / "web" / "deep").mkdir(parents=True)
    (tmp_path / "web" / "deep" / "x.png").write_bytes((tmp_path / "pets" / "test" / "cat" / "001.png").read_bytes())
    report = check([f"folder:{tmp_path / 'pets'}", f"open:{tmp_path / 'web'}"])
    assert [s.role for s in report.sets] == ["train", "test", "open"]
    assert report.leaks == 1
    assert {(o.a, o.b): o.exact for o in report.overlaps} == {
        ("test", "train"): 0,
        ("web", "train"): 0,
        ("web", "test"): 1,
    }
    with pytest.raises(UserError, match="is not a folder with images"):
        check([f"open:{tmp_path / 'absent'}"])


def test_broken_rows_of_a_parquet_file_are_listed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        images = [encoded(noise(i + 90 * (split == "test"))) for i in range(10)] + [b"broken"]
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", images, [0] * 11, ["thing"])
    report = check([f"hf:{tmp_path}"])
    assert [place.rpartition("/")[2] for place, _ in report.sets[0].broken] == ["train-00000-of-00001.parquet: row 10"]
    assert report.leaks == 0
