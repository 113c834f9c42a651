"""Stage 1b: only the compact model learns, on what the paper says, and a killed run ends with the same bytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from tests import tiny_llava

from mllm_fl.annotate.corpus import Corpus
from mllm_fl.engines.checkpoint import load_checkpoint
from mllm_fl.errors import UserError
from mllm_fl.events import Event, silent
from mllm_fl.models.network import ModelConfig, Network, build_network
from mllm_fl.models.teacher.blend import lm_loss
from mllm_fl.models.teacher.conversation import collate, encode
from mllm_fl.models.teacher.llava import LlavaTeacher, load_llava
from mllm_fl.models.teacher.located import fingerprint
from mllm_fl.stages import pretrain as stage
from mllm_fl.stages.pretrain import PretrainConfig, alpha_at, lr_at, pretrain
from mllm_fl.stages.pretraining import run as run_of
from mllm_fl.stages.pretraining.parallel import World
from mllm_fl.stages.pretraining.store import alone
from mllm_fl.trees import digest

CONFIG = PretrainConfig(steps=6, batch_size=8, checkpoint_every=2)


def network(dim: int = tiny_llava.WIDTH) -> Network:
    return build_network(ModelConfig(width=4, adapter="linear", adapter_dim=dim), 10, 0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LlavaTeacher:
    return load_llava(str(tiny_llava.save_tiny(tmp_path_factory.mktemp("llava"))))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava.corpus(tmp_path_factory.mktemp("corpora") / "corpus")


def begun(
    config: PretrainConfig, corpus: Path, teacher: LlavaTeacher, folder: Path, seed: int = 0, net: Network | None = None
) -> run_of.Run:
    """A pretraining that is ready for its first step."""
    folder.mkdir(exist_ok=True)
    config = replace(config, image_size=config.image_size or 16)
    run = run_of.Run(config, net or network(), corpus, teacher, folder, seed, {}, World(), silent)
    run.prepare(teacher, "cpu", (0.5,) * 3, (0.5,) * 3)
    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pretrain.jsonl").read_text().splitlines()]


def test_the_papers_alpha_is_a_cosine_over_half_the_steps_then_one() -> None:
    alphas = [alpha_at(CONFIG, s, 200) for s in (0, 25, 50, 75, 100, 150, 199)]
    assert alphas == pytest.approx([0, 0.1464, 0.5, 0.8536, 1, 1, 1], abs=1e-4)  # S = 100
    assert [alpha_at(replace(CONFIG, alpha="linear"), s, 200) for s in (0, 25, 100)] == [0, 0.25, 1]
    assert [alpha_at(replace(CONFIG, alpha="one"), s, 200) for s in (0, 199)] == [1, 1]
    assert alpha_at(replace(CONFIG, alpha_until=0.0), 0, 200) == 1


def test_learning_rate_warms_up_and_falls_on_a_cosine() -> None:
    c = replace(CONFIG, lr=1.0, warmup=0.1)
    assert [lr_at(c, s, 20) for s in (0, 1, 2, 11)] == pytest.approx([0.5, 1, 1, 0.5])
    assert lr_at(c, 19, 20) == pytest.approx(0.5 * (1 + math.cos(math.pi * 17 / 18)))
    assert lr_at(replace(c, warmup=0.0), 0, 20) == 1


def test_only_backbone_and_adapter_change_and_the_callers_network_does_not(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path
) -> None:
    net, frozen = network(), digest(teacher.model.state_dict())
    before = digest(net.state_dict())
    w = pretrain(CONFIG, net, corpus, tmp_path, teacher=teacher)
    assert digest(net.state_dict()) == before
    assert digest(teacher.model.state_dict()) == frozen
    assert all(p.grad is None for p in teacher.model.parameters())
    changed = {k.split(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, w[k])}
    assert changed == {"backbone", "adapter"}


def test_alpha_zero_teaches_exactly_nothing(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    net = network()
    w = pretrain(replace(CONFIG, alpha="zero"), net, corpus, tmp_path, teacher=teacher)
    assert all(torch.equal(p, w[k]) for k, p in net.named_parameters())
    assert {r["grad_norm"] for r in rows(tmp_path)} == {0.0}


@pytest.mark.parametrize(
    "change", [{"alpha": "one"}, {"alpha": "one", "feature_mse": 1.0}, {"objective": "features"}, {"alpha": "paper"}]
)
def test_the_loss_falls(teacher: LlavaTeacher, corpus: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = replace(CONFIG, steps=60, batch_size=16, checkpoint_every=60, lr=1e-2, **change)
    pretrain(config, network(), corpus, tmp_path, teacher=teacher)
    key = "feature_mse" if config.objective == "features" or config.feature_mse else "lm_loss"
    last = [r[key] for r in rows(tmp_path)][-16:]
    full_alpha = [r[key] for r in rows(tmp_path) if r["alpha"] == 1]
    assert (
        sum(last) / 16 < full_alpha[0]
        if config.alpha == "one" or key == "feature_mse"
        else all(map(math.isfinite, last))
    )


def test_first_loss_by_hand(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    """At alpha = 1 the first row is LLaVA's loss with the untrained network's tokens, plus the weighted error to CLIP's features."""
    config = replace(CONFIG, alpha="one", feature_mse=3.0, batch_size=32, steps=1)  # the whole corpus in one batch
    pretrain(config, network(), corpus, tmp_path, teacher=teacher, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    c = Corpus.open(corpus)
    x = c.pixels()[[c.images.index(r.image) for r in c.records]]
    student = (
        network()
        .train()
        .tokens(
            (x.float() / 255 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
            / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1),
            4,
        )
    )
    samples = [
        encode(teacher, [(r.turns[i].text, r.turns[i + 1].text) for i in range(0, len(r.turns), 2)], 512, "")
        for r in c.records
    ]
    lm = lm_loss(teacher, *collate(samples, teacher.processor.tokenizer.pad_token_id), student, 1.0, None)
    mse = (student - teacher.features(x)).square().mean()
    (row,) = rows(tmp_path)
    assert row["lm_loss"] == pytest.approx(float(lm.detach()), rel=1e-5)
    assert row["loss"] == pytest.approx(float((lm + 3 * mse).detach()), rel=1e-5)


@pytest.mark.parametrize("alpha", ["zero", "one"])
def test_the_conversations_in_the_language_model_meet_their_own_pictures(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path, alpha: Literal["zero", "one"]
) -> None:
    """With ``lm_samples`` the first few of the batch, by hand: at alpha 0 CLIP's features, at alpha 1 the compact model's tokens."""
    config = replace(CONFIG, alpha=alpha, feature_mse=1.0, batch_size=6, lm_samples=2, steps=1, max_tokens=512)
    c, net = Corpus.open(corpus), network()
    run = begun(config, corpus, teacher, tmp_path)
    batch = run.stream.positions(0, 6)
    images = torch.tensor([c.images.index(c.records[int(i)].image) for i in batch])
    x = c.pixels(16)[images]
    tokens = net.train().tokens((x.float() / 255 - 0.5) / 0.5, teacher.grid)[:2]
    said = collate([run.stream.sample(int(i)) for i in batch[:2]], teacher.processor.tokenizer.pad_token_id)
    z = teacher.features(x[:2]) if alpha == "zero" else None
    expected = lm_loss(teacher, *said, tokens, float(alpha == "one"), z)
    assert len(set(images.tolist())) > 2
    assert run.step(0)["lm_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_scheduled_rate_and_the_clipped_gradient_reach_the_weights(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path
) -> None:
    """AdamW's first step moves each weight by lr g / (|g| + 1e-8): by the rate of step 0, and hardly when g is clipped to nothing."""
    start = network().state_dict()

    def moved(name: str, **change: Any) -> float:
        w = pretrain(
            replace(CONFIG, steps=1, alpha="one", **change), network(), corpus, tmp_path / name, teacher=teacher
        )
        return float(max((w[k] - start[k]).abs().max() for k, _ in network().named_parameters()))

    assert moved("warm", epochs=2.0, batch_size=64, warmup=0.0) == pytest.approx(CONFIG.lr, rel=1e-2)
    run = begun(replace(CONFIG, steps=10, warmup=0.5, alpha="one"), corpus, teacher, tmp_path)
    run.step(0)
    first = float(max((p.detach() - start[k]).abs().max() for k, p in run.learner.trainable.items()))
    assert first == pytest.approx(CONFIG.lr / 5, rel=1e-2)
    assert moved("clipped", grad_clip=1e-12) < 1e-3 * CONFIG.lr


def test_at_alpha_one_clip_is_never_run(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    handle = teacher.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        pretrain(replace(CONFIG, alpha="one"), network(), corpus, tmp_path / "one", teacher=teacher)
        assert calls == []
        pretrain(CONFIG, network(), corpus, tmp_path / "paper", teacher=teacher)
        assert len(calls) == 1  # all sixteen pictures at once, kept
    finally:
        handle.remove()


def test_without_room_for_features_the_result_is_the_same(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = pretrain(CONFIG, network(), corpus, tmp_path / "a", teacher=teacher)
    monkeypatch.setattr(run_of, "CACHE_LIMIT", 0)
    computed = pretrain(CONFIG, network(), corpus, tmp_path / "b", teacher=teacher)
    for k, v in kept.items():  # another batch through CLIP: rounding only
        torch.testing.assert_close(computed[k], v, rtol=1e-3, atol=1e-4)


def test_every_sample_comes_once_per_epoch_in_the_order_of_its_stream(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path
) -> None:
    run = begun(CONFIG, corpus, teacher, tmp_path / "a", seed=3)
    drawn = torch.cat([run.stream.positions(s, 8) for s in range(8)]).tolist()
    assert sorted(drawn[:32]) == sorted(drawn[32:]) == list(range(32))
    assert drawn[:32] != drawn[32:]
    assert run.stream.positions(5, 8).tolist() == drawn[40:48]
    assert begun(CONFIG, corpus, teacher, tmp_path / "b", seed=4).stream.positions(0, 8).tolist() != drawn[:8]
    assert begun(replace(CONFIG, epochs=2.0), corpus, teacher, tmp_path / "c").steps == 8


def test_the_compact_models_input_gives_one_position_per_feature(teacher: LlavaTeacher, tmp_path: Path) -> None:
    """ResNet-8 has stride 4, so a grid of 4 x 4 asks for 16 pixels, whatever size the pictures are; other networks take the clients' size."""
    source = tiny_llava.corpus(tmp_path / "c")
    for file in (source / "images").iterdir():
        Image.open(file).resize((40, 36)).save(file)

    def size(config: PretrainConfig, net: Network, name: str, side: int | None = None) -> int:
        pretrain(replace(config, steps=1, checkpoint_every=1), net, source, tmp_path / name, teacher=teacher, side=side)
        return int(json.loads((tmp_path / name / "pretrain.json").read_text())["image_size"])

    assert network().backbone(torch.zeros(1, 3, 16, 16)).shape[-1] == teacher.grid
    assert size(CONFIG, network(), "default", side=24) == 16
    assert size(replace(CONFIG, image_size=20), network(), "asked", side=24) == 20
    other: Any = SimpleNamespace(backbone=torch.nn.Identity())  # of another stride
    assert [stage._side_of(CONFIG, other, teacher, side) for side in (32, None)] == [32, None]
    assert Corpus.open(source).pixels(None).shape[-1] == 36


def test_a_parameter_without_gradient_is_saved_and_resumed(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    def idle() -> Network:
        net = network()
        net.register_parameter("idle", torch.nn.Parameter(torch.ones(2)))
        return net

    def stop(event: Event) -> None:
        if event.done == 3:
            raise KeyboardInterrupt

    whole = pretrain(CONFIG, idle(), corpus, tmp_path / "whole", teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, idle(), corpus, tmp_path / "stopped", teacher=teacher, progress=stop)
    assert digest(pretrain(CONFIG, idle(), corpus, tmp_path / "stopped", teacher=teacher)) == digest(whole)
    assert torch.equal(whole["idle"], torch.ones(2))


def test_a_fresh_adapter_is_handed_over_on_request(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    kept = pretrain(CONFIG, network(), corpus, tmp_path / "kept", teacher=teacher)
    fresh = pretrain(replace(CONFIG, hand_over="backbone"), network(), corpus, tmp_path / "fresh", teacher=teacher)
    assert torch.equal(fresh["adapter.weight"], network().adapter.weight)  # type: ignore[arg-type]
    assert not torch.equal(kept["adapter.weight"], fresh["adapter.weight"])
    assert torch.equal(kept["backbone.conv.weight"], fresh["backbone.conv.weight"])


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from mllm_fl.models.teacher.conversation import collate, encode
from mllm_fl.models.teacher.llava import load_llava
from mllm_fl.stages.pretrain import pretrain
from tests.stages.test_pretrain import CONFIG, network
left, real_sync, real_replace = 0, os.fsync, os.replace
def point(*_):
    global left
    left -= 1
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
def sync(fd):
    point(); real_sync(fd)
def replace(a, b):
    point(); real_replace(a, b); point()
os.fsync, os.replace = sync, replace
teacher = load_llava(sys.argv[1])
for fatal in sys.argv[4:]:
    left = int(fatal)
    pid = os.fork()
    if pid == 0:
        pretrain(CONFIG, network(), Path(sys.argv[2]), Path(sys.argv[3], fatal), teacher=teacher, progress=point)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, fatal
"""


def test_killed_anywhere_it_resumes_to_the_same_bytes(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    expected = digest(pretrain(CONFIG, network(), corpus, tmp_path / "whole", teacher=teacher))
    points = [
        str(n) for n in (2, 7, 10, 14, 29, 31)
    ]  # the index written, in a step, in and after a save, before and after pretrain.json
    command = [sys.executable, "-c", KILLED, teacher.name, str(corpus), str(tmp_path), *points]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    curve = (tmp_path / "whole/pretrain.jsonl").read_bytes()
    for folder in (tmp_path / n for n in points):
        assert (folder / "pretrain.json").exists() == (folder.name == "33")
        steps: list[Event] = []
        assert digest(pretrain(CONFIG, network(), corpus, folder, teacher=teacher, progress=steps.append)) == expected
        assert len([e for e in steps if e.done]) < 6 or int(folder.name) < 12  # it did not begin anew
        assert digest(load_checkpoint(folder / "pretrained.safetensors")[0]) == expected
        assert (folder / "pretrain.jsonl").read_bytes() == curve
        left = sorted(p.name for p in folder.iterdir() if p.name != ".lock")
        assert left == ["preflight.json", "pretrain.json", "pretrain.jsonl", "pretrained.safetensors"]


def test_finished_weights_are_read_again_and_other_settings_refused(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path
) -> None:
    first = pretrain(CONFIG, network(), corpus, tmp_path, teacher=teacher)
    seen: list[Event] = []
    with pytest.raises(UserError, match=r"made with other settings: teacher \("):
        pretrain(CONFIG, network(), corpus, tmp_path, progress=seen.append)  # with "mini"
    assert digest(pretrain(CONFIG, network(), corpus, tmp_path, teacher=teacher, progress=seen.append)) == digest(first)
    assert seen == []
    with pytest.raises(
        UserError, match=r"made with other settings: config\.lr \(0\.002 -> 0\.1\); delete .*, or use another folder"
    ):
        pretrain(replace(CONFIG, lr=0.1), network(), corpus, tmp_path, teacher=teacher)
    told = json.loads((tmp_path / "pretrain.json").read_text())
    assert told["sample"]["predicted"].endswith("<eos>")
    assert (told["steps"], told["samples"], told["images"]) == (6, 32, 16)
    assert told["weights_sha256"] == digest(first)
    before = json.loads((tmp_path / "preflight.json").read_text())
    assert before["teacher"]["image_tokens"] == before["sample"]["image_tokens"] == 16
    assert before["sample"]["tokens_predicted"] == told["sample"]["tokens_predicted"] > 0
    assert told["memory"]["expected"] == sum(v for k, v in before["memory"].items() if k != "total") > 0


def test_weights_made_from_another_teacher_or_corpus_are_refused(tmp_path: Path) -> None:
    """The same names everywhere; only bytes of the teacher's weights, of a picture, or of an answer are others."""
    teacher, source, folder = (
        tiny_llava.save_tiny(tmp_path / "llava"),
        tiny_llava.corpus(tmp_path / "c"),
        tmp_path / "p",
    )
    config = replace(CONFIG, teacher=str(teacher))

    def stop(event: Event) -> None:
        if event.done == 3:
            raise KeyboardInterrupt

    def refused(file: Path, old: bytes, new: bytes, where: str) -> None:
        before = file.read_bytes()
        assert old in before
        file.write_bytes(before.replace(old, new, 1) if old else before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(
            UserError, match=rf"was made with other settings: {where} \([0-9a-f]+ -> [0-9a-f]+\); delete"
        ):
            pretrain(config, network(), source, folder)
        file.write_bytes(before)

    weights, picture, records = teacher / "model.safetensors", source / "images/3.png", source / "records.json"
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, network(), source, folder, progress=stop)
    refused(weights, b"", b"", "teacher")  # unfinished
    first = pretrain(config, network(), source, folder)
    refused(weights, b"", b"", "teacher")  # finished
    refused(picture, b"IEND", b"IEND\0", r"corpus\.pictures")
    refused(records, b"the digit", b"the letter", r"corpus\.records")
    (teacher / "README.md").write_text("says nothing about what the model does")
    assert digest(pretrain(config, network(), source, folder)) == digest(first)
    told = json.loads((folder / "pretrain.json").read_text())["teacher"]
    assert told["fingerprint"] == fingerprint(str(teacher))
    for file in teacher.iterdir():
        file.unlink()
    teacher.rmdir()  # a teacher that is gone is not compared: the weights are finished
    assert digest(pretrain(config, network(), source, folder)) == digest(first)


def test_a_folder_in_use_is_refused(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(UserError, match="another process is pretraining"):
        pretrain(CONFIG, network(), corpus, tmp_path, teacher=teacher)


def test_bad_input_is_one_line(teacher: LlavaTeacher, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus here"):
        pretrain(CONFIG, network(), tmp_path, tmp_path / "x", teacher=teacher)
    with pytest.raises(
        UserError, match=r"model\.adapter_dim: is 12, but the projector of .* takes 8 channels; set it to 8"
    ):
        pretrain(CONFIG, network(12), corpus, tmp_path / "x", teacher=teacher)
    with pytest.raises(UserError, match=r"record 0-caption: nothing to predict: all 20 tokens are masked"):
        pretrain(replace(CONFIG, max_tokens=20), network(), corpus, tmp_path / "y", teacher=teacher)
    with pytest.raises(UserError, match=r"pretrain\.lr: the loss is nan in step"):
        pretrain(replace(CONFIG, alpha="one"), network(), corpus, tmp_path / "z", teacher=teacher, std=(0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, r"pretrain\.steps: 0 is below 1"),
        ({"lr": -1.0}, r"pretrain\.lr"),
        ({"warmup": 2.0}, r"pretrain\.warmup"),
        ({"alpha_until": 1.5}, r"pretrain\.alpha_until"),
        ({"epochs": 0.0}, r"pretrain\.epochs"),
        ({"grad_clip": 0.0}, r"pretrain\.grad_clip"),
        ({"lm_samples": 4}, r"pretrain\.lm_samples"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(CONFIG, **change)


def test_fewer_conversations_in_the_language_model_leave_the_features_whole(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path
) -> None:
    base = replace(CONFIG, alpha="one", feature_mse=1.0, steps=1)
    all_, few = (rows_of(replace(base, lm_samples=n), teacher, corpus, tmp_path / str(n)) for n in (None, 2))
    assert all_["feature_mse"] == few["feature_mse"]
    assert all_["lm_loss"] != few["lm_loss"]


def rows_of(config: PretrainConfig, teacher: LlavaTeacher, corpus: Path, folder: Path) -> dict[str, Any]:
    pretrain(config, network(), corpus, folder, teacher=teacher)
    return rows(folder)[0]


def test_an_unfinished_folder_is_not_continued_with_other_settings(
    teacher: LlavaTeacher, corpus: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, network(), corpus, tmp_path, teacher=teacher, progress=stop)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: was made with other settings: seed \(0 -> 1\)"):
        pretrain(CONFIG, network(), corpus, tmp_path, teacher=teacher, seed=1)
