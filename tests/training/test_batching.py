"""Whole runs whose batches are put together in other ways train on the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.data import build_mm_dataset
from mindspeed_mm.data.iterators import CyclicIterator
from mindspeed_mm.training.callbacks import other_batch_size
from tests.ranks import RankPool
from tests.training.job import Job
from tests.training.test_data_rows import listed, with_bad_rows
from tests.training.test_data_rows import run as run_with
from tests.training.test_resume import losses, tensors
from tests.training.test_transformers_road import run

PLUGIN = """
from mindspeed_mm.data.formats import register_format


@register_format("picture-book")
def read(row, attr):
    turns = [{"role": "user", "content": "<image>" + row["ask"]}, {"role": "assistant", "content": row["say"]}]
    return {"messages": turns, "images": [row["picture"]]}
"""


def same_as_alone(alone: Path, other: Path) -> None:
    expected, found = losses(alone), losses(other)
    assert list(expected) == list(found) == [1, 2], other
    for step, (loss, grad_norm, _) in expected.items():
        assert found[step][:2] == pytest.approx((loss, grad_norm), rel=1e-5), (other, step)


@pytest.fixture
def epochs(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A step is an epoch of the same eight digits, so that the loss per token does not tell the ways apart."""
    monkeypatch.chdir(job.folder)
    job.command()  # writes the rows
    length = len(build_mm_dataset(job.data["dataset_param"])[0]["input_ids"])
    job.flags |= {"calculate-per-token-loss": True, "seq-length": 2 * length + 5, "train-iters": 2}
    return job


@pytest.mark.slow
def test_a_stream_in_a_layout_of_a_plugin_is_packed(
    epochs: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    run(ranks1, epochs, save=tmp_path / "alone", global_batch_size=8)
    (tmp_path / "book.py").write_text(PLUGIN)
    epochs.rows = [
        {
            "picture": row["images"][0],
            "ask": row["messages"][0]["content"].removeprefix("<image>"),
            "say": row["messages"][1]["content"],
        }
        for row in epochs.rows
    ]
    epochs.data["dataset_param"]["attr"] = {"formatting": "picture-book"}
    epochs.data["dataset_param"]["basic_parameters"] |= {"packing": True, "streaming": True}
    run(ranks2, epochs, save=tmp_path / "book", global_batch_size=4, plugin=tmp_path / "book.py")
    same_as_alone(tmp_path / "alone", tmp_path / "book")


@pytest.mark.slow
def test_balanced_batches_and_token_budgets_train_on_the_same_samples(
    epochs: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    epochs.flags["num-workers"] = 1
    run(ranks1, epochs, save=tmp_path / "alone", global_batch_size=8)
    run(ranks2, epochs, save=tmp_path / "balanced", global_batch_size=8, use_data_balance=True)
    same_as_alone(tmp_path / "alone", tmp_path / "balanced")
    dynamic = {"use_txt_dynamic_batching": True, "max_seq_len": epochs.flags["seq-length"] + 3}
    for streaming in (False, True):
        epochs.data["dataset_param"]["basic_parameters"]["streaming"] = streaming
        run(ranks2, epochs, save=tmp_path / f"budgets {streaming}", global_batch_size=4, **dynamic)
        same_as_alone(tmp_path / "alone", tmp_path / f"budgets {streaming}")


@pytest.mark.slow
def test_bad_rows_of_a_packed_stream_change_nothing_on_any_number_of_ranks_nor_on_resume(
    job: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    with_bad_rows(job, tmp_path)
    job.data["dataset_param"]["bad_sample_budget"] = 4
    job.data["dataset_param"]["basic_parameters"] |= {"packing": True, "streaming": True}
    job.data["dataloader_param"] |= {"shuffle": True, "drop_last": False}
    flags: dict[str, Any] = {"calculate_per_token_loss": True, "seq_length": 100, "train_iters": 6}
    flags |= {"lr_decay_iters": 6, "num_workers": 2}
    run_with(ranks2, job, save=tmp_path / "two", **flags)
    run_with(ranks1, job, save=tmp_path / "one", **{**flags, "num_workers": 0})
    run_with(ranks2, job, save=tmp_path / "resumed", **{**flags, "train_iters": 3})
    run_with(ranks2, job, save=tmp_path / "resumed", auto_resume=True, **flags)
    expected = losses(tmp_path / "two")
    assert list(expected) == [1, 2, 3, 4, 5, 6]
    for name in ("one", "resumed"):
        found = losses(tmp_path / name)
        assert list(found) == list(expected)
        for step, values in expected.items():
            assert found[step] == pytest.approx(values, rel=1e-5), (name, step)
        assert sorted(row for row, _ in listed(tmp_path / name)) == [2, 4, 6, 8], json.dumps(listed(tmp_path / name))
    same = [tensors(tmp_path / name / "iter_0000006") for name in ("two", "resumed")]
    assert not [key for key, value in same[0].items() if not (value == same[1][key]).all()]


@pytest.mark.parametrize(("size", "warns"), [(4, False), (8, True), (None, False)])
def test_a_loader_of_another_batch_size_is_told_of(size: int | None, warns: bool) -> None:
    loader = torch.utils.data.DataLoader([torch.ones(2)] * 8, batch_size=size)
    warning = other_batch_size(CyclicIterator(loader), 4)
    assert bool(warning) is warns
    assert warning is None or "batch_size 8 and --micro-batch-size is 4" in warning
    assert other_batch_size(iter([]), 4) is other_batch_size(None, 4) is None
