"""The page: numbers equal the records they come from, nothing leaves the page, hostile names are shown and not obeyed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests import toy

from mllm_fl.data.describe import summary
from mllm_fl.data.longtail import groups
from mllm_fl.engines.local import LocalConfig
from mllm_fl.errors import UserError
from mllm_fl.report import build
from mllm_fl.report.html import escape
from mllm_fl.runs import RunFolder
from mllm_fl.stages.federate import federate
from mllm_fl.stages.outcome import outcome
from mllm_fl.stages.schedule import FederateConfig
from mllm_fl.toml import to_dict

HOSTILE = "<script>alert('x')</script> \"quoted\" \u202egnirts " + "long " * 40


def finished(root: Path, arm: str, seed: int, stages: tuple[bool, bool] = (False, False)) -> Path:
    """A real run of two rounds on the toy, with the record that the chain would write."""
    fed = toy.federation()
    task, w = toy.task(fed, seed)
    config = FederateConfig(rounds=2, clients_per_round=2, local=LocalConfig(epochs=1, augment="none"))
    with RunFolder(
        root / f"run-{len(list(root.iterdir())) if root.exists() else 0}", {"seed": seed, "federate": {"arm": arm}}
    ) as run:
        state = federate(config, task, fed, w, run)
        found = groups(fed.class_counts)
        run.write_json("federation.json", summary(fed))
        final = outcome(config, task, state, fed.test, found, run)
        final["seconds"]["total"] = sum(final["seconds"].values())
        run.write_json(
            "final.json",
            {
                "experiment": "e", "name": run.path.name, "arm": arm, "seed": seed, "config_hash": f"{arm[:3]}{seed}", "class_counts": fed.class_counts,
                "groups": to_dict(found), "stages": {"pretrain": stages[0], "align": stages[1]}, "leaks": {"train/test": 0}, "command": "x", **final,
            },
        )  # fmt: skip
        return run.path


class Page(HTMLParser):
    """Tags with their attributes, and the text by table cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self._cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._cell:
            self.cells[-1] += data


def test_numbers_are_those_of_the_records_and_seeds_are_averaged(tmp_path: Path) -> None:
    runs = [finished(tmp_path, "plain", s) for s in (0, 1)] + [finished(tmp_path, "other", 0, (False, True))]
    page = Page(build(runs, tmp_path / "r.html", title="T").read_text())
    last = [json.loads((r / "final.json").read_text())["last"]["accuracy"] for r in runs]
    row = page.cells[page.cells.index("plain") :][:3]
    mean = 50 * (last[0] + last[1])
    assert row[1] == "2"
    assert row[2].startswith(f"{mean:.1f}")
    assert page.cells[page.cells.index("other") :][2] == f"{100 * last[2]:.1f}"
    text = " ".join(page.text)
    assert "federated training alone (" in text and "with alignment (" in text
    assert "federate.arm" in text  # the differing key


def test_nothing_leaves_the_page(tmp_path: Path) -> None:
    html = build([finished(tmp_path, "a", 0)], tmp_path / "r.html").read_text()
    for _, attrs in Page(html).tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attrs.get(name) or ""
            assert value.startswith(("#", "data:image/")) or not value, value
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttp|<link|<iframe", html)
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


def test_hostile_names_are_shown_not_obeyed(tmp_path: Path) -> None:
    html = build([finished(tmp_path, HOSTILE, 0)], tmp_path / "r.html", title=HOSTILE).read_text()
    assert "<script>alert" not in html
    assert html.count("<script>") == 1
    assert "&lt;script&gt;alert" in html
    assert "\u202e" not in html


def test_annotated_images_are_inside_the_page_with_their_truth(tmp_path: Path) -> None:
    from mllm_fl.stages.annotate import AnnotateConfig, annotate

    corpus = annotate(AnnotateConfig(images=2, kinds=("caption",)), tmp_path / "corpus")
    (tmp_path / "runs").mkdir()
    html = build([finished(tmp_path / "runs", "a", 0)], tmp_path / "r.html", corpus=tmp_path / "corpus").read_text()
    said = corpus.records[0].answers[0]
    assert html.count('src="data:image/png;base64,') == 2
    assert escape(said) in html and "Truth: " in html


def test_unfinished_runs_are_named_and_not_counted(tmp_path: Path) -> None:
    done, half = finished(tmp_path, "a", 0), finished(tmp_path, "b", 5)
    (half / "final.json").unlink()
    page = Page(build([done, half], tmp_path / "r.html").read_text())
    assert "1 finished run, 1 arm: 3 classes" in "".join(page.text)
    assert "2 of – rounds" in page.cells  # the toy's config.toml does not say how many


def test_what_cannot_be_reported_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder given"):
        build([], tmp_path / "r.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: not a run folder"):
        build([tmp_path / "empty"], tmp_path / "r.html")
    half = finished(tmp_path / "y", "a", 0)
    (half / "final.json").unlink()
    with pytest.raises(UserError, match="none of 1 runs is finished"):
        build([half], tmp_path / "r.html")
    a, b = finished(tmp_path / "x", "a", 0), finished(tmp_path / "x", "b", 0)
    final = json.loads((b / "final.json").read_text())
    (b / "final.json").write_text(json.dumps(final | {"class_names": ["x", "y", "z"]}))
    with pytest.raises(UserError, match="are not those of"):
        build([a, b], tmp_path / "r.html")
    with open(a / "rounds.jsonl", "a") as f:
        f.write("{broken\n")
    with pytest.raises(UserError, match=r"rounds.jsonl:3: broken line"):
        build([a], tmp_path / "r.html")
    (b / "final.json").write_text("{}")
    with pytest.raises(UserError, match="final.json: class_names is not a list"):
        build([b], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_rejected_updates_are_listed(tmp_path: Path) -> None:
    run = finished(tmp_path, "a", 0)
    row = {"round": 1, "client": 3, "status": "rejected", "reason": "w: NaN"}
    with open(run / "clients.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    assert "w: NaN" in build([run], tmp_path / "r.html").read_text()


def configured(run: Path, text: str) -> Path:
    """The run with another config.toml."""
    (run / "config.toml").write_text(text)
    return run


def test_a_stage_is_not_credited_silently_when_more_differs(tmp_path: Path) -> None:
    a, b = finished(tmp_path, "a", 0), finished(tmp_path, "b", 0, (False, True))
    configured(a, "[federate]\nrounds = 2\n"), configured(b, "[federate]\nrounds = 2\n[align]\nsteps = 1\n")
    assert "differ in more than their stages" not in build([a, b], tmp_path / "r.html").read_text()
    configured(b, "[federate]\nrounds = 3\n[align]\nsteps = 1\n")
    html = build([a, b], tmp_path / "r.html").read_text()
    assert "differ in more than their stages" in html and "<code>federate.rounds</code>" in html


def test_who_holds_what_is_counted_from_the_manifest_when_nothing_else_says(tmp_path: Path) -> None:
    from mllm_fl.data.config import DataConfig
    from mllm_fl.data.federation import build as build_federation
    from mllm_fl.data.manifest import save

    data = DataConfig(source="digits", clients=4, imbalance_factor=30.0)
    federation = build_federation(data)
    run = configured(finished(tmp_path, "a", 0), '[data]\nsource = "digits"\nclients = 4\nimbalance_factor = 30\n')
    final = json.loads((run / "final.json").read_text())
    (run / "federation.json").unlink()
    assert "Not known" in build([run], tmp_path / "r.html").read_text()
    save(federation.manifest, run / "manifest.json")
    eye = [[int(i == j) for j in range(10)] for i in range(10)]
    last = final["last"] | {"per_class": None, "confusion": eye}
    more = {
        "class_names": list(federation.class_names),
        "class_counts": federation.class_counts,
        "groups": None,
        "last": last,
    }
    (run / "final.json").write_text(json.dumps(final | more))
    page = Page(build([run], tmp_path / "r.html").read_text())
    first = summary(federation)["clients"][0]
    row = page.cells.index("client 0")
    assert page.cells[row + 1 : row + 12] == [str(n) for n in [*first["histogram"], first["size"]]]
    configured(run, '[data]\nsource = "digits"\nclients = 5\nimbalance_factor = 30\n')
    assert "Not known" in build([run], tmp_path / "r.html").read_text()  # other data than the manifest's


def test_every_heading_figure_and_table_says_what_it_is(tmp_path: Path) -> None:
    page = Page(build([finished(tmp_path, "a", 0)], tmp_path / "r.html").read_text())
    tags = [t for t, _ in page.tags]
    assert tags.count("h1") == 1 and tags.count("main") == 1 and tags.count("table") == tags.count("caption")
    assert all(a.get("aria-label") or a.get("aria-hidden") for t, a in page.tags if t == "svg")
    assert all(a.get("scope") for t, a in page.tags if t == "th")
    assert dict(next(a for t, a in page.tags if t == "html"))["lang"] == "en"
