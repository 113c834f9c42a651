"""What clients remember, on disk: seen again, rolled back to the checkpoint, bounded in RAM and on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mllm_fl.engines import memory as module
from mllm_fl.engines.memory import ClientMemory
from mllm_fl.errors import UserError
from mllm_fl.trees import Tree, digest


def tree(value: float, n: int = 10) -> Tree:
    return {"c": torch.full((n,), value), "visits": torch.tensor(int(value))}


def segments(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_a_client_finds_what_it_left_and_strangers_find_nothing(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path / "memory")
    assert 3 not in memory and memory.get(3, {}) == {} and not (tmp_path / "memory").exists()
    memory[10**9], memory[3] = tree(1), tree(2)
    memory[3] = tree(3)
    assert list(memory) == [3, 10**9] and len(memory) == 2
    assert digest(memory[3]) == digest(tree(3))
    again = ClientMemory(tmp_path / "memory", 1, memory.commit(1))
    assert list(again) == [3, 10**9] and digest(again[10**9]) == digest(tree(1))


def test_nothing_to_remember_is_not_remembered(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path / "memory")
    memory[1] = {}
    assert 1 not in memory and segments(tmp_path / "memory") == []
    memory[1] = tree(1)
    memory.commit(1)
    memory[1] = {}
    assert 1 not in memory and list(memory) == []
    with pytest.raises(KeyError):
        _ = memory[1]
    assert len(memory.commit(2)) == 0


def test_what_was_written_after_a_checkpoint_is_not_seen_by_a_run_resumed_there(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    memory = ClientMemory(folder)
    memory[0], memory[1] = tree(1), tree(2)
    index = memory.commit(1)
    memory.prune()
    memory[1], memory[2] = tree(5), tree(6)  # round 2, killed before its checkpoint ...
    lost = memory.commit(2)  # ... or between this and the checkpoint's rename
    assert segments(folder) == ["segment-000001", "segment-000002"]
    resumed = ClientMemory(folder, 1, index)
    assert list(resumed) == [0, 1] and digest(resumed[1]) == digest(tree(2))
    assert segments(folder) == ["segment-000001"]
    resumed[1] = tree(5)
    resumed[2] = tree(6)
    assert torch.equal(resumed.commit(2), lost)  # the same trees in the same places


def test_a_killed_write_leaves_the_checkpoint_whole(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    memory[0] = tree(1)
    index = memory.commit(1)
    (tmp_path / "segment-000002").write_bytes(b"half a tr")
    assert digest(ClientMemory(tmp_path, 1, index)[0]) == digest(tree(1))


def test_segments_go_when_the_next_checkpoint_no_longer_needs_them(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    memory[0] = tree(1)
    memory.commit(1)
    memory[0] = tree(2)
    memory.prune()  # between checkpoints: the old one is still the one to come back to
    memory.commit(2)
    assert segments(tmp_path) == ["segment-000001", "segment-000002"]
    memory.prune()
    assert segments(tmp_path) == ["segment-000002"]


def test_ram_and_disk_are_bounded_whatever_the_number_of_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clients a round of 50, 1,048 bytes and a header each: RAM holds three trees, the disk less than twice the living plus the slack and a round."""
    monkeypatch.setattr(module, "SLACK", 4_000)
    memory = ClientMemory(tmp_path, ram=4 * 1_048)
    worst = 0
    for t in range(1, 301):
        for k in (t % 50, (7 * t) % 50):
            memory[k] = tree(float(t), 260)
        memory.commit(t)
        memory.prune()
        worst = max(worst, sum(p.stat().st_size for p in tmp_path.iterdir()))
        assert memory.in_ram <= 4 * 1_048
    alive = int(memory.commit(301)[:, 3].sum())
    assert len(memory) == 50
    assert worst < 2 * alive + 4_000 + 3_000
    last = {k: t for t in range(1, 301) for k in (t % 50, (7 * t) % 50)}
    assert all(digest(memory[k]) == digest(tree(float(t), 260)) for k, t in last.items())


def test_ram_holds_a_copy_and_hands_out_copies(tmp_path: Path) -> None:
    memory, given = ClientMemory(tmp_path), torch.zeros(1000, 8)
    memory[0] = {"row": given[3]}  # a row of a stack does not keep the stack
    given += 1
    memory[0]["row"] += 2
    assert memory.in_ram < 200
    assert torch.equal(memory[0]["row"], torch.zeros(8))


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    memory[0] = tree(1)
    index = memory.commit(1)
    path = tmp_path / "segment-000001"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"segment-000001: truncated or damaged"):
        _ = ClientMemory(tmp_path, 1, index)[0]
    path.unlink()
    with pytest.raises(UserError, match=r"segment-000001: no such file, but the checkpoint needs it"):
        ClientMemory(tmp_path, 1, index)
