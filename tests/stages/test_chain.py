"""The stages one by one and chained, on the real bundled teachers and real digits, small."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tests import tiny_llava

from mllm_fl.config import Config, from_dict
from mllm_fl.data.check import known, leaks
from mllm_fl.data.images import ImageSet
from mllm_fl.errors import UserError
from mllm_fl.events import Event
from mllm_fl.models.teacher.clip import load_clip
from mllm_fl.models.teacher.located import fingerprint
from mllm_fl.stages import chain, prepare, stage_one
from mllm_fl.stages.align import AlignConfig
from mllm_fl.stages.alignment_images import alignment_set
from mllm_fl.stages.annotate import AnnotateConfig
from mllm_fl.stages.pretrain import PretrainConfig
from mllm_fl.stages.shared import network_of
from mllm_fl.trees import digest

RAW: dict[str, Any] = {
    "experiment": "small",
    "name": "both",
    "data": {"source": "digits", "imbalance_factor": 10, "clients": 4},
    "model": {"width": 4, "adapter": "linear", "adapter_dim": 128, "feature_norm": "layernorm"},
    "annotate": {"images": 12, "kinds": ["caption"]},
    "pretrain": {"steps": 3, "batch_size": 4, "alpha": "one"},
    "federate": {
        "rounds": 2,
        "clients_per_round": 2,
        "evaluate_every": 2,
        "evaluate_last": 1,
        "local": {"epochs": 1, "augment": "none"},
    },
    "align": {"source": "glyphs", "per_class": 4, "steps": 2, "augment": "none"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def config(**changes: Any) -> Config:
    return from_dict(RAW | changes, "test")


def test_all_stages_chained_and_the_second_arm_shares_their_work(root: Path) -> None:
    stages: list[str] = []
    final = chain.run(config(), root, progress=lambda e: stages.append(e.stage))
    assert final["stages"] == {"pretrain": True, "align": True}
    assert {"annotate", "pretrain", "federate"} <= set(stages)
    assert final["leaks"] == {"train/test": 0, "align/test": 0, "open/test": 0}
    assert final["align"]["images"] == 40
    assert final["teacher"] == load_clip("mini").record()
    assert final["pretrained"]["teacher"]["fingerprint"] == fingerprint("mini")
    stages.clear()
    other = chain.run(config(name="no-align", align=False), root, progress=lambda e: stages.append(e.stage))
    assert "annotate" not in stages
    assert other["stages"] == {"pretrain": True, "align": False}
    assert other["teacher"] is None and other["pretrained"] == final["pretrained"]
    assert len(list((root / "small").glob("corpus-*"))) == len(list((root / "small").glob("pretrain-*"))) == 1


def test_pretraining_changes_backbone_and_adapter_but_not_the_classifier(root: Path) -> None:
    c = config()
    fresh, w = network_of(c).state_dict(), chain.pretrain_stage(c, root)
    assert not torch.equal(w["backbone.conv.weight"], fresh["backbone.conv.weight"])
    assert not torch.equal(w["adapter.weight"], fresh["adapter.weight"])
    assert torch.equal(w["classifier.weight"], fresh["classifier.weight"])


def test_two_runs_may_take_finished_weights_at_once(root: Path) -> None:
    c = config()
    first = chain.pretrain_stage(c, root)
    with FileLock(str(chain.pretrain_path(c, root) / ".lock")):  # as if another arm were reading just now
        again = chain.pretrain_stage(c, root)
    assert digest(again) == digest(first)


def test_a_finished_run_is_not_run_again(root: Path) -> None:
    first = chain.run(config(), root)

    def fail(event: Event) -> None:
        raise AssertionError(event)

    assert chain.run(config(), root, progress=fail) == first


def stopped(c: Config, root: Path) -> Path:
    """The folder of a run that somebody stopped after its first round."""

    def stop(event: Event) -> None:
        if event.stage == "federate" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chain.run(c, root, progress=stop, command="first")
    return chain.run_path(c, root)


def test_a_resumed_run_is_held_against_its_beginning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(name="resumed", pretrain=False, annotate=False, align=False)
    path = stopped(c, root)
    manifest, env = ((path / n).read_bytes() for n in ("manifest.json", "env.json"))
    whole = chain.federation_of(c)
    other = dataclasses.replace(whole.manifest, clients=whole.manifest.clients[::-1])
    with monkeypatch.context() as patched:
        patched.setattr(chain, "federation_of", lambda c: dataclasses.replace(whole, manifest=other))
        with pytest.raises(
            UserError, match=r"manifest\.json: the run was begun with another federation: clients differ;"
        ):
            chain.run(c, root)
    now = {k: v for k, v in json.loads(env).items() if k != "command"} | {"torch": "9.9"}
    monkeypatch.setattr(chain, "environment", lambda: now)
    final = chain.run(c, root, command="second")
    assert (path / "manifest.json").read_bytes() == manifest
    assert (path / "env.json").read_bytes() == env  # the beginning's; what changed is said besides
    assert final["environment_changes"] == [[f"torch ({torch.__version__} -> 9.9)"]]


def test_the_saved_model_is_the_one_that_was_measured(root: Path) -> None:
    final = chain.run(config(), root)
    network, record = chain.load_model(chain.run_path(config(), root) / "model.safetensors")
    test = chain.federation_of(config()).test
    assert record["class_names"] == list(test.class_names)
    with torch.no_grad():
        right = network(test.normalised(range(len(test))))[1].argmax(1) == torch.from_numpy(test.labels)
    assert float(right.double().mean()) == pytest.approx(final["last"]["accuracy"])


def d_align(c: Config, fed: Any) -> ImageSet:
    assert c.align is not None
    return alignment_set(c.align, fed, c.data)


def test_the_prompts_of_the_teacher_table_are_those_that_give_q(tmp_path: Path) -> None:
    c = config(teacher={"templates": ["the {}"]})
    fed = chain.federation_of(c)
    images = d_align(c, fed)
    asked, own = (chain.aligner_of(x, fed, images, tmp_path) for x in (c, config()))
    assert asked is not None and own is not None and asked.teacher is not None
    expected = load_clip("mini").zero_shot(images.read(range(len(images))), fed.class_names, ["the {}"])
    assert torch.allclose(asked.q_logits, expected, atol=1e-4)  # of another batch size: the last bits differ
    assert not torch.allclose(own.q_logits, expected, atol=1e-1)
    assert asked.teacher["templates"] == ["the {}"]


def test_alignment_alone_needs_a_finished_federation_and_then_aligns_it(root: Path) -> None:
    c = config(name="alone", pretrain=False, annotate=False)
    with pytest.raises(UserError, match="no finished federation here; run `mllm-fl federate`"):
        chain.align_finished(c, root)
    plain = chain.run(dataclasses.replace(c, align=None), root)
    aligned = chain.align_finished(c, root)
    assert aligned["before_align"] == plain["last"]
    path = chain.run_path(dataclasses.replace(c, align=None), root)
    assert json.loads((path / "aligned.json").read_text())["last"] == aligned["last"]
    assert json.loads((path / "final.json").read_text()) == plain
    assert (path / "aligned.safetensors").exists()
    assert plain["teacher"] is None and aligned["teacher"]["fingerprint"] == load_clip("mini").fingerprint
    assert c.align is not None
    labels = dataclasses.replace(c, align=dataclasses.replace(c.align, control="ce"))
    part = chain.align_finished(labels, root, run=path)
    assert (aligned["arm"], part["arm"]) == ("alone, aligned once", "alone, aligned once (ce)")


def test_test_images_in_the_alignment_set_stop_the_run_unless_declared(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(name="leak", pretrain=False, annotate=False)
    test = chain.federation_of(c).test

    def cheat(*args: Any) -> ImageSet:
        return test.subset([i for k in range(10) for i in [int((test.labels == k).argmax())]])

    monkeypatch.setattr(chain, "alignment_set", cheat)
    with pytest.raises(
        UserError,
        match=r"data.leaks_declared: 10 images are also in the test set \(train/test: 0, align/test: 10\); remove them, or declare",
    ):
        chain.run(c, root)
    assert (
        chain.run(dataclasses.replace(c, data=dataclasses.replace(c.data, leaks_declared=10)), root)["leaks"][
            "align/test"
        ]
        == 10
    )


def web_folder(root: Path, test: ImageSet, size: int) -> Path:
    """A folder of images per class in which one image of the first class is the first test image, stored as it is: 8 x 8."""
    (path, shape) = (root / "web", (size, size, 3))
    for c, name in enumerate(test.class_names):
        (path / name).mkdir(parents=True)
        for i in range(2):
            noise = np.random.default_rng(100 * c + i).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(noise).save(path / name / f"{i}.png")
    stored = next(iter(test.pairs([0])))[0]
    Image.fromarray(stored.transpose(1, 2, 0).copy()).save(path / test.class_names[0] / "2.png")
    return path


def test_a_test_image_among_the_open_or_alignment_images_is_found_before_anything_is_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is stored at another size than the test images are read at: equal only as stored."""
    c = config(name="paid", data=RAW["data"] | {"image_size": 24}, align=False, annotate=False, pretrain=False)
    test = chain.federation_of(c).test
    web = web_folder(tmp_path, test, 48)
    for module, name in ((stage_one, "annotate"), (stage_one, "pretrain"), (prepare, "load_teacher")):

        def paid(*args: Any, name: str = name, **kwargs: Any) -> None:
            raise AssertionError(name)

        monkeypatch.setattr(module, name, paid)
    asked = dataclasses.replace(
        c,
        annotate=AnnotateConfig(source=f"folder:{web}", images=30, image_size=16),
        pretrain=PretrainConfig(steps=1),
    )
    says = r"data.leaks_declared: 1 images are also in the test set \((train/test: 0, )?open/test: 1\)"
    for stage in (chain.run, chain.pretrain_stage):
        with pytest.raises(UserError, match=says):
            stage(asked, tmp_path)
    aligned = dataclasses.replace(c, align=AlignConfig(source=f"folder:{web}", per_class=2, seed=2))
    drawn = d_align(aligned, chain.federation_of(c))
    assert drawn.class_names == test.class_names  # zero, one, ..., not in the order of the folders' names
    assert drawn.labels.tolist() == [k for k in range(10) for _ in range(2)]
    assert leaks(drawn.subset([0, 1]), test) == leaks(drawn, test) == 1  # the copy, which this seed draws
    with pytest.raises(UserError, match=r"\(train/test: 0, align/test: 1\)"):
        chain.run(aligned, tmp_path)
    chain.run(c, tmp_path)
    with pytest.raises(UserError, match=r"1 images are also in the test set \(align/test: 1\)"):
        chain.align_finished(aligned, tmp_path)


def test_training_images_that_are_test_images_are_counted(tmp_path: Path) -> None:
    c = config(pretrain=False, annotate=False, align=False)
    fed = chain.federation_of(c)
    sets = {
        "train": fed.test.subset([1, 2, 3]),
        "align": fed.test.subset([5]),
        "unlabelled": fed.train,
        "labelled": None,
    }
    declared = dataclasses.replace(c, data=dataclasses.replace(c.data, leaks_declared=4))
    expected = {"train/test": 3, "align/test": 1, "unlabelled/test": 0}
    assert chain.leaks_of(declared, tmp_path, fed, sets) == expected
    with pytest.raises(UserError, match="4 images are also in the test set"):
        chain.leaks_of(c, tmp_path, fed, sets)


def test_pretraining_normalises_as_the_federation_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config()
    fed = chain.federation_of(c)
    other = dataclasses.replace(fed, train=dataclasses.replace(fed.train, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    seen: dict[str, Any] = {}
    monkeypatch.setattr(stage_one, "federation_of", lambda c: other)
    monkeypatch.setattr(stage_one, "annotate_stage", lambda *args: tmp_path)
    monkeypatch.setattr(stage_one, "pretrain", lambda *args, **more: seen.update(more))
    chain.pretrain_stage(c, tmp_path)
    assert (seen["mean"], seen["std"], seen["side"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 16)


def test_a_finished_corpus_is_checked_itself_when_its_source_is_gone(tmp_path: Path) -> None:
    c = config(data=RAW["data"] | {"image_size": 24})
    test = chain.federation_of(c).test
    asked = dataclasses.replace(
        c, annotate=AnnotateConfig(source=f"folder:{web_folder(tmp_path, test, 48)}", images=30)
    )
    corpus = tiny_llava.corpus(chain.corpus_path(asked, tmp_path))
    assert chain.open_leaks(asked, tmp_path, known(test)) == 1
    shutil.rmtree(tmp_path / "web")
    assert chain.open_leaks(asked, tmp_path, known(test)) == 0
    stored = next(iter(test.pairs([7])))[0]
    Image.fromarray(stored.transpose(1, 2, 0).copy()).save(corpus / "images/3.png")
    assert chain.open_leaks(asked, tmp_path, known(test)) == 1


def test_unknown_alignment_source_is_refused() -> None:
    c = config(align={"source": "glyhps"})
    with pytest.raises(
        UserError,
        match="align.source: unknown source 'glyhps'; use glyphs, leftover, val, folder:PATH, hf:NAME or open:PATH",
    ):
        d_align(c, chain.federation_of(c))
