"""``pretrain_transformers.py`` on packed sequences, from ``packing`` in data.json alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.data import build_mm_dataset
from tests.ranks import RankPool
from tests.training.job import Job
from tests.training.test_resume import losses
from tests.training.test_transformers_road import run


def test_two_ranks_on_packs_train_as_one_on_samples(
    job: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is an epoch of the same eight digits in both, so that the loss per token does not tell them apart."""
    monkeypatch.chdir(job.folder)
    job.command()  # writes the rows
    length = len(build_mm_dataset(job.data["dataset_param"])[0]["input_ids"])
    job.flags |= {"calculate-per-token-loss": True, "seq-length": 2 * length + 5, "train-iters": 2}
    run(ranks1, job, save=tmp_path / "samples", global_batch_size=8)
    job.data["dataset_param"]["basic_parameters"]["packing"] = True
    run(ranks2, job, save=tmp_path / "packs", global_batch_size=4)
    alone, packed = losses(tmp_path / "samples"), losses(tmp_path / "packs")
    assert list(alone) == list(packed) == [1, 2]
    for step, (loss, grad_norm, _) in alone.items():
        assert packed[step][:2] == pytest.approx((loss, grad_norm), rel=1e-5)


def test_each_packed_sample_weighs_the_same_in_a_loss_per_sample(
    job: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is an epoch in both; three answers share one sequence, the others have one each, as long as it is."""
    monkeypatch.chdir(job.folder)
    for row, words in zip(job.rows, (1, 1, 1, 30, 30, 30), strict=False):
        row["messages"][1]["content"] = "seven " * words
    job.rows = job.rows[:6]
    job.command()  # writes the rows
    lengths = [len(sample["input_ids"]) for sample in build_mm_dataset(job.data["dataset_param"])]
    capacity = sum(lengths[:3])
    assert capacity >= lengths[3] > capacity - lengths[0]
    job.flags |= {"calculate-per-sample-loss": True, "seq-length": capacity, "train-iters": 2}
    run(ranks1, job, save=tmp_path / "samples", global_batch_size=6)
    job.data["dataset_param"]["basic_parameters"]["packing"] = True
    run(ranks2, job, save=tmp_path / "packs", global_batch_size=4)
    alone, packed = losses(tmp_path / "samples"), losses(tmp_path / "packs")
    assert list(alone) == list(packed) == [1, 2]
    for step, (loss, grad_norm, _) in alone.items():
        assert packed[step][:2] == pytest.approx((loss, grad_norm), rel=1e-6)
