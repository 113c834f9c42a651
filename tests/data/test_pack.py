"""A federation that travels as one folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mllm_fl.data.federation import DataConfig, Federation, build
from mllm_fl.data.hub import load_hub
from mllm_fl.data.pack import encode, load_pack, pack
from mllm_fl.data.sources import load_source
from mllm_fl.errors import UserError


@pytest.fixture(scope="module")
def federation() -> Federation:
    return build(DataConfig(imbalance_factor=30))


@pytest.fixture(scope="module")
def packed(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(federation, tmp_path_factory.mktemp("packs") / "digits", leftover_per_class=5)


def test_clients_test_set_and_manifest_come_back_as_they_were(federation: Federation, packed: Path) -> None:
    again = build(DataConfig(source=f"pack:{packed}"))
    assert again.manifest == federation.manifest and again.manifest.sha256 == federation.manifest.sha256
    assert again.train.name == "digits" and (again.train.labels == federation.train.labels).all()
    for k in range(20):
        mine, theirs = again.client(k), federation.client(k)
        assert torch.equal(mine.read(range(len(mine))), theirs.read(range(len(theirs))))
        assert (mine.labels == theirs.labels).all() and mine.mean == theirs.mean
    assert torch.equal(again.test.read(range(901)), federation.test.read(range(901)))
    assert again.test.labels.tolist() == federation.test.labels.tolist()


def test_leftovers_are_few_a_class_and_never_held(federation: Federation, packed: Path) -> None:
    again = load_pack(packed)
    assert again.leftover.class_counts() == [min(5, n) for n in federation.leftover.class_counts()]
    known = set(federation.leftover.hashes())
    assert set(again.leftover.hashes()) <= known
    held, spare = federation.clients[0][0], int(again.spare[0])  # type: ignore[index]
    assert torch.equal(again.train.read([held, spare]), federation.train.read([held, spare]))


def test_an_image_that_was_not_packed_is_named(federation: Federation, packed: Path) -> None:
    again = load_pack(packed)
    absent = next(i for i in range(896) if i not in {*again.spare, *(j for h in again.clients for j in h)})  # type: ignore[misc]
    with pytest.raises(UserError, match=f"training image {absent} was not packed"):
        again.train.read([absent])


def test_a_pack_is_also_a_plain_parquet_set_and_can_be_packed_again(packed: Path, tmp_path: Path) -> None:
    train, test = load_hub(str(packed), 16)
    assert (len(train), len(test)) == (266, 901)
    twice = load_pack(pack(load_pack(packed), tmp_path / "again"))
    assert twice.manifest.sha256 == load_pack(packed).manifest.sha256
    assert (
        len(load_source(DataConfig(source=f"pack:{packed}", image_size=8)).train.read([twice.clients[0][0]])[0, 0]) == 8
    )


def test_encoding_is_lossless_for_the_worst_picture() -> None:
    encode(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
    encode(torch.zeros(3, 1, 1, dtype=torch.uint8))


def test_contradicting_keys_and_damaged_packs_are_refused(packed: Path, federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.seed: 8 contradicts 7"):
        build(DataConfig(source=f"pack:{packed}", seed=8))
    with pytest.raises(UserError, match="exists already"):
        pack(federation, packed)
    with pytest.raises(UserError, match="is not a whole pack"):
        load_pack(tmp_path / "absent")
    for name in ("pack.json", "positions.parquet", "train-00000-of-00001.parquet", "manifest.json"):
        copy = tmp_path / name
        copy.mkdir()
        for file in packed.iterdir():
            content = file.read_bytes()
            (copy / file.name).write_bytes(content[: len(content) // 2] if file.name == name else content)
        with pytest.raises(UserError):
            load_pack(copy)
    card = json.loads((packed / "pack.json").read_text())
    (tmp_path / "pack.json" / "pack.json").write_text(json.dumps({**card, "manifest_sha256": "0"}))
    with pytest.raises(UserError, match="is not the manifest this pack was written with"):
        load_pack(tmp_path / "pack.json")


def test_a_write_that_fails_leaves_nothing_behind(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(
        UserError, match=r"cannot be written \(No space left on device\); choose a folder with free space"
    ):
        pack(federation, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
