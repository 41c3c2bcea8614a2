from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.job import Job, save_tiny_qwen3_vl


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with processor and weights. Tests must not write to it."""
    return save_tiny_qwen3_vl(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def job(tmp_path: Path, hf_folder: Path) -> Job:
    """A job that trains for 4 iterations; tests change what they are about."""
    return Job(tmp_path, hf_folder)


@pytest.fixture
def make_job(tmp_path: Path, hf_folder: Path) -> Callable[[str], Job]:
    """Return a function that makes several jobs, each in a folder of its own."""

    def make(name: str) -> Job:
        folder = tmp_path / name
        folder.mkdir()
        return Job(folder, hf_folder)

    return make
