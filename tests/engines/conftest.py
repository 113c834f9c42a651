"""Two worker processes for all tests that do them no lasting harm: starting them is most of what such tests cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mllm_fl.engines.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two workers; one that a test kills is replaced."""
    pool = Pool(2)
    yield pool
    pool.close()
