"""CIFAR from Parquet and from the official binary archives; pickles are refused."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tests.data.pictures import encoded, noise, write_parquet

from mllm_fl.data.check import leaks, pixel_hashes
from mllm_fl.data.cifar import load_cifar
from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import build
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 0, 8, 7, 3]
IMAGES = [noise(i) for i in range(12)]


def parquet_root(root: Path, columns: tuple[str, str] = ("img", "label")) -> Path:
    for split in ("train", "test"):
        path = root / "cifar10" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, [encoded(x, "WEBP" if columns[0] == "" else "PNG") for x in IMAGES], LABELS, NAMES, columns)
    return root


def binary_root(root: Path, label_bytes: int = 1) -> Path:
    """The official layout; for CIFAR-100 the coarse label comes first and must be ignored."""
    folder = root / ("cifar-10-batches-bin" if label_bytes == 1 else "cifar-100-binary")
    folder.mkdir(parents=True)
    records = b"".join(
        bytes([17] * (label_bytes - 1) + [label]) + x.transpose(2, 0, 1).tobytes()
        for x, label in zip(IMAGES, LABELS, strict=True)
    )
    if label_bytes == 1:
        for k in range(5):
            (folder / f"data_batch_{k + 1}.bin").write_bytes(
                records[k * 2 * 3073 : (k * 2 + 2 if k < 4 else 12) * 3073]
            )
        (folder / "test_batch.bin").write_bytes(records)
        (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    else:
        (folder / "train.bin").write_bytes(records)
        (folder / "test.bin").write_bytes(records)
        (folder / "fine_label_names.txt").write_text("\n".join(f"class{c}" for c in range(100)))
    return root


def same(images: ImageSet) -> bool:
    pixels = images.read(range(len(images))).numpy().transpose(0, 2, 3, 1)
    return bool((pixels == np.stack(IMAGES)).all()) and images.labels.tolist() == LABELS


def test_parquet_and_binary_give_the_same_images(tmp_path: Path) -> None:
    parquet = load_cifar("cifar10", str(parquet_root(tmp_path / "p")))
    binary = load_cifar("cifar10", str(binary_root(tmp_path / "b")))
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "b" / "cifar-10-batches-bin", "cifar-10-batches-bin")
    archive = load_cifar("cifar10", str(tmp_path))
    by_name = load_cifar("cifar10", f"hf:{tmp_path / 'p' / 'cifar10'}")
    for train, test in (parquet, binary, archive, by_name):
        assert same(train) and same(test)
        assert train.class_names == NAMES and train.mean == (0.4914, 0.4822, 0.4465)
    assert load_cifar("cifar10", str(tmp_path / "b"), 16)[0].read([0]).shape == (1, 3, 16, 16)


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    train, _ = load_cifar("cifar100", str(binary_root(tmp_path, 2)))
    assert same(train) and train.class_names[3] == "class3"


def test_the_environment_names_the_folder_when_the_file_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLLM_FL_DATA", str(parquet_root(tmp_path)))
    assert same(load_cifar("cifar10", None)[0])
    monkeypatch.setenv("MLLM_FL_DATA", str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"^MLLM_FL_DATA: .*absent does not exist"):
        load_cifar("cifar10", None)
    monkeypatch.delenv("MLLM_FL_DATA")
    with pytest.raises(UserError, match=r"set data\.root or the variable MLLM_FL_DATA"):
        load_cifar("cifar10", None)


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    for root in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"pickle, which can run any code when read; use cifar-10-binary\.tar\.gz"):
            load_cifar("cifar10", str(root))


def test_bad_folders_are_named_with_the_way_out(tmp_path: Path) -> None:
    def refused(root: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_cifar("cifar10", str(root))[0].read([0])
        assert "\n" not in str(caught.value) and ";" in str(caught.value)

    refused(tmp_path, "holds no cifar10")
    for split in ("train", "test"):
        path = tmp_path / "two" / "cifar10" / f"{split}.parquet"
        write_parquet(path, [encoded(noise(1))], [0], ["no", "yes"])
    refused(tmp_path / "two", "has 2 classes, not the 10 of cifar10")
    wrong = parquet_root(tmp_path / "wrong", ("photo", "label"))
    refused(wrong, "no image column among photo, label; rename it to 'img'")
    refused(parquet_root(tmp_path / "wrong2", ("img", "kind")), "no label column among img, kind")

    cut = parquet_root(tmp_path / "cut") / "cifar10" / "train-00000-of-00001.parquet"
    cut.write_bytes(cut.read_bytes()[:2000])
    refused(tmp_path / "cut", "train-00000-of-00001.parquet: is not a whole Parquet file")
    cut.unlink()
    refused(tmp_path / "cut", "has only the test Parquet file")

    short = binary_root(tmp_path / "short") / "cifar-10-batches-bin" / "data_batch_2.bin"
    short.write_bytes(short.read_bytes()[:-1])
    refused(tmp_path / "short", "data_batch_2.bin is cut short")
    short.unlink()
    refused(tmp_path / "short", "lacks data_batch_2.bin")
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    refused(tmp_path / "tar", "is not a whole tar archive")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([b"no image"], [0], "parquet: row 0: not an image"),
        ([None], [0], "row 0: the row holds no image bytes"),
        ([b""], [12], r"label 12 in column 'label' is outside 0\.\.9"),
        ([b""], [None], "rows without a label|holds null"),
        ([b""], [0.5], "holds double, not class numbers"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, images: list[bytes | None], labels: list[object], message: str) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet", images, labels, NAMES)
    with pytest.raises(UserError, match=message):
        load_cifar("cifar10", str(tmp_path))[0].read([0])


needs_data = pytest.mark.skipif("MLLM_FL_DATA" not in os.environ, reason="MLLM_FL_DATA names no folder with real data")


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(("source", "total"), [("cifar10", 12_406), ("cifar100", 10_847)])
def test_real_cifar_has_the_published_long_tail(source: str, total: int) -> None:
    federation = build(DataConfig(source=source, imbalance_factor=100))
    assert federation.manifest.total == total and federation.manifest.achieved_imbalance == 100
    assert len(federation.train) == 50_000 and federation.test.class_counts() == [
        10_000 // len(federation.class_names)
    ] * len(federation.class_names)


@pytest.mark.data
@needs_data
def test_real_cifar_pixels_have_the_known_mean_colour() -> None:
    """The protocol's normalisation constants are the training set's channel means; lossy or shuffled channels would miss them."""
    train, test = load_cifar("cifar10", None)
    mean = np.mean(
        [train.read(range(start, start + 1000)).numpy().mean((0, 2, 3)) for start in range(0, 50_000, 1000)], axis=0
    )
    assert (mean / 255).round(4).tolist() == [0.4914, 0.4822, 0.4465]
    assert [test.class_names[c] for c in test.labels[:3]] == ["cat", "ship", "ship"]
    assert leaks(train, test) == 0


@pytest.mark.data
@needs_data
def test_cifar100_as_published_repeats_ten_training_images_in_its_test_set() -> None:
    """A property of the data set that every run on it has to declare; six of the ten pairs even carry different labels."""
    train, test = load_cifar("cifar100", None)
    where = {digest: int(label) for digest, label in zip(pixel_hashes(test), test.labels, strict=True)}
    pairs = [
        (int(label), where[digest])
        for digest, label in zip(pixel_hashes(train), train.labels, strict=True)
        if digest in where
    ]
    assert len(pairs) == leaks(train, test) == 10
    assert sum(a != b for a, b in pairs) == 6
