"""ImageNet-LT from list files and an image root."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from tests.data.pictures import encoded, noise

from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import build
from mllm_fl.data.imagenet_lt import load_list, read_list
from mllm_fl.data.longtail import groups
from mllm_fl.errors import UserError


def imagenet(root: Path, counts: tuple[int, ...] = (6, 3, 1), gz: bool = False) -> Path:
    """Lists and images of classes n00, n01, ...: a natural tail for training, two images a class for testing."""
    for split, sizes in (("train", counts), ("test", (2,) * len(counts))):
        lines = []
        for c, size in enumerate(sizes):
            (root / split / f"n{c:02}").mkdir(parents=True, exist_ok=True)
            for i in range(size):
                path = f"{split}/n{c:02}/{i}.JPEG"
                (root / path).write_bytes(encoded(noise(100 * c + i, 50, 60), "JPEG"))
                lines.append(f"{path} {c}\n")
        text = "".join(lines)
        if gz:
            (root / f"ImageNet_LT_{split}.txt.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (root / f"ImageNet_LT_{split}.txt").write_text(text)
    return root


@pytest.mark.parametrize("gz", [False, True])
def test_the_tail_of_the_lists_is_kept_and_split(tmp_path: Path, gz: bool) -> None:
    config = DataConfig(source="imagenet-lt", root=str(imagenet(tmp_path, gz=gz)), image_size=32, clients=5)
    federation = build(config)
    assert federation.class_counts == [6, 3, 1] and federation.class_names == ("n00", "n01", "n02")
    assert federation.test.class_counts() == [2, 2, 2]
    assert federation.client(4).read([0, 1]).shape == (2, 3, 32, 32)
    assert len(federation.leftover) == 0


def test_names_come_from_the_table_beside_the_lists(tmp_path: Path) -> None:
    imagenet(tmp_path)
    (tmp_path / "classes.tsv").write_text(
        "class\twnid\tclip_name\n1\tn01\tgoldfish\n0\tn00\ttench\n2\tn02\tgreat white shark\n"
    )
    assert load_list(str(tmp_path), "train", 16).class_names == ("tench", "goldfish", "great white shark")
    (tmp_path / "classes.tsv").write_text("class\twnid\n0\tn00\n")
    with pytest.raises(UserError, match="no column 'clip_name'"):
        load_list(str(tmp_path), "train", 16)


def test_a_small_picture_is_enlarged_to_256_and_cut_to_224(tmp_path: Path) -> None:
    assert load_list(str(imagenet(tmp_path)), "test").read([0]).shape == (1, 3, 224, 224)


def test_the_cut_is_224_of_256(tmp_path: Path) -> None:
    imagenet(tmp_path)
    framed = np.zeros((256, 256, 3), dtype=np.uint8)
    framed[16:240, 16:240] = 255
    (tmp_path / "test/n00/0.JPEG").write_bytes(encoded(framed))
    assert (load_list(str(tmp_path), "test").read([0]) == 255).all()


def test_bad_lists_and_roots_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no ImageNet_LT_train\.txt"):
        load_list(str(tmp_path), "train")
    for text in ("a.jpg zero\n", "", "a.jpg -1\n", "alone\n"):
        (tmp_path / "ImageNet_LT_train.txt").write_text(text)
        with pytest.raises(UserError, match=r"ImageNet_LT_train\.txt: is "):
            load_list(str(tmp_path), "train")
    (tmp_path / "ImageNet_LT_train.txt").write_text("train/x.JPEG 0\n")
    with pytest.raises(UserError, match=r"x\.JPEG: no such image, although"):
        load_list(str(tmp_path), "train")
    (tmp_path / "ImageNet_LT_train.txt").unlink()
    (tmp_path / "ImageNet_LT_train.txt.gz").write_bytes(gzip.compress(b"train/x.JPEG 0\n" * 99)[:20])
    with pytest.raises(UserError, match="is not a list"):
        load_list(str(tmp_path), "train")


@pytest.mark.data
@pytest.mark.skipif("MLLM_FL_DATA" not in os.environ, reason="MLLM_FL_DATA names no folder with real data")
def test_the_official_lists_and_groups() -> None:
    folder = Path(os.environ["MLLM_FL_DATA"]) / "imagenet_lt"
    _, val = read_list(folder / "ImageNet_LT_val.txt.gz")
    _, test = read_list(folder / "ImageNet_LT_test.txt.gz")
    assert (np.bincount(val) == 20).all() and (np.bincount(test) == 50).all() and len(np.bincount(val)) == 1000
    with gzip.open(folder / "cls_num_list.json.gz", "rt") as file:
        counts = [int(n) for n in file.read().strip("[] \n").split(",")]
    cut = groups(counts)
    assert (len(cut.many), len(cut.medium), len(cut.few), sum(counts)) == (385, 479, 136, 115_846)
    assert cut.rule.startswith("official")
