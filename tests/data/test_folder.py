"""A folder per class, a local Parquet folder, and names of the hub."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from tests.data.pictures import encoded, noise, write_folder, write_parquet

from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import build
from mllm_fl.data.folder import load_folder
from mllm_fl.data.hub import load_hub
from mllm_fl.data.sources import load_source
from mllm_fl.errors import UserError


def test_a_folder_is_split_one_in_five_and_the_same_way_when_it_grows(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", {"dog": 10, "cat": 5, "emu": 2, ".hidden": 1})
    (tmp_path / "pets" / "dog" / "notes.txt").write_text("not an image")
    train, test = load_folder(tmp_path / "pets")
    assert train.class_names == ("cat", "dog", "emu")
    assert (train.class_counts(), test.class_counts()) == ([4, 8, 1], [1, 2, 1])
    assert train.read([0]).shape == (1, 3, 32, 32)
    before = test.hashes()
    write_folder(tmp_path / "pets", {"ant": 5}, seed=50)
    assert set(before) < set(load_folder(tmp_path / "pets")[1].hashes())


def test_train_and_test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 3, "b": 1})
    write_folder(tmp_path / "test", {"b": 2})
    train, test = load_source(DataConfig(source=f"folder:{tmp_path}", image_size=8))
    assert (train.class_counts(), test.class_counts()) == ([3, 1], [0, 2])
    assert train.read([0]).shape == (1, 3, 8, 8)
    write_folder(tmp_path / "test", {"c": 1})
    with pytest.raises(UserError, match="class 'c' has no folder"):
        load_folder(tmp_path)


def test_a_federation_on_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "pets", {"a": 20, "b": 20, "c": 20})
    federation = build(DataConfig(source=f"folder:{tmp_path / 'pets'}", imbalance_factor=4, clients=3))
    assert federation.class_counts == [16, 8, 4]
    assert len(federation.client(0)) == 10


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="has no sub-folder"):
        load_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        load_folder(tmp_path)
    write_folder(tmp_path / "pets", {"one": 1, "two": 2})
    with pytest.raises(UserError, match="class 'one': has 1 image, too few to split"):
        load_folder(tmp_path / "pets")
    (tmp_path / "pets" / "one" / "x.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"x\.png: not an image"):
        [part.read(range(len(part))) for part in load_folder(tmp_path / "pets")]


def hub_folder(root: Path, splits: tuple[str, ...] = ("train", "test")) -> Path:
    for split in splits:
        images = [encoded(noise(i)) for i in range(10)]
        write_parquet(
            root / "data" / f"{split}-00000-of-00001.parquet", images, [0, 1] * 5, ("no", "yes"), ("image", "label")
        )
    return root


def test_a_local_parquet_folder_and_datasets_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    root = hub_folder(tmp_path / "set")
    local = load_hub(str(root))
    plain = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name: plain(str(root), cache_dir=str(tmp_path / "cache")))
    named = load_hub("someone/set")
    for one, other in zip(local, named, strict=True):
        assert one.class_names == other.class_names == ("no", "yes")
        assert (one.read(range(10)) == other.read(range(10))).all() and (one.labels == other.labels).all()
    assert named[0].name == "someone/set"


def test_without_a_test_split_one_row_in_five_is_held_out(tmp_path: Path) -> None:
    train, test = load_hub(str(hub_folder(tmp_path, ("train",))))
    assert (train.class_counts(), test.class_counts()) == ([4, 4], [1, 1])
    assert load_hub(str(hub_folder(tmp_path, ("validation",))))[1].class_counts() == [5, 5]


def test_word_labels_and_nameless_numbers(tmp_path: Path) -> None:
    images = [encoded(noise(i)) for i in range(4)]
    write_parquet(tmp_path / "a" / "train.parquet", images, ["dog", "cat", "dog", "cat"])
    assert load_hub(str(tmp_path / "a"))[0].class_names == ("cat", "dog")
    write_parquet(tmp_path / "b" / "train.parquet", images, [0, 2, 0, 2])
    with pytest.raises(UserError, match="class '1': has 0 images"):
        load_hub(str(tmp_path / "b"))


def test_what_the_hub_cannot_give_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(name: str) -> Any:
        raise ConnectionError(f"no route to {name}\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"^hf:a/b: cannot be loaded \(no route to a/b\); check name and network"):
        load_hub("a/b")
    with pytest.raises(UserError, match="no such folder"):
        load_hub("./absent")
    with pytest.raises(UserError, match="no train-"):
        load_hub(str(tmp_path))
    with pytest.raises(UserError, match="write hf:NAME"):
        load_source(DataConfig(source="hf:"))

    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="needs the package datasets; pip install"):
        load_hub("a/b")
