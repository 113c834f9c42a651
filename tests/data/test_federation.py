"""The federation and its manifest, on the embedded digits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mllm_fl.data import manifest as manifests
from mllm_fl.data.digits import load_digits, raw_digits
from mllm_fl.data.federation import DataConfig, Federation, build
from mllm_fl.errors import UserError


@pytest.fixture(scope="module")
def federation() -> Federation:
    return build(DataConfig(imbalance_factor=30))


def test_embedded_digits_are_scikit_learns() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = raw_digits()
    assert (images == digits.images).all() and (labels == digits.target).all()


def test_train_is_the_first_half_of_each_class_and_test_the_rest() -> None:
    train, test = load_digits()
    _, labels = raw_digits()
    assert len(train) + len(test) == 1797
    assert train.class_counts() == [int((labels == c).sum()) // 2 for c in range(10)]
    assert train.read([0]).shape == (1, 3, 16, 16)
    assert load_digits(8)[0].read([0])[0, 0].max() == 239  # 15 of 16 grey levels, rounded: 239.06


def test_the_default_federation_on_paper(federation: Federation) -> None:
    assert federation.class_counts == [87, 59, 40, 27, 19, 13, 9, 6, 4, 2]  # 87 * 30**(-c/9), truncated
    assert sorted(map(len, federation.clients)) == [13] * 14 + [14] * 6  # 266 images over 20 clients
    assert len(federation.subset) == 266 and len(federation.leftover) == 896 - 266
    assert federation.subset.class_counts() == federation.class_counts
    assert federation.manifest.achieved_imbalance == 43.5  # asked for 30; truncation left 2 of 2.9


def test_clients_hold_their_own_images(federation: Federation) -> None:
    first = federation.client(0)
    assert (first.read(range(len(first))) == federation.train.read(federation.clients[0])).all()
    flat = [i for held in federation.clients for i in held]
    assert len(set(flat)) == len(flat) == 266


def test_hashes_are_those_the_manifest_promises(federation: Federation) -> None:
    held = federation.clients[3]
    assert held == sorted(held)
    assert federation.manifest.client_sha256[3] == hashlib.sha256(json.dumps(held).encode()).hexdigest()
    kept = [sorted(i for h in federation.clients for i in h if federation.train.labels[i] == c) for c in range(10)]
    assert federation.manifest.subset_sha256 == hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def test_a_saved_manifest_comes_back_and_rules(federation: Federation, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "manifest.json"
    manifests.save(federation.manifest, path)
    again = build(DataConfig(manifest=str(path)))
    assert again.manifest == federation.manifest and again.manifest.sha256 == federation.manifest.sha256
    assert [p.name for p in path.parent.iterdir()] == ["manifest.json"]  # no temporary file is left
    with pytest.raises(UserError, match=r"data\.clients: 5 contradicts 20"):
        build(DataConfig(manifest=str(path), clients=5))


def test_a_manifest_that_was_touched_is_refused(federation: Federation, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    manifests.save(federation.manifest, path)
    content = json.loads(path.read_text())

    def written(change: dict[str, object]) -> str:
        path.write_text(json.dumps({**content, **change}))
        return str(path)

    moved = json.loads(json.dumps(content["clients"]))
    moved[0]["indices"][0] = 895
    changes: list[tuple[dict[str, object], str]] = [
        ({"clients": moved}, "client 0 do not match"),
        ({"alpha": 0.7}, "does not match its sha256"),
        ({"format": 9}, "not a manifest of format 1"),
        ({"clients": 3}, "lacks or garbles"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            manifests.load(written(change))
    path.write_text(json.dumps(content)[:500])
    with pytest.raises(UserError, match="not a whole JSON file"):
        manifests.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        manifests.load(tmp_path / "absent.json")


def test_a_manifest_of_other_images_is_refused(federation: Federation) -> None:
    reversed_train = federation.train.subset(np.arange(len(federation.train))[::-1].tolist())
    with pytest.raises(UserError, match="was made for another digits"):
        manifests.verify(federation.manifest, reversed_train, "m.json")


def test_a_manifest_whose_indices_are_no_partition_of_its_subset_is_refused(federation: Federation) -> None:
    whole = federation.manifest
    for clients, message in (
        ((whole.clients[1], *whole.clients[1:]), "gives an image to two clients"),
        (((5000,), *whole.clients[1:]), "an index that does not exist"),
        (((), *whole.clients[1:]), "do not hold the subset"),
    ):
        with pytest.raises(UserError, match=message):
            manifests.verify(replace(whole, clients=clients), federation.train, "m.json")


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary_one(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "m.json"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        UserError, match=r"m\.json: cannot be written \(No space left on device\); choose a writable folder"
    ):
        manifests.save(federation.manifest, path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"imbalance_factor": 0.5},
        {"alpha": 0},
        {"clients": 0},
        {"seed": -1},
        {"min_size": -1},
        {"image_size": 2},
        {"partition": "stars"},
        {"source": ""},
        {"leaks_declared": -1},
    ],
)
def test_values_out_of_range_name_their_key(change: dict[str, object]) -> None:
    with pytest.raises(
        UserError, match=rf"^data\.{next(iter(change))}: [^\n]*; use|^data\.{next(iter(change))}: [^\n]*; give"
    ):
        DataConfig(**change)  # type: ignore[arg-type]


def test_unknown_sources_are_answered_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        build(DataConfig(source="cifar-10"))
    with pytest.raises(UserError, match="use one of digits"):
        build(DataConfig(source="stars"))
