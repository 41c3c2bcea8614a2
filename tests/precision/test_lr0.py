"""Runs whose weights do not change: a bias that grows is told from rounding that averages out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mindspeed_mm.precision.comparing.lr0 import compare_lr0, read_lr0
from mindspeed_mm.precision.records.record import Key, RankStep, RecordWriter
from mindspeed_mm.precision.records.sketch import SIZE
from tests.precision.test_invariants import sketch


def curves(folder: Path, bias: float, noise: float, steps: int = 400) -> Path:
    """Write a run's metrics: losses of changing batches, with noise of their own and a bias."""
    folder.mkdir()
    loss = np.random.default_rng(0).normal(2.0, 0.3, steps)
    own = np.random.default_rng(int(1e6 * bias) + (folder.name == "b") + 1)
    rows = [
        {
            "iteration": i + 1,
            "loss": value * (1 + bias + noise * own.normal()),
            "grad_norm": 3 * value * (1 + noise * own.normal()),
            "learning_rate": 0.0,
        }
        for i, value in enumerate(loss)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sums(folder: Path, bias: float) -> Path:
    """Write the sums of gradients of 100, 200, 300 and 400 steps, with rounding of their own and a bias of one."""
    known, own = np.random.default_rng(0), np.random.default_rng(ord(folder.name))
    writer = RecordWriter(folder / "precision" / "lr0")
    writer.start({})
    total = {"a.weight": np.zeros(SIZE), "b.weight": np.zeros(SIZE)}
    for step in range(1, 401):
        for name in total:
            noise = 1e-4 * own.normal(size=SIZE)
            total[name] = total[name] + known.normal(size=SIZE) + noise + (bias if name == "b.weight" else 0.0)
        if step % 100 == 0:
            entries = {Key("grad_reduced", name, "gradient_sum"): sketch(value) for name, value in total.items()}
            writer.write(step - 1, RankStep(entries=entries, scalars={"lr0_steps": (float(step), "same")}))
    return folder


@pytest.mark.parametrize(("bias", "found"), [(0.0, False), (1e-4, True)])
def test_sums_of_gradients_that_part_as_a_bias_does(bias: float, found: bool, tmp_path: Path) -> None:
    first = compare_lr0(read_lr0(sums(tmp_path / "a", 0.0), sums(tmp_path / "b", bias))).first
    assert bool(first) == found, first
    if first:
        assert (first.phase, first.site) == ("grad_reduced", "b.weight")


@pytest.mark.parametrize(("bias", "found"), [(0.0, False), (1e-6, True), (1e-5, True)])
def test_a_bias_below_the_noise_of_one_step(bias: float, found: bool, tmp_path: Path) -> None:
    reference = curves(tmp_path / "a", 0.0, 2e-6)
    verdict = compare_lr0(read_lr0(reference, curves(tmp_path / "b", bias, 2e-6)))
    assert bool(verdict.first) == found, verdict
    if verdict.first:
        assert verdict.first.site == "loss" and "biased" in verdict.first.evidence


def test_one_step_that_is_far_off(tmp_path: Path) -> None:
    reference, candidate = curves(tmp_path / "a", 0.0, 0.0), curves(tmp_path / "b", 0.0, 0.0)
    rows = [json.loads(line) for line in (candidate / "metrics.jsonl").read_text().splitlines()]
    rows[41]["loss"] += 0.05
    (candidate / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = compare_lr0(read_lr0(reference, candidate)).first
    assert first is not None and first.step == 42
