"""``pretrain_transformers.py`` on a tiny Qwen3-VL from files on disk: what goes in, what comes out, and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.training.job import Job, copy_with_dropout, run_here
from tests.training.test_resume import losses, tensors


def run(pool: RankPool, job: Job, **flags: Any) -> None:
    """Run the job in pool ranks with some flags changed (``None`` leaves one out)."""
    before = dict(job.flags)
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    pool.run(run_here, job.command(), job.folder, timeout=240)
    job.flags = before


@pytest.fixture
def with_dropout(job: Job, hf_folder: Path, tmp_path: Path) -> Job:
    """The job with attention dropout, shuffling and a data-loader worker."""
    folder = copy_with_dropout(hf_folder, tmp_path / "hf")
    job.model["init_from_hf_path"] = str(folder)
    job.data["dataloader_param"]["shuffle"] = True
    job.flags |= {"num-workers": 1, "train-iters": 10, "lr-decay-iters": 20, "global-batch-size": 4}
    return job


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2], indirect=True)
def test_ten_steps_are_five_and_five_with_dropout(with_dropout: Job, ranks: RankPool, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(ranks, with_dropout, save=straight)
    run(ranks, with_dropout, save=resumed, train_iters=5)
    run(ranks, with_dropout, save=resumed, load=resumed)
    assert losses(resumed) == losses(straight)
    expected, actual = (tensors(folder / "iter_0000010") for folder in (straight, resumed))
    assert expected.keys() == actual.keys()
    assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])]


def test_an_export_after_no_change_is_the_model_that_went_in(
    job: Job, hf_folder: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    in_the_way = tmp_path / "export-iter_0000001"
    in_the_way.touch()  # a failed export on the way is no reason to end a run
    run(ranks2, job, lr="0", weight_decay="0", export_hf=tmp_path / "export", export_hf_interval=1, train_iters=2)
    exports = [tmp_path / "export", tmp_path / "export-iter_0000002"]
    before, *after = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (hf_folder, *exports)
    )
    for state in after:
        assert before.keys() == state.keys()
        assert not [name for name, value in before.items() if not torch.equal(value, state[name])]
    in_the_way.unlink()
    assert sorted(tmp_path.glob("export*")) == exports


def test_weights_streamed_into_shards_train_as_weights_loaded_whole(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    run(ranks2, job, save=tmp_path / "whole")
    run(ranks2, job, save=tmp_path / "streamed", init_model_with_meta_device=True)
    assert losses(tmp_path / "streamed") == losses(tmp_path / "whole")


@pytest.mark.parametrize("loss", ["per_token_loss", "per_sample_loss"])
def test_model_json_and_the_flag_choose_the_same_loss(job: Job, ranks2: RankPool, tmp_path: Path, loss: str) -> None:
    run(ranks2, job, save=tmp_path / "default")
    run(ranks2, job, save=tmp_path / "flag", **{f"calculate_{loss}": True})
    job.model["loss_cfg"] = {"loss_type": loss}
    run(ranks2, job, save=tmp_path / "file")
    assert losses(tmp_path / "file") == losses(tmp_path / "flag")
    if loss == "per_token_loss":  # with one sample in a micro-batch the other two are the same
        assert losses(tmp_path / "flag") != losses(tmp_path / "default")


def test_bf16_computes_in_bf16_on_fp32_parameters(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    run(ranks2, job, save=tmp_path / "bf16", bf16=True, train_iters=2)
    run(ranks2, job, save=tmp_path / "fp32", train_iters=2)
    low, full = (losses(tmp_path / name)[1][0] for name in ("bf16", "fp32"))
    assert low != full
    assert low == pytest.approx(full, rel=0.02)
    assert {tensor.dtype for key, tensor in tensors(tmp_path / "bf16/iter_0000002").items() if "step" not in key} == {
        torch.float32
    }


def test_validation_split_and_evaluation(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    job.data["dataset_param"]["basic_parameters"]["val_rate"] = 0.25
    run(ranks2, job, save=tmp_path / "ckpt", eval_iters=1, eval_interval=2)
    rows = [json.loads(line) for line in (tmp_path / "ckpt/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "validation loss" in row] == [2, 4, 4]


def test_finetuning_takes_weights_only(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    run(ranks2, job, save=tmp_path / "first")
    run(ranks2, job, save=tmp_path / "second", load=tmp_path / "first", finetune=True, train_iters=1, lr="0")
    first, second = tensors(tmp_path / "first/iter_0000004"), tensors(tmp_path / "second/iter_0000001")
    assert all(torch.equal(first[key], second[key]) for key in first if key.startswith("model."))
    step = next(key for key in second if key.endswith(".step"))
    assert (first[step].item(), second[step].item()) == (4, 1)
