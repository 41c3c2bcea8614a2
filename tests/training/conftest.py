from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.training.job import Job, save_tiny_hf_folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with processor and weights. Tests must not write to it."""
    return save_tiny_hf_folder("qwen3_vl", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def job(tmp_path: Path, hf_folder: Path) -> Job:
    """A job that trains for 4 iterations; tests change what they are about."""
    return Job(tmp_path, hf_folder)


@pytest.fixture
def ranks4() -> Iterator[RankPool]:
    """Four real gloo ranks."""
    pool = RankPool(4)
    yield pool
    pool.stop()
