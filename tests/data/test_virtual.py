"""A million clients that nobody lists: computed from their numbers, skewed as asked, cheap to have and to compare."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests import toy

from mllm_fl.data import manifest as manifests
from mllm_fl.data.config import DataConfig
from mllm_fl.data.describe import render, summary
from mllm_fl.data.federation import Federation, build
from mllm_fl.data.pack import pack
from mllm_fl.data.virtual import LISTED, Repeated, prior_of, virtual
from mllm_fl.errors import UserError

MILLION = DataConfig(partition="virtual", clients=1_000_000, min_size=20, alpha=0.5, imbalance_factor=10)


def federation(config: DataConfig = MILLION, per_class: int = 40, classes: int = 5) -> Federation:
    return virtual(config, toy.images(per_class, classes), toy.images(3, classes, seed=1))


def shares(fed: Federation, clients: int) -> np.ndarray:
    """Class shares of the first clients, (clients, classes)."""
    classes = len(fed.class_names)
    held = [np.bincount(fed.train.labels[list(fed.clients[k])], minlength=classes) for k in range(clients)]
    return np.asarray(held) / fed.manifest.min_size


def test_a_client_is_a_function_of_its_number_and_the_data_seed() -> None:
    fed, again, other = federation(), federation(), federation(dataclasses.replace(MILLION, seed=8))
    for k in (0, 999_999, 123_456):
        assert fed.clients[k] == again.clients[k] == tuple(sorted(fed.clients[k]))
        assert len(fed.client(k)) == len(fed.clients[k]) == 20
        assert fed.clients[k] != other.clients[k]
    assert fed.clients[-1] == fed.clients[999_999]
    assert fed.clients[0] != fed.clients[1]
    assert fed.clients[2:4] == [fed.clients[2], fed.clients[3]]
    with pytest.raises(IndexError):
        _ = fed.clients[1_000_000]


def test_images_repeat_within_a_client_only_where_a_class_has_too_few() -> None:
    held = federation(per_class=40).clients[5]
    assert len(set(held)) == 20
    few = federation(
        dataclasses.replace(MILLION, alpha=1e-3), per_class=4
    )  # nearly all twenty of one class of four images
    assert max(len(few.clients[k]) - len(set(few.clients[k])) for k in range(5)) == 16


def test_the_mean_client_is_the_prior_and_alpha_is_the_spread() -> None:
    """Of Dirichlet(alpha C prior) and 20 draws; var(share) = p (1 - p) (1 / (a + 1) + (1 - 1 / (a + 1)) / 20), a = alpha C."""
    prior = prior_of(np.zeros(0, dtype=np.int64), 5, 10)
    assert prior == pytest.approx(np.array([1, 10**-0.25, 10**-0.5, 10**-0.75, 0.1]) / 2.15640, abs=1e-4)
    for alpha in (0.05, 5.0):
        found = shares(federation(dataclasses.replace(MILLION, alpha=alpha)), 2000)
        within = 1 / (5 * alpha + 1)
        variance = prior * (1 - prior) * (within + (1 - within) / 20)
        assert found.mean(0) == pytest.approx(prior, abs=4 * float(np.sqrt(variance.max() / 2000)))
        assert found.var(0) == pytest.approx(variance, rel=0.2)


def test_alpha_near_nothing_leaves_one_class_a_client_with_the_prior_between_clients() -> None:
    found = shares(federation(dataclasses.replace(MILLION, alpha=1e-9)), 1000)
    assert (found.max(1) == 1).all()
    assert found.mean(0) == pytest.approx(prior_of(np.zeros(0, dtype=np.int64), 5, 10), abs=0.06)


def test_without_imbalance_the_prior_is_that_of_the_images() -> None:
    assert prior_of(np.array([0, 0, 0, 1]), 2, 1).tolist() == [0.75, 0.25]


def test_a_million_clients_take_no_room() -> None:
    train, test = toy.images(40, 5), toy.images(3, 5, seed=1)

    def room(count: int) -> int:
        tracemalloc.start()
        fed = virtual(dataclasses.replace(MILLION, clients=count), train, test)
        held = [fed.client(k) for k in range(0, count, count // 10)], fed.population, fed.manifest.sha256, fed.subset
        now = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert held
        return now

    room(1000)  # imports
    assert room(1_000_000) < 1.2 * room(1000)


def test_population_counts_without_a_list() -> None:
    population = federation().population
    assert len(population) == 1_000_000 and population[7] == population[-1] == 20
    assert list(Repeated(3, 4)[1:]) == [3, 3, 3] and sum(Repeated(3, 4)) == 12
    with pytest.raises(IndexError):
        _ = Repeated(3, 4)[4]


def test_the_manifest_is_a_rule_that_is_written_read_and_compared(tmp_path: Path) -> None:
    fed = federation()
    manifests.save(fed.manifest, tmp_path / "manifest.json")
    assert (tmp_path / "manifest.json").stat().st_size < 2000
    there = manifests.load(tmp_path / "manifest.json")
    for field in dataclasses.fields(there):  # what resuming a run compares
        assert getattr(there, field.name) == getattr(fed.manifest, field.name), field.name
    assert there.sha256 == fed.manifest.sha256
    assert there.clients != federation(dataclasses.replace(MILLION, alpha=0.6)).manifest.clients
    with pytest.raises(UserError, match="names virtual clients by a rule"):
        _ = there.clients[0]
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"size": 20', '"size": 21'))
    with pytest.raises(UserError, match="does not match its sha256"):
        manifests.load(tmp_path / "manifest.json")


def test_the_first_clients_are_described_and_the_rest_is_counted() -> None:
    found = summary(federation())
    assert len(found["clients"]) == LISTED and found["population"] == 1_000_000 and found["total"] == 20_000_000
    assert sum(found["clients"][0]["histogram"]) == 20
    assert "on 1,000,000 clients" in render(found)
    assert "population" not in summary(federation(dataclasses.replace(MILLION, clients=50)))


def test_nothing_is_left_over_and_all_is_in_the_subset() -> None:
    fed = federation()
    assert len(fed.leftover) == 0 and len(fed.subset) == len(fed.train) == 200


def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.min_size: 0 images"):
        federation(dataclasses.replace(MILLION, min_size=0))
    with pytest.raises(UserError, match=r"^data\.manifest: a virtual partition"):
        federation(dataclasses.replace(MILLION, manifest="x.json"))
    with pytest.raises(UserError, match=r"^data\.partition: virtual clients cannot be packed"):
        pack(federation(), tmp_path / "pack")
    manifests.save(federation().manifest, tmp_path / "manifest.json")
    with pytest.raises(UserError, match="repeat its keys"):
        build(DataConfig(image_size=8, manifest=str(tmp_path / "manifest.json")))


def test_the_table_builds_it() -> None:
    fed = build(dataclasses.replace(MILLION, image_size=8))
    assert fed.manifest.partition == "virtual" and len(fed.clients) == 1_000_000
    assert fed.client(3).labels.tolist() == sorted(fed.client(3).labels.tolist()) or len(fed.client(3)) == 20
