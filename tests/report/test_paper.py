"""The paper's tables: facts as printed, ours only where the protocol is the paper's, reduced runs apart, gaps as dashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.cli import main
from mllm_fl.data.longtail import class_counts
from mllm_fl.errors import UserError
from mllm_fl.report.paper import departures, published, setting, sheets
from mllm_fl.report.sheets import render

FULL: dict[str, Any] = {
    "data": {"source": "cifar10", "partition": "creff", "alpha": 0.5, "clients": 20},
    "model": {"name": "resnet8", "width": 64},
    "federate": {"clients_per_round": 8, "rounds": 200, "local": {"epochs": 10, "batch_size": 32, "lr": 0.1}},
}


def run(
    arm: str = "fedavg",
    seed: int = 0,
    accuracy: float = 0.6,
    *,
    imbalance: int = 100,
    config: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A line of a results file, by the paper's protocol unless ``config`` says otherwise."""
    return {
        "experiment": "table2", "name": f"{arm}-{seed}", "arm": arm, "seed": seed, "config_hash": f"{arm}{seed}{imbalance}", "algorithm": "fedavg",
        "class_names": [str(c) for c in range(10)], "class_counts": class_counts(5000, 10, imbalance), "stages": {"pretrain": False, "align": False},
        "last": {"accuracy": accuracy - 0.1, "many": 0.9, "medium": 0.5, "few": 0.1, "confusion": [[1] * 10] * 10},
        "mean_last": {"rounds": 20, "mean": accuracy, "sd": 0.0}, "max": {"accuracy": accuracy + 0.1}, "ema": None,
        "config": FULL if config is None else config, **more,
    }  # fmt: skip


def reduced() -> dict[str, Any]:
    other = json.loads(json.dumps(FULL))
    other["federate"]["rounds"], other["federate"]["local"]["epochs"], other["model"]["width"] = 40, 3, 16
    return dict(other)


def test_the_published_numbers_are_those_of_the_paper() -> None:
    rows = {r["method"]: r for r in published(2)[1]}
    assert (
        len(rows) == 13
        and rows["FedAvg"]["CIFAR-10-LT 100"] == "56.17"
        and rows["MLLM-LLaVA-FL"]["CIFAR-100-LT 10"] == "48.87"
    )
    assert sum(float(v) for r in rows.values() for k, v in r.items() if k != "method") == pytest.approx(4126.52)
    assert [r["Few"] for r in published(3)[1]][-2:] == ["10.29", "25.58"]
    assert sum(int(r["epochs to target"]) for r in published(4)[1]) == 94
    assert all("arXiv:2409.06067" in published(t)[0][0] for t in (2, 3, 4))


def test_ours_stands_beside_the_published_number_by_the_rule_that_was_asked_for() -> None:
    (sheet,) = sheets(2, [run(seed=0, accuracy=0.5), run(seed=1, accuracy=0.6)])
    assert sheet.head[:3] == ("method", "CIFAR-10-LT 100, published", "CIFAR-10-LT 100, ours")
    assert sheet.rows[0][:5] == ("FedAvg", "56.17", "55.0 ± 7.1 (2)", "59.36", "–")
    assert all(row[2] == "–" for row in sheet.rows[1:])
    assert any("mean over the evaluated rounds among the last 20" in note for note in sheet.notes)
    (best,) = sheets(2, [run(accuracy=0.5)], "max")
    assert best.rows[0][2] == "60.0 (1)" and any("selected on test" in note for note in best.notes)


def test_whole_of_ours_and_arms_between() -> None:
    both, one = {"pretrain": True, "align": True}, {"pretrain": False, "align": True}
    (sheet,) = sheets(2, [run("all", stages=both), run("aligned", stages=one, accuracy=0.7)])
    assert sheet.rows[12][:3] == ("MLLM-LLaVA-FL", "75.49", "60.0 (1)")
    assert sheet.rows[13][:3] == ("aligned", "–", "70.0 (1)")


def test_reduced_runs_never_stand_in_the_paper_s_columns() -> None:
    for final in (run(config=reduced()), run(config={}, experiment="methods_r")):
        beside, apart = sheets(2, [final])
        assert all(row[2] == "–" for row in beside.rows) and "No run by the paper's protocol" in beside.notes[-1]
        assert "reduced protocol R" in apart.title and apart.rows == (("FedAvg", "60.0 (1)"),)
        assert "not comparable" in apart.notes[0]


def test_any_other_departure_stands_apart_and_is_named() -> None:
    other = json.loads(json.dumps(FULL))
    other["data"]["partition"] = "dirichlet"
    assert departures(2, run(config=other)) == ["data.partition dirichlet, not creff"]
    _, apart = sheets(2, [run(config=other)])
    assert "data.partition dirichlet, not creff" in apart.title
    _, unknown = sheets(2, [run(config={})])
    assert "whose configuration was not recorded" in unknown.title


def test_two_arms_of_one_method_keep_their_names() -> None:
    (sheet,) = sheets(2, [run("a"), run("b", accuracy=0.7)])
    assert sheet.rows[0][2] == "–" and [row[:3] for row in sheet.rows[13:]] == [
        ("a", "–", "60.0 (1)"),
        ("b", "–", "70.0 (1)"),
    ]


def test_a_post_hoc_method_has_one_score_and_says_so() -> None:
    tau = run("tau", algorithm="taunorm", mean_last=None) | {"from": {"run": "fedavg-0"}}
    (sheet,) = sheets(2, [run(), tau])
    row = next(row for row in sheet.rows if row[0] == "FedAvg+tau-norm")
    assert row[1:3] == ("49.95", "50.0 † (1)") and any(note.startswith("† applied once") for note in sheet.notes)
    (unknown,) = sheets(2, [run("tau", algorithm="taunorm", mean_last=None)])
    assert all(row[2] == "–" for row in unknown.rows)  # an ordinary run without a mean is a gap


def test_data_sets_are_known_by_their_class_counts() -> None:
    assert setting(run(imbalance=50)) == "CIFAR-10-LT 50"
    assert setting({"class_counts": [87, 59, 40, 27, 19, 13, 9, 6, 4, 2]}) is None and setting({}) is None
    digits = run(class_counts=[87, 2])
    assert all(cell == "–" for row in sheets(2, [digits])[0].rows for cell in row[2::2])


def test_table_3_is_by_group_of_the_last_round() -> None:
    counts = [1280, *[115] * 993, 115846 - 1280 - 993 * 115 - 5 * 5, *[5] * 5]
    config = {**FULL, "data": {"alpha": 0.1, "clients": 20}, "model": {"name": "resnet50"}}
    (sheet,) = sheets(3, [run(class_counts=counts, config=config)])
    assert sheet.rows[0] == (
        "FedAvg",
        "23.85",
        "50.0 (1)",
        "34.92",
        "90.0 (1)",
        "19.18",
        "50.0 (1)",
        "7.10",
        "10.0 (1)",
    )


def test_table_4_counts_epochs_to_the_target() -> None:
    config = {"data": {"source": "cifar10", "clients": 1}, "federate": {"rounds": 30, "local": {"epochs": 1}}}
    one = run(
        config=config,
        class_counts=[20] * 10,
        history={"round": [1, 2, 3], "accuracy": [0.1, 0.3, 0.2]},
        max={"accuracy": 0.3},
    )
    (sheet,) = sheets(4, [one])
    rows = {row[:3]: row[4:] for row in sheet.rows}
    assert rows["without pretraining", "CIFAR-10", "200"] == ("6", "2.0 (1)", "30.44", "30.0 (1)")
    assert rows["with pretraining", "CIFAR-10", "200"] == ("3", "–", "37.62", "–")


def test_formats() -> None:
    (sheet,) = sheets(2, [run(seed=s, accuracy=0.5) for s in (0, 1)])
    markdown, text, latex = (render(sheet, form) for form in ("markdown", "csv", "latex"))
    assert "| FedAvg | 56.17 | 50.0 ± 0.0 (2) |" in markdown and markdown.startswith("### Table 2")
    assert "FedAvg,56.17,50.0 ± 0.0 (2),59.36,–" in text
    assert r"FedAvg & 56.17 & 50.0 $\pm$ 0.0 (2) & 59.36 & -- &" in latex and latex.count(r"\\") == 14


def test_the_words(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["table", "2"]) == 2 and "results: no results file here" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "e.jsonl"
    path.write_text(json.dumps(run()) + "\n" + json.dumps({"seconds": 3}) + "\n")  # a benchmark's line is no run
    assert main(["table", "2"]) == 0 and "| FedAvg | 56.17 | 60.0" in capsys.readouterr().out
    assert main(["table", "5"]) == 2 and "choose 2, 3 or 4" in capsys.readouterr().err
    assert main(["table", "2", "--rule", "best"]) == 2 and "'best' is unknown" in capsys.readouterr().err
    path.write_text(json.dumps(run()) + "\n{broken\n")
    assert main(["table", "2"]) == 2 and "e.jsonl:2: broken line" in capsys.readouterr().err


def test_figures_are_pages_of_their_own(tmp_path: Path) -> None:
    from mllm_fl.report.figures import build

    finals = [run(seed=s, history={"round": [1, 2], "accuracy": [0.1, 0.2]}) for s in (0, 1)]
    curves = build(3, finals, tmp_path / "f3.html").read_text()
    assert curves.count('<svg class="plot"') == 1 and "Figure 3" in curves and "<bdi>fedavg</bdi>" in curves
    matrices = build(4, finals, tmp_path / "f4.html").read_text()
    assert "10.0 % right" in matrices and "default-src 'none'" in matrices
    with pytest.raises(UserError, match="no run among the results recorded its curve"):
        build(3, [run()], tmp_path / "x.html")
    with pytest.raises(UserError, match="different classes"):
        build(4, [run(), run("b", class_names=list("abcdefghij"))], tmp_path / "x.html")
    with pytest.raises(UserError, match="choose 3 or 4"):
        build(1, finals, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
