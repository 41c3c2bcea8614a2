"""A stopped and resumed run is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.ranks import RankPool
from tests.training.script import train

STEPS = 10


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint in one process, by torch's own reader."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "properties")
    }
    dcp.load(state, checkpoint_id=checkpoint)
    return state


def losses(folder: Path) -> dict[int, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: (row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows if "loss" in row}


def assert_same_run(resumed: Path, straight: Path) -> None:
    assert losses(resumed) == losses(straight)
    assert sorted(losses(straight)) == list(range(1, STEPS + 1))
    expected, actual = (tensors(folder / f"iter_{STEPS:07d}") for folder in (straight, resumed))
    assert any(key.startswith("optimizer.state.") for key in expected)
    assert expected.keys() == actual.keys()
    assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])]


@pytest.mark.parametrize("accumulation", ["", "--global-batch-size=8"])
def test_ten_steps_are_five_and_five(ranks: RankPool, tmp_path: Path, accumulation: str) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir(), resumed.mkdir()
    flags = [accumulation] if accumulation else []
    ranks.run(train, str(straight), *flags, steps=STEPS)
    ranks.run(train, str(resumed), *flags, steps=5)
    ranks.run(train, str(resumed), *flags, "--load", str(resumed), steps=STEPS)
    assert_same_run(resumed, straight)


def test_every_step_of_two_epochs_can_be_resumed_from(ranks2: RankPool, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    straight.mkdir()
    ranks2.run(train, str(straight), "--save-interval", "1", steps=STEPS)  # 6 batches in an epoch
    for step in range(1, STEPS):
        resumed = tmp_path / f"from{step}"
        resumed.mkdir()
        ranks2.run(train, str(resumed), "--load", str(straight), "--ckpt-step", str(step), steps=STEPS)
        expected, actual = (tensors(folder / f"iter_{STEPS:07d}") for folder in (straight, resumed))
        assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])], f"from {step}"


def _terminate_once_training(folder: Path) -> None:
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def stop_by(folder: str, what: str) -> None:
    if what == "signal":
        if os.environ["RANK"] == "1":  # one rank only: the others must hear of it
            threading.Thread(target=_terminate_once_training, args=(Path(folder),)).start()
        train(folder, "--auto-resume", steps=100_000)
    else:
        train(folder, "--auto-resume", "--exit-interval", "4", steps=STEPS)


def test_exit_interval_saves_and_the_rest_follows(ranks2: RankPool, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir(), stopped.mkdir()
    ranks2.run(train, str(straight), steps=STEPS)
    for tracker in ("4", "8", "10"):
        ranks2.run(stop_by, str(stopped), "interval")
        assert (stopped / "latest_checkpointed_iteration.txt").read_text() == tracker
    assert_same_run(stopped, straight)


def test_a_signal_to_one_rank_stops_all_and_saves(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(stop_by, str(tmp_path), "signal")
    saved = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert 0 < saved < 100_000
    ranks2.run(train, str(tmp_path), "--auto-resume", "--train-iters", str(saved + 1))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(saved + 1)


def test_another_world_size_continues_the_state(ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(train, str(tmp_path), steps=5)
    before = tensors(tmp_path / "iter_0000005")
    ranks1.run(train, str(tmp_path), "--load", str(tmp_path), "--global-batch-size", "4", steps=6)
    after = tensors(tmp_path / "iter_0000006")
    assert before.keys() == after.keys()
    step = "optimizer.state.head.weight.step"
    assert after[step].item() == before[step].item() + 1
    # One more step of at most the learning rate and its decay: the moments were taken over, not started anew.
    moment = "optimizer.state.head.weight.exp_avg_sq"
    assert (after[moment] >= 0.999 * before[moment]).all()
    assert (before["model.head.weight"] - after["model.head.weight"]).abs().max() <= 0.02
