"""Sites that bring their own images: what they hold is theirs, labels are agreed by name, and counts are shared by those who say so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.deployment.grid import failing

from mllm_fl.data.digits import load_digits
from mllm_fl.deployment.images import site_images
from mllm_fl.errors import UserError
from mllm_fl.runs import read_rows

Run = Callable[..., dict[str, Any]]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def own(tmp_path: Path, nodes: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Three sites with 12, 8 and 4 digits each of some classes, in folders named by class; 2 and 3 share their histograms."""
    train, _ = load_digits(16)
    for i, (node, classes) in enumerate(zip(nodes, ((0, 1, 2), (2, 3), (4,)), strict=True)):
        place = tmp_path / f"images{i}"
        for c in classes:
            (place / train.class_names[c]).mkdir(parents=True)
            for n in np.flatnonzero(train.labels == c)[:4].tolist():
                array = train.read([n])[0].permute(1, 2, 0).numpy()
                Image.fromarray(array).save(place / train.class_names[c] / f"{n}.png")
        nodes[node] = {"site": f"site-{i + 1}", "state": str(tmp_path / f"node{i}"), "data": f"folder:{place}"}
        nodes[node] |= {"share-histogram": i > 0}
    return nodes


def folder(tmp_path: Path) -> Path:
    [path] = (tmp_path / "runs" / "deployed").iterdir()
    return path


VALUES = "federate.rounds = 1, federate.clients_per_round = 3, data.imbalance_factor = 1"


def test_each_site_trains_on_what_it_holds_and_the_server_learns_sizes_alone(
    deployed: Run, own: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    final = deployed(VALUES, images="own")
    rows = read_rows(folder(tmp_path) / "clients.jsonl")
    assert [(r["client"], r["samples"], r["weight"]) for r in rows] == [(0, 12, 12.0), (1, 8, 8.0), (2, 4, 4.0)]
    heard = json.loads((folder(tmp_path) / "deployment.json").read_text())
    assert heard["sizes"] == {"0": 12, "1": 8, "2": 4}
    assert heard["histograms"] == {"1": [0, 0, 4, 4, *[0] * 6], "2": [0, 0, 0, 0, 4, *[0] * 5]}
    assert final["class_counts"] == [0] * 10 and final["groups"]["rule"].startswith("unknown")
    said = (folder(tmp_path) / "federation.json").read_text()
    assert str(tmp_path) not in said and json.loads(said)["clients"][0]["histogram"] == [0] * 10


def test_where_all_share_their_counts_the_groups_are_known(
    deployed: Run, own: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    own[101]["share-histogram"] = True
    final = deployed(VALUES, images="own")
    assert final["class_counts"] == [4, 4, 8, 4, 4, 0, 0, 0, 0, 0]


def test_a_class_that_the_server_does_not_know_is_refused_with_both_lists_difference(
    deployed: Run, own: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "images1" / "three").rename(tmp_path / "images1" / "drei")
    words = (
        "site site-2: not admitted.*only at the site: drei; only at the server: zero, one, three, four, five and 4 more"
    )
    with pytest.raises(UserError, match=words):
        deployed(VALUES, images="own", wait=0.2)
    log = (tmp_path / "node1" / "log.jsonl").read_text()
    assert "rename the classes" in log


def test_a_site_without_images_is_told_so_and_the_server_hears_no_path(
    deployed: Run, own: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    own[102]["data"] = "folder:/somewhere/private"
    with pytest.raises(
        UserError, match=r"site site-2: not admitted .*its images cannot be read \(its log says why\)"
    ) as e:
        deployed(VALUES, images="own", wait=0.2)
    assert "/somewhere/private" not in str(e.value)
    assert "/somewhere/private" in (tmp_path / "node1" / "log.jsonl").read_text()
    del own[102]["data"]
    with pytest.raises(UserError, match="it has no images of its own"):
        deployed(VALUES, images="own", wait=0.2)


def test_a_run_is_taken_up_with_what_the_sites_had_said(
    deployed: Run, own: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    two = VALUES.replace("rounds = 1", "rounds = 2")

    def dies(message: Any, answer: Any) -> Any:
        second = message.metadata.group_id == "2" and message.metadata.message_type == "train"
        return failing(8)(message, answer) if second else answer()

    with pytest.raises(UserError, match="0 answers"):
        deployed(two, dict.fromkeys(own, dies), images="own", attempts=1, wait=0.1)
    resumed = deployed(two, images="own")
    whole = deployed(two, images="own", runs=str(tmp_path / "whole"))
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def test_a_list_of_files_is_as_good_as_folders(tmp_path: Path, own: dict[int, dict[str, Any]]) -> None:
    root = tmp_path / "images1"
    lines = [f"{p.relative_to(tmp_path)},{p.parent.name}" for p in sorted(root.rglob("*.png"))]
    (tmp_path / "list.csv").write_text("file,label\n" + "\n".join(lines) + "\n")
    args = (NAMES, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    a, b = (site_images(s, *args) for s in (f"folder:{root}", f"list:{tmp_path}/list.csv"))
    assert a.labels.tolist() == b.labels.tolist() == [2] * 4 + [3] * 4
    assert torch.equal(a.normalised(range(8)), b.normalised(range(8))) and a.std == (0.25, 0.25, 0.25)
    (tmp_path / "list.csv").write_text("file,label\ngone.png,two\n")
    with pytest.raises(UserError, match=r"list.csv: row 1: gone.png is not there; correct the list"):
        site_images(f"list:{tmp_path}/list.csv", *args)
