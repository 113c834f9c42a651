"""What the page says in words: gains by stage, taken seed by seed, with numbers that one can check by hand."""

from __future__ import annotations

from pathlib import Path

from tests.report.folders import run_folder

from mllm_fl.report.html import Markup
from mllm_fl.report.reading import Found, read
from mllm_fl.report.summary import gain, lead, points, stages
from mllm_fl.report.table import Value

ARMS = {"plain": (False, False), "pre": (True, False), "ali": (False, True), "both": (True, True)}
SPACE = "\N{NO-BREAK SPACE}"


def four(root: Path, seeds: tuple[int, ...] = (0, 1)) -> Found:
    """2×2 arms; pretraining brings 20 points, alignment 10, seed 1 is 4 points better everywhere, and both bring 25 and 35."""
    folders = []
    for arm, on in ARMS.items():
        for seed in seeds:
            both = (0.25, 0.35)[seed] if on == (True, True) else 0.2 * on[0] + 0.1 * on[1]
            folders.append(run_folder(root, arm, seed, accuracy=0.4 + 0.04 * seed + both, stages=on))
    return read(folders)


def test_gains_are_taken_seed_by_seed(tmp_path: Path) -> None:
    by_stage = stages(four(tmp_path).arms)
    base = by_stage[(False, False)]
    pre = gain(by_stage[(True, False)], base, "mean_last", "mean")
    both = gain(by_stage[(True, True)], base, "mean_last", "mean")
    assert pre is not None and pre.sd is not None and both is not None and both.sd is not None
    assert (round(pre.mean, 9), round(pre.sd, 9)) == (0.2, 0.0)  # the seeds' own difference is no deviation of the gain
    assert (round(both.mean, 9), round(both.sd, 9)) == (0.3, round(0.1 / 2**0.5, 9))


def test_unequal_seeds_have_a_gain_but_no_deviation(tmp_path: Path) -> None:
    found = read([run_folder(tmp_path, "a", s) for s in (0, 1)] + [run_folder(tmp_path, "b", 2, accuracy=0.6)])
    change = gain(found.arms[1], found.arms[0], "last", "accuracy")
    assert change is not None and change.sd is None and round(change.mean, 9) == 0.1


def test_the_lead_names_what_each_stage_brought(tmp_path: Path) -> None:
    text = str(lead(four(tmp_path)))
    assert "8 finished runs, 4 arms: 3 classes, 6 training images (from 3 down to 1 a class) on 2 clients." in text
    assert f"<bdi>pre</bdi>): <strong>62.0 ± 2.8</strong>{SPACE}%, +20.0 ± 0.0 points" in text
    assert f"<bdi>both</bdi>): <strong>72.0 ± 9.9</strong>{SPACE}%, +30.0 ± 7.1 points" in text
    assert "among the last 20" in text
    assert f"The rarest class, last round: 21.0 ± 1.4{SPACE}% alone" in text
    assert "No test image was found among" in text
    assert "differ in more than" not in text


def test_losses_are_not_hidden() -> None:
    assert points(Value(-0.031, 0.004)) == "−3.1 ± 0.4 points"
    assert points(None) == "–"


def test_arms_that_share_their_stages_are_not_compared_by_stage(tmp_path: Path) -> None:
    found = read([run_folder(tmp_path, "fedavg", accuracy=0.5), run_folder(tmp_path, "fedprox", accuracy=0.7)])
    assert stages(found.arms) == {}
    text = str(lead(found))
    assert f"<bdi>fedprox</bdi> <strong>70.0</strong>{SPACE}%, the highest of 2; the lowest is" in text


def test_leaks_are_said(tmp_path: Path) -> None:
    assert "Up to 3 test images" in str(lead(read([run_folder(tmp_path, leaks={"train/test": 1, "open/test": 2})])))
    assert "was not recorded" in str(lead(read([run_folder(tmp_path, leaks=None)])))


def test_names_in_the_lead_are_escaped(tmp_path: Path) -> None:
    text = lead(read([run_folder(tmp_path, "<script>alert(1)</script>")]))
    assert isinstance(text, Markup) and "<script>" not in text and "&lt;script&gt;" in text
