"""Two real processes under ``torchrun`` on the CPU (gloo) learn what one process learns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_llava
from torch import nn

from mllm_fl.engines.checkpoint import load_checkpoint
from mllm_fl.errors import UserError
from mllm_fl.stages.pretraining.parallel import World, whole_batch_norm

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from mllm_fl.models.network import ModelConfig, build_network
from mllm_fl.stages.pretrain import PretrainConfig, pretrain
teacher, corpus, folder, change = sys.argv[1:5]
stop = int(sys.argv[5]) if len(sys.argv) > 5 else None
config = PretrainConfig(teacher=teacher, steps=6, batch_size=9, lr=5e-4, checkpoint_every=2, alpha="linear", **json.loads(change))
network = build_network(ModelConfig(width=4, adapter="linear", adapter_dim=8), 10, 0)
def progress(event):
    if stop is not None and event.done == stop: raise KeyboardInterrupt
pretrain(config, network, Path(corpus), Path(folder), progress=progress)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("places")
    return str(tiny_llava.save_tiny(folder / "llava")), str(tiny_llava.corpus(folder / "corpus"))


def run(places: tuple[str, str], folder: Path, processes: int, **change: Any) -> tuple[list[dict[str, Any]], Any]:
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launcher, str(script), *places, str(folder), json.dumps(change)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    curve = [json.loads(line) for line in (folder / "pretrain.jsonl").read_text().splitlines()]
    return curve, load_checkpoint(folder / "pretrained.safetensors")[0]


def test_two_processes_learn_what_one_learns(places: tuple[str, str], tmp_path: Path) -> None:
    """Nine samples among two, five and four, frozen layers in halves. The loss agrees to 1e-4, the weights to 1e-3: sums in another order, through six steps of Adam."""
    change = {"feature_mse": 1.0, "lm_samples": 5}
    one, a = run(places, tmp_path / "one", 1, **change)
    two, b = run(places, tmp_path / "two", 2, shard=True, gradient_checkpointing=True, **change)
    assert [r["processes"] for r in two] == [2] * 6
    for x, y in zip(one, two, strict=True):
        assert {k: y[k] for k in x} == pytest.approx(x, rel=1e-4)
    for k in a:
        torch.testing.assert_close(b[k], a[k], rtol=1e-3, atol=1e-3)
    assert json.loads((tmp_path / "two/pretrain.json").read_text())["processes"] == 2


def test_shares_of_a_batch() -> None:
    """Seven samples among three, the first four in the language model: parts of 3, 2 and 2, of which 2, 1 and 1 are the first."""
    batch = torch.arange(7)
    worlds = [World(r, 3) for r in range(3)]
    assert [w.share(batch).tolist() for w in worlds] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [w.share_of(4) for w in worlds] == [2, 1, 1]
    assert World().total([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]


def test_a_batch_norm_that_cannot_see_the_whole_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.name: 1 is a BatchNorm1d, which sees only a process's part"):
        whole_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
