"""``pretrain_transformers.py`` on packed sequences, from ``packing`` in data.json alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.data import build_mm_dataset
from tests.data.tiny import write_jsonl
from tests.ranks import RankPool
from tests.training.job import Job
from tests.training.test_evaluation import by_hand, metrics, uneven_rows
from tests.training.test_evaluation import run as evaluate
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


@pytest.mark.slow
def test_a_packed_run_goes_on_at_another_world_size(
    job: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    """From the middle of an epoch, in both directions; no sequence is lost or comes twice."""
    for number, row in enumerate(job.rows):
        row["messages"][1]["content"] += " Surely." * (number % 3)
    job.data["dataset_param"]["basic_parameters"]["packing"] = True
    job.data["dataloader_param"] |= {"shuffle": True, "drop_last": False}
    job.flags |= {"calculate-per-token-loss": True, "seq-length": 150, "train-iters": 5, "lr-decay-iters": 5}
    run(ranks2, job, save=tmp_path / "straight", save_interval=3)
    expected = losses(tmp_path / "straight")
    assert list(expected) == [1, 2, 3, 4, 5] and len({loss for loss, *_ in expected.values()}) == 5
    for first, second in ((ranks2, ranks1), (ranks1, ranks2)):
        folder = tmp_path / f"from{first.world_size}"
        run(first, job, save=folder, train_iters=3)
        run(second, job, save=folder, load=folder)
        found = losses(folder)
        assert list(found) == [1, 2, 3, 4, 5]
        for step, values in expected.items():
            assert found[step] == pytest.approx(values, rel=1e-5), (first.world_size, step)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["calculate-per-token-loss", "calculate-per-sample-loss"])
def test_packs_are_evaluated_as_their_samples(loss: str, job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    """An odd number of sequences on two ranks; judge: the same rows one by one, and Hugging Face for those."""
    write_jsonl(tmp_path / "valid.jsonl", uneven_rows(job, 5))
    basic = job.data["dataset_param"]["basic_parameters"]
    basic["val_dataset"] = str(tmp_path / "valid.jsonl")
    job.data["dataloader_param"]["drop_last"] = False
    expected = by_hand(job, Path(job.model["init_from_hf_path"]), 1)
    mode = "per_token" if "token" in loss else "per_sample"
    flags = {"lr": "0", "train_iters": 1, "eval_iters": -1, "seq_length": 140}
    for packing in (False, True):
        basic["packing"] = packing
        evaluate(ranks2, job, save=tmp_path / str(packing), **flags, **{loss: True})
        row = next(row for row in metrics(tmp_path / str(packing)) if "validation loss" in row)
        assert row["validation loss"] == pytest.approx(expected[mode], rel=1e-6)
