from __future__ import annotations

from pathlib import Path

import pytest

from tests.precision.runs import varied_rows
from tests.training.job import Job, save_tiny_hf_folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with processor and weights. Tests must not write to it."""
    return save_tiny_hf_folder("qwen3_vl", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def job(tmp_path: Path, hf_folder: Path) -> Job:
    """Two steps on eight samples of all kinds each, the loss per token."""
    job = Job(tmp_path, hf_folder)
    job.rows = varied_rows(tmp_path)
    job.flags |= {"train-iters": 2, "global-batch-size": 8, "calculate-per-token-loss": True, "seq-length": 160}
    job.flags |= {"precision-capture": "steps=0-1"}
    return job
