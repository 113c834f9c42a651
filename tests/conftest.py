"""What all tests share: one thread, no deadlines, and the folder of the real data sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLLM_FL_PROBE", "off")  # the same bits on every chip, and no time spent on measuring it
settings.register_profile("ours", deadline=None)
settings.load_profile("ours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``data`` are skipped, visibly, where no folder of real data is given."""
    if os.environ.get("MLLM_FL_DATA"):
        return
    for item in items:
        if "data" in item.keywords and item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason="MLLM_FL_DATA is not set"))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the real data sets."""
    return Path(os.environ["MLLM_FL_DATA"])
