"""What the server owns: unlabelled images without labels and at the clients' size, and each client's rows of the teacher's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mllm_fl.data.config import DataConfig
from mllm_fl.data.federation import build
from mllm_fl.errors import UserError
from mllm_fl.models.teacher.clip import TeacherConfig, load_clip
from mllm_fl.stages.server import ServerConfig, clients_logits, unlabelled_images

DATA = DataConfig(imbalance_factor=10, clients=4)


def test_each_client_gets_the_rows_of_its_own_images(tmp_path: Path) -> None:
    federation = build(DATA)
    rows = clients_logits(TeacherConfig(), federation, tmp_path)
    assert sorted(rows) == [0, 1, 2, 3]
    for k in (0, 3):
        mine = federation.client(k)
        direct = load_clip().zero_shot(mine.read(range(len(mine))), federation.class_names)
        assert torch.allclose(rows[k], direct, atol=1e-3) and len(rows[k]) == len(federation.clients[k])


@pytest.mark.parametrize("name", ["auto", "glyphs", "leftover"])
def test_unlabelled_images_have_no_labels_and_the_clients_normalisation(name: str) -> None:
    federation = build(DATA)
    images = unlabelled_images(ServerConfig(unlabelled=name, unlabelled_images=30), DATA, federation)
    assert len(images) == 30 and set(images.labels.tolist()) == {-1}
    assert images.normalised([0]).shape[-1] == federation.test.normalised([0]).shape[-1]
    assert (images.mean, images.std) == (federation.train.mean, federation.train.std)
    again = unlabelled_images(ServerConfig(unlabelled=name, unlabelled_images=30), DATA, federation)
    other = unlabelled_images(ServerConfig(unlabelled=name, unlabelled_images=30, seed=2), DATA, federation)
    assert torch.equal(images.read(range(30)), again.read(range(30)))
    assert not torch.equal(images.read(range(30)), other.read(range(30)))


def test_leftover_is_what_no_client_holds() -> None:
    federation = build(DATA)
    images = unlabelled_images(ServerConfig(unlabelled="leftover", unlabelled_images=None), DATA, federation)
    held = set(federation.subset.hashes())
    assert len(images) == len(federation.leftover) and not held & set(images.hashes())


def test_what_is_wrong_is_said() -> None:
    federation = build(DATA)
    with pytest.raises(UserError, match=r"unlabelled_images: .* images, 99999 asked for"):
        unlabelled_images(ServerConfig(unlabelled="leftover", unlabelled_images=99_999), DATA, federation)
    with pytest.raises(UserError, match="no default for 'folder:x'"):
        unlabelled_images(ServerConfig(), DataConfig(source="folder:x"), federation)
    with pytest.raises(UserError, match="labelled_per_class: 0 is below 1"):
        ServerConfig(labelled_per_class=0)
