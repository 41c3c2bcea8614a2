"""Loss curves: read from the files that trainers write, judged by the documented criteria."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.curves.criteria import judge_curves
from mindspeed_mm.precision.curves.curve_statistics import band, one_sidedness, onset
from mindspeed_mm.precision.curves.curves import Curve, align, read_curve
from mindspeed_mm.training.reporting import format_log_line
from tests.precision.command import run

N = 1200
STEPS = range(1, N + 1)
REFERENCE = 2.0 + 2.0 * np.exp(-np.arange(N) / 200)


def curve(loss: np.ndarray, grad_norm: np.ndarray | None = None, name: str = "run") -> Curve:
    points = {"loss": dict(zip(STEPS, loss.tolist(), strict=False))}
    if grad_norm is not None:
        points["grad_norm"] = dict(zip(STEPS, grad_norm.tolist(), strict=False))
    return Curve(name, points)


def around_zero(size: float) -> np.ndarray:
    """Differences whose absolute values are all ``size`` and whose signs alternate."""
    return size * np.where(np.arange(N) % 2, 1.0, -1.0)


def passes(
    difference: np.ndarray, norm: float = 0.0, preset: str = "spec004", reference: np.ndarray = REFERENCE
) -> int:
    norms = np.full(N, 3.0)
    verdict, _ = judge_curves(curve(reference, norms), curve(reference + difference, norms * (1 + norm)), preset=preset)
    return verdict.exit_code


@pytest.mark.parametrize(
    ("relative", "absolute", "level"),
    # Where the loss is high the relative limit is the wider one, where it is low the absolute one.
    [("relative", 0.005, 4.0), ("absolute", 0.005, 0.25)],
)
@pytest.mark.parametrize("beside", [0.99, 1.01])
def test_the_limit_of_the_first_loss(relative: str, absolute: float, level: float, beside: float) -> None:
    reference = np.full(N, level)
    difference = np.zeros(N)
    difference[0] = absolute * (level if relative == "relative" else 1.0) * beside
    assert passes(difference, reference=reference) == (0 if beside < 1 else 1)


@pytest.mark.parametrize("level", [4.0, 0.25])
@pytest.mark.parametrize("beside", [0.99, 1.01])
def test_the_limit_of_the_mean(level: float, beside: float) -> None:
    reference = np.full(N, level)
    difference = around_zero(0.01 * max(level, 1.0) * beside)
    difference[0] = 0.0
    difference *= N / (N - 1)
    assert passes(difference, reference=reference) == (0 if beside < 1 else 1)


@pytest.mark.parametrize("beside", [0.99, 1.01])
def test_the_limit_of_the_gradient_norm(beside: float) -> None:
    assert passes(np.zeros(N), norm=0.1 * beside) == (0 if beside < 1 else 1)


@pytest.mark.parametrize("beside", [0.99, 1.01])
def test_the_limit_of_runs_whose_weights_do_not_change(beside: float) -> None:
    assert passes(around_zero(0.001 * beside), preset="lr0") == (0 if beside < 1 else 1)


def test_too_few_steps_are_said_and_cannot_be_judged() -> None:
    short = [Curve("a", {"loss": {step: 1.0 for step in range(1, 1000)}}) for _ in range(2)]
    verdict, _ = judge_curves(*short)
    assert verdict.exit_code == 2 and "999 steps, but at least 1000" in str(verdict.undecided)
    assert judge_curves(*short, min_steps=999)[0].exit_code == 0
    short[1].points["loss"][1] = 2.0
    assert judge_curves(*short)[0].exit_code == 1


def test_a_drift_to_one_side_that_the_preset_passes_is_flagged() -> None:
    drift = np.linspace(0, 0.016, N)  # mean 0.008, below the limit of 0.01
    verdict, found = judge_curves(curve(REFERENCE), curve(REFERENCE + drift))
    assert all(criterion.passed for criterion in found)
    assert [finding.site for finding in verdict.findings] == ["one-sided difference"] and verdict.exit_code == 1
    assert passes(around_zero(0.008)) == 0
    assert passes(np.full(N, 1e-5)) == 0  # rounding may lie on one side


def test_noise_of_the_reference_decides_where_there_is_a_second_run() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 0.05, N) for _ in range(3)]
    first, second, mine = (curve(REFERENCE + n, name=name) for n, name in zip(noise, "abc", strict=True))
    assert judge_curves(first, mine)[0].exit_code == 1
    verdict, found = judge_curves(first, mine, second)
    assert verdict.exit_code == 0 and any(criterion.widened for criterion in found)
    assert any("the reference itself violates the preset" in note for note in verdict.notes)
    outside = curve(REFERENCE + noise[2] + around_zero(0.3), name="d")
    sites = [finding.site for finding in judge_curves(first, outside, second)[0].findings]
    assert "noise of the reference" in sites


@pytest.mark.parametrize("start", [100, 500, 900])
@pytest.mark.parametrize("seed", range(5))
def test_the_step_from_which_differences_grow_is_found(start: int, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 1e-3, N)
    assert onset(noise) is None
    jump = noise + np.where(np.arange(N) >= start, 0.02, 0.0)
    assert abs(onset(jump) - start) <= 2
    ramp = noise + np.where(np.arange(N) >= start, (np.arange(N) - start) * 2e-4, 0.0)
    assert start - 10 <= onset(ramp) <= start + 60


def test_one_sidedness_tells_a_bias_from_noise_as_a_t_test_does() -> None:
    rng = np.random.default_rng(1)
    for shift in (0.0, 2.0):
        sample = rng.normal(shift, 1.0, 1000)
        certain = scipy.stats.ttest_1samp(sample, 0).pvalue < 1e-6
        assert (one_sidedness(sample) > 0.5) == certain == (shift > 0)


def test_the_band_is_the_largest_noise_nearby() -> None:
    noise = np.random.default_rng(2).normal(size=300)
    expected = [np.abs(noise[max(0, i - 50) : i + 51]).max() for i in range(300)]
    np.testing.assert_array_equal(band(noise), expected)


def test_a_loss_that_is_not_finite_is_a_finding_at_its_step() -> None:
    broken = REFERENCE.copy()
    broken[41] = math.nan
    verdict, _ = judge_curves(curve(REFERENCE), curve(broken))
    assert verdict.first is not None and verdict.first.step == 41 and "nan" in verdict.first.evidence
    assert judge_curves(curve(broken), curve(broken))[0].exit_code == 0


def test_another_learning_rate_is_named_and_one_logged_a_step_later_is_not() -> None:
    runs = [curve(REFERENCE) for _ in range(3)]
    for shift, run_ in zip((0, 1, 0), runs, strict=True):
        run_.points["learning_rate"] = {step: 1e-4 * min(1, (step + shift) / 100) for step in STEPS}
    assert not judge_curves(runs[0], runs[1])[0].findings
    runs[2].points["learning_rate"][50] *= 1.001
    assert [f.site for f in judge_curves(runs[0], runs[2])[0].findings] == ["learning rate"]


# Readers. Each writes the same run with the trainer's own writer.

LOSSES = [2.5, 2.25, 2.125, 2.0625]
NORMS = [1.5, 1.25, 1.125, 0.5]
RATES = [1e-4, 2e-4, 3e-4, 4e-4]


def metrics_jsonl(folder: Path) -> Path:
    rows = [
        {"iteration": i + 1, "loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens": 3}
        for i, (loss, norm, rate) in enumerate(zip(LOSSES, NORMS, RATES, strict=True))
    ]
    rows.insert(2, {"iteration": 2, "validation loss": 9.0, "validation loss PPL": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def megatron_log(folder: Path, name: str = "lm loss") -> Path:
    lines = [
        format_log_line(
            iteration=i + 1, train_iters=4, consumed_samples=i, seconds_per_iteration=0.1, learning_rate=rate,
            global_batch_size=2, values={name: loss}, grad_norm=norm, skipped=0, nan=0, now=datetime(2025, 1, 1),
        )
        for i, (loss, norm, rate) in enumerate(zip(LOSSES, NORMS, RATES, strict=True))
    ]  # fmt: skip
    text = "loading ...\n" + "\n".join(f"[default1]:{line}" for line in lines) + "\ndone iteration 3\n"
    (folder / "train.log").write_text(text)
    return folder / "train.log"


def tensorboard(folder: Path) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(folder / "tb"))
    for i, (loss, norm, rate) in enumerate(zip(LOSSES, NORMS, RATES, strict=True)):
        for tag, value in (("lm loss", loss), ("grad-norm", norm), ("learning-rate", rate)):
            writer.add_scalar(tag, value, i + 1)
            writer.add_scalar(f"{tag} vs samples", value, (i + 1) * 64)
    writer.close()
    return folder / "tb"


def comma_separated(folder: Path) -> Path:
    with open(folder / "run.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Step", "tiny - train/loss", "tiny - train/grad_norm", "tiny - train/learning_rate"])
        writer.writerows(zip(range(1, 5), LOSSES, NORMS, RATES, strict=True))
    return folder / "run.csv"


@pytest.mark.parametrize("write", [metrics_jsonl, megatron_log, tensorboard, comma_separated])
def test_what_trainers_write_is_read(write: Callable[[Path], Path], tmp_path: Path) -> None:
    found = read_curve(write(tmp_path))
    assert list(found.points["loss"].items()) == list(zip(range(1, 5), LOSSES, strict=True))
    assert list(found.points["grad_norm"].values()) == NORMS
    assert list(found.points["learning_rate"].values()) == pytest.approx(RATES, rel=1e-7)


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_hugging_faces_trainer_is_read_and_its_means_are_compared_with_means(
    tmp_path: Path, logging_steps: int
) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            seen.append(((self.weight - x.mean()) ** 2).item())
            return {"loss": ((self.weight - x.mean()) ** 2)}

    seen: list[float] = []
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, per_device_train_batch_size=1, learning_rate=0.1, report_to=[],
        logging_steps=logging_steps, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(Model(), args, train_dataset=[{"x": torch.tensor([float(i)])} for i in range(10)])
    trainer.train()
    trainer.save_state()
    found = read_curve(tmp_path)
    assert found.steps("loss") == list(range(logging_steps, 11, logging_steps))
    ours = Curve("ours", {"loss": dict(enumerate(seen, start=1))})
    pair = align(ours, found, "loss")
    assert pair.steps.size == 10 // logging_steps
    np.testing.assert_allclose(pair.candidate, pair.reference, rtol=1e-3)  # HF rounds to 4 digits and more


def test_after_a_resume_the_later_run_counts(tmp_path: Path) -> None:
    rows = [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5), (3, 1.5), (4, 1.25)]
    (tmp_path / "a.csv").write_text("iteration,loss\n" + "".join(f"{i},{loss}\n" for i, loss in rows))
    found = read_curve(tmp_path / "a.csv")
    assert found.points["loss"] == {1: 3.0, 2: 2.0, 3: 1.5, 4: 1.25}
    assert "2 points were logged again" in found.notes[0]


def test_runs_are_compared_at_their_common_steps(tmp_path: Path) -> None:
    ours = Curve("a", {"loss": {s: 1.0 for s in range(1, 2001)}})
    theirs = Curve("b", {"loss": {s: 1.0 for s in range(500, 1800) if s != 700}})
    verdict, _ = judge_curves(ours, theirs)
    assert verdict.exit_code == 0 and any("begins at step 500" in note for note in verdict.notes)
    assert any("1 steps between 500 and 1799" in note for note in verdict.notes)
    with pytest.raises(UserError, match="no step in common"):
        judge_curves(Curve("a", {"loss": {1: 1.0}}), Curve("b", {"loss": {2: 1.0}}))


def test_the_command_writes_a_verdict_and_a_picture(tmp_path: Path) -> None:
    log = megatron_log(tmp_path, "loss")
    code, text = run("curve", log, metrics_jsonl(tmp_path), "--out", tmp_path / "out")
    assert code == 2 and "4 steps, but at least 1000" in text
    assert (tmp_path / "out/curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out/verdict.json").read_text())["verdict"] == "cannot be judged"
    assert run("curve", log, metrics_jsonl(tmp_path), "--min-steps", 4)[0] == 0
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    code, text = run("curve", log, tmp_path / "bad.csv")
    assert code == 2 and "no loss by step" in text
    assert run("curve", log, tmp_path / "nothing")[0] == 2
    assert run("curve", log, log, "--preset", "spec00")[0] == 2
