"""What an annotation would cost is said before anything is asked, from the ledger where it knows, from guesses where it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mllm_fl.annotate.ledger import Entry, Key, Ledger
from mllm_fl.annotate.prompts import INSTRUCT
from mllm_fl.cli import main
from mllm_fl.errors import UserError
from mllm_fl.stages.annotate_config import FREE, AnnotateConfig
from mllm_fl.stages.annotate_plan import estimate

CONFIG = AnnotateConfig(
    images=100,
    image_size=512,
    kinds=("caption",),
    backend="openai",
    model="m",
    base_url="http://127.0.0.1:9/v1",
    concurrency=4,
)


@pytest.fixture
def prices(tmp_path: Path) -> str:
    path = tmp_path / "prices.toml"
    path.write_text("[m]\ninput = 1.0\noutput = 10.0\n")
    return str(path)


def test_without_answers_it_guesses_and_says_so(prices: str, tmp_path: Path) -> None:
    found = estimate(replace(CONFIG, prices=prices), tmp_path / "none")
    assert (found.pictures, found.questions, found.answered, found.calls) == (100, 100, 0, 100)
    assert found.completion_tokens == 100 * 20
    assert found.prompt_tokens > 100 * (85 + 170)
    assert found.cost == pytest.approx((found.prompt_tokens + 10 * 2000) / 1e6)
    assert found.most == pytest.approx((found.prompt_tokens + 10 * 100 * 256) / 1e6)
    assert found.seconds == pytest.approx(100 * (1 + 0.02 * 20) / 4)
    assert "guesses" in found.basis
    assert not (tmp_path / "none").exists()
    slow = estimate(replace(CONFIG, requests_per_minute=10.0), tmp_path / "none")
    assert (slow.seconds, slow.cost) == (600, None)
    assert "give annotate.prices" in slow.text()


def test_with_answers_it_takes_their_means(prices: str, tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        keys = [Key(f"{i:064x}", "caption", INSTRUCT["caption"].version, "m", "{}") for i in range(25)]
        ledger.write([(k, Entry(("a",), None, 1000, 30, 2.0, 0.0013, 1)) for k in keys])
    found = estimate(replace(CONFIG, prices=prices, batch=True), tmp_path)
    assert (found.answered, found.calls, found.prompt_tokens, found.completion_tokens) == (25, 75, 75_000, 2250)
    assert found.cost == pytest.approx(0.5 * (75_000 + 22_500) / 1e6)
    assert found.spent == pytest.approx(25 * 0.0013)
    assert found.seconds == pytest.approx(75 * 2.0 / 4)
    assert found.basis == "the ledger's means for caption (25)"


def test_pictures_of_a_folder_are_counted_and_a_few_are_measured(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.zeros((600, 400, 3), np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no")
    one = replace(CONFIG, source=f"folder:{tmp_path}", image_size=None)
    found = estimate(one, tmp_path / "none")
    assert found.pictures == 4
    assert found.prompt_tokens > 4 * (85 + 2 * 170)  # two tiles of 512 pixels
    with pytest.raises(UserError, match="is not a folder"):
        estimate(replace(one, source="folder:/nowhere"), tmp_path / "none")
    with pytest.raises(UserError, match="'mini' costs nothing"):
        estimate(AnnotateConfig(), tmp_path / "none")


def test_the_verb_says_it_and_refuses_a_cap_without_prices(
    prices: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'experiment = "t"\n[data]\nsource = "digits"\n[annotate]\nbackend = "openai"\nmodel = "m"\nkinds = ["caption"]\nimages = 8\n'
        'base_url = "http://127.0.0.1:9/v1"\nretries = 0\n'
    )
    asked = ["annotate", str(path), "--runs", str(tmp_path / "runs")]
    assert main([*asked, "--dry-run", "--prices", prices, "--rpm", "2"]) == 0
    said = capsys.readouterr().out
    assert "calls     8" in said
    assert "time      about 4.0 min" in said
    assert not (tmp_path / "runs").exists()
    assert main([*asked, "--max-cost", "1"]) == 2
    assert "annotate.max_cost: needs prices" in capsys.readouterr().err
    assert main([*asked, "--arm", "nobody"]) == 2
    assert "'nobody' is not an arm" in capsys.readouterr().err
    assert main(asked) == 2
    assert "no connection" in capsys.readouterr().err


def test_how_fast_and_for_how_much_is_no_part_of_a_corpus_and_its_name() -> None:
    fast = replace(
        CONFIG,
        base_url="http://elsewhere/v1",
        concurrency=64,
        max_requests=5,
        requests_per_minute=9.0,
        retries=1,
        again=3,
    )
    assert fast.named_by() == replace(CONFIG, base_url=None, concurrency=16).named_by()
    assert fast.lasting() == CONFIG.lasting()
    assert not set(FREE) & set(CONFIG.lasting())
    assert replace(CONFIG, max_side=512).named_by() != CONFIG.named_by()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_requests": 0}, r"max_requests: 0 is below 1"),
        ({"max_cost": 0.0}, r"max_cost: 0 is not above 0"),
        ({"requests_per_minute": -1.0}, "requests_per_minute: -1 is not above 0"),
        ({"backend": "mini", "batch": True}, r"annotate\.batch: belongs to an endpoint"),
        ({"again": -1}, "negative"),
    ],
)
def test_bad_caps_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(CONFIG, **change)  # type: ignore[arg-type]
