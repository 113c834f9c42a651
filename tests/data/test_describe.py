"""The description as JSON and as a picture."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import numpy as np
import pytest
from tests.data.test_partition import GOLDEN

from mllm_fl.data.describe import describe, render, summary
from mllm_fl.data.federation import DataConfig, Federation
from mllm_fl.data.images import ImageSet, MemoryPixels

KEYS = [
    "dataset",
    "imbalance_factor",
    "partition",
    "alpha",
    "seed",
    "class_counts",
    "total",
    "subset_sha256",
    "clients",
]


def test_the_object_has_exactly_the_promised_keys() -> None:
    found = describe(DataConfig(imbalance_factor=30))
    assert list(found) == KEYS
    assert all(list(client) == ["size", "sha256", "histogram"] for client in found["clients"])
    assert json.loads(json.dumps(found)) == found
    assert found["total"] == sum(found["class_counts"]) == sum(client["size"] for client in found["clients"])
    assert np.sum([client["histogram"] for client in found["clients"]], axis=0).tolist() == found["class_counts"]
    assert found["imbalance_factor"] == 30 and found["dataset"] == "digits"


def test_pixels_are_not_touched() -> None:
    class Untouchable:
        def __len__(self) -> int:
            return 50_000

        def read(self, indices: object) -> Any:
            raise AssertionError("read")

        pairs = read

    from mllm_fl.data.federation import make_manifest

    labels = np.repeat(np.arange(10), 5000)
    images = ImageSet("cifar10", Untouchable(), labels, tuple("abcdefghij"))
    found = summary(Federation(images, images, make_manifest(DataConfig(imbalance_factor=100), images)))
    assert [client["histogram"] for client in found["clients"]] == GOLDEN["cifar10", 100].tolist()


@pytest.mark.parametrize(("classes", "clients"), [(1, 1), (10, 20), (20, 3), (21, 7), (100, 70), (1000, 20)])
def test_the_picture_fits_eighty_columns(classes: int, clients: int) -> None:
    from mllm_fl.data.federation import make_manifest

    labels = np.repeat(np.arange(classes), 40)
    names = tuple(f"a class with a rather long name {c}" for c in range(classes))
    images = ImageSet("paper", MemoryPixels(np.zeros((0,))), labels, names)  # type: ignore[arg-type]
    config = DataConfig(imbalance_factor=1 if classes == 1 else 10, clients=clients, partition="iid")
    text = render(summary(Federation(images, images, make_manifest(config, images))), names)
    assert max(map(len, text.split("\n"))) <= 80
    assert f"{clients} clients" in text


def test_shades_mean_what_the_legend_says() -> None:
    clients = [
        {"size": 100, "sha256": "", "histogram": [50, 25, 20, 4, 1, 0]},
        {"size": 0, "sha256": "", "histogram": [0] * 6},
    ]
    found = {**dict.fromkeys(KEYS, 1), "class_counts": [50, 25, 20, 4, 1, 1], "clients": clients, "dataset": "d"}
    found["partition"] = found["subset_sha256"] = "x"
    lines = render(found).split("\n")
    assert "██▓▓▒▒░░░░··  5 classes" in lines[-3]
    assert "············  0 classes" in lines[-2]
    assert lines[-1] == "sizes from 0 to 100"


@pytest.mark.data
@pytest.mark.skipif("MLLM_FL_DATA" not in os.environ, reason="MLLM_FL_DATA names no folder with real data")
@pytest.mark.parametrize("seed", [7, 11])
def test_real_cifar_is_described_as_the_global_generator_draws_it(seed: int) -> None:
    from mllm_fl.data.cifar import load_cifar

    found = describe(DataConfig(source="cifar10", imbalance_factor=100, seed=seed))
    labels = load_cifar("cifar10", None)[0].labels
    np.random.seed(seed)
    kept = []
    for c, n in enumerate(found["class_counts"]):
        indices = np.flatnonzero(labels == c).tolist()
        np.random.shuffle(indices)
        kept.append(sorted(indices[:n]))
    assert found["subset_sha256"] == hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    if seed == 7:
        assert [client["histogram"] for client in found["clients"]] == GOLDEN["cifar10", 100].tolist()
