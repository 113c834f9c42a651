"""docs/deploy.md, from an empty folder to a finished round: its commands are run in their order, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_fl.cli import parser
from mllm_fl.deployment import processes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "deploy.md"

AGAIN = """mllm-fl() {
  case "$2" in run|up) command mllm-fl "$@" || command mllm-fl "$@" || command mllm-fl "$@";; *) command mllm-fl "$@";; esac
}"""
"""A machine too busy for Flower stops a run; the same line takes it up again."""


def commands(kind: str) -> list[str]:
    """The lines of the page's blocks of this kind."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_on_the_page_is_one_that_is_understood() -> None:
    lines = [line for line in commands("sh") + commands("console") if line.startswith("mllm-fl ")]
    assert len(lines) >= 10
    for line in lines:
        words = re.findall(r'"[^"]*"|\S+', line.removesuffix(" &"))[1:]
        parser().parse_args([w.strip('"') for w in words])


@pytest.mark.deploy
def test_the_page_leads_from_an_empty_folder_to_a_finished_round(config: Path, tmp_path: Path, steady: Path) -> None:
    folder = steady / "empty"
    folder.mkdir()
    (folder / "run.toml").write_text(config.read_text())
    [port] = processes.free_ports(1)
    script = "\n".join(["set -e", AGAIN, *commands("sh")]).replace("--port 8000", f"--port {port}")
    bin = str(Path(sys.executable).parent)
    env = os.environ | {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "said"
    with open(log, "w") as out:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            assert process.wait(3000) == 0, log.read_text()
        finally:
            processes.end(process)  # type: ignore[arg-type]
    said = log.read_text()
    assert said.count("finished: accuracy") == 2 and "site north: online" in said and "2 rounds done, finished" in said
    assert len(list(folder.glob("federation/runs/*/*/final.json"))) == 1
