"""LoRA on the FSDP2 road: adapters alone are trained, saved, resumed, read by peft and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.training.job import Job, Outcome, run_here
from tests.training.test_resume import losses, tensors

TARGETS = "q_proj v_proj qkv"


def run(pool: RankPool, job: Job, **flags: Any) -> list[Outcome]:
    """Run the job in pool ranks with some flags changed; a text with spaces is several values."""
    words = {name.replace("_", "-"): value for name, value in flags.items()}
    before = dict(job.flags)
    job.flags |= words
    command = [word for text in job.command() for word in (text.split() if text in words.values() else [text])]
    outcomes = pool.run(run_here, command, job.folder, timeout=240)
    job.flags = before
    return outcomes


def trained(pool: RankPool, job: Job, **flags: Any) -> str:
    outcomes = run(pool, job, lora_target_modules=TARGETS, **flags)
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes[0].text
    return outcomes[0].text


@pytest.mark.parametrize("world_size", [1, 2])
def test_ten_steps_are_five_and_five(job: Job, world_size: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pool = request.getfixturevalue(f"ranks{world_size}")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    job.flags |= {"global-batch-size": 4, "train-iters": 10, "lr-decay-iters": 20, "lora-dropout": 0.2}
    text = trained(pool, job, save=straight)
    print(text)
    trained(pool, job, save=resumed, train_iters=5, init_model_with_meta_device=True)
    trained(pool, job, save=resumed, load=resumed, init_model_with_meta_device=True)
    assert losses(resumed) == losses(straight)
    expected, actual = (tensors(folder / "iter_0000010") for folder in (straight, resumed))
    assert expected.keys() == actual.keys()
    assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])]
    assert all(".lora_" in key for key in expected)
