"""What is done at every step: local norms, weights that stay, and the steps before something goes wrong."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.recording.anomaly import AnomalyPlan, AnomalyRing, read_anomaly_plan
from mindspeed_mm.precision.recording.view import PlainView
from mindspeed_mm.precision.records.record import Key, Record, RecordWriter
from mindspeed_mm.precision.records.sketch import distance
from tests.precision.runs import record
from tests.precision.test_recorder import batches
from tests.ranks import RankPool
from tests.training.job import Job, run_here


def test_local_norms_are_those_of_plain_pytorch(
    job: Job, hf_folder: Path, ranks2: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    parts = batches(job, monkeypatch)
    job.flags |= {"log-local-norm": True, "precision-capture": None, "train-iters": 1, "micro-batch-size": 2}
    job.flags |= {"save": tmp_path / "save", "no-save-optim": True}
    assert not ranks2.run(run_here, job.command(), job.folder, timeout=240)[0].code
    row = json.loads((tmp_path / "save" / "metrics.jsonl").read_text().splitlines()[0])
    model = AutoModelForImageTextToText.from_pretrained(hf_folder, dtype=torch.float32).train()
    targets = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    for part in parts:
        model(**part, num_items_in_batch=targets, use_cache=False).loss.backward()
    expected = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
    assert row["local_norm"] == pytest.approx(expected, rel=1e-4, abs=1e-8)
    assert sum(norm**2 for norm in row["local_norm"].values()) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-5)


def test_weights_stay_and_gradients_are_summed(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    flags = {"precision_capture": "steps=0-2,level=parameter", "precision_mode": "lr0", "global_batch_size": 4}
    run = record(ranks2, job, tmp_path / "r", micro_batch_size=2, train_iters=3, **flags)
    first, last = run.step(0), run.step(2)
    sums = Record.open(tmp_path / "r" / "lr0").step(2)
    assert sums.scalars["lr0_steps"] == 3
    losses = [run.step(step).scalars["loss"] for step in range(3)]
    assert sums.scalars["lr0_loss"] == pytest.approx(sum(losses), rel=1e-6)
    for key, sketch in first.of_phase("weights").items():
        assert (last.entries[key].vector == sketch.vector).all() and last.entries[key].norm == sketch.norm
    assert all(sketch.norm > 0 for key, sketch in last.of_phase("optimizer").items() if key.what == "update")
    for key, total in sums.entries.items():
        expected = sum(run.step(step).entries[Key("grad_reduced", key.site, "gradient")].vector for step in range(3))
        assert total.vector == pytest.approx(expected, abs=1e-5 * float(abs(expected).max()))


@pytest.mark.parametrize("log_interval", [1, 9], ids=["noticed in its own step", "noticed in the next one"])
def test_the_steps_before_an_anomaly_are_kept_and_replayed(
    job: Job, ranks1: RankPool, tmp_path: Path, log_interval: int
) -> None:
    job.flags |= {"log-interval": log_interval}
    job.flags |= {"precision-capture": None, "precision-on-anomaly": "dump=2", "train-iters": 5, "lr": "1e25"}
    job.flags |= {"precision-dir": tmp_path / "r", "micro-batch-size": 2, "seed": 7}
    outcome = ranks1.run(run_here, job.command(), job.folder, timeout=240)[0]
    assert outcome.code and "not finite" in outcome.text
    (folder,) = (tmp_path / "r" / "anomalies").iterdir()
    assert str(folder / "replay.sh") in outcome.text
    kept = Record.open(folder)
    bad = kept.manifest["anomaly"]["step"]
    assert kept.steps == [bad - 1, bad] and folder.name == f"step_{bad:07d}"
    assert any(sketch.nonfinite for sketch in kept.step(bad).entries.values())
    assert not any(sketch.nonfinite for sketch in kept.step(bad - 1).entries.values())
    batches = torch.load(folder / "batches_00000.pt", weights_only=True)
    assert [len(batches[step]) for step in kept.steps] == [4, 4]
    command = shlex.split((folder / "replay.sh").read_text().splitlines()[-1].replace('"$@"', ""))
    assert ranks1.run(run_here, command, job.folder, timeout=240)[0].code, "it ends as it did"
    again = Record.open(folder / "replay").step(bad - 1)
    for key, sketch in kept.step(bad - 1).entries.items():
        assert distance(again.entries[key], sketch).relative < 1e-6, key  # hooks change the order of some sums
    assert {sample.name for sample in again.samples} == {sample.name for sample in kept.step(bad - 1).samples}


def leaps_of_the_loss(folder: Path, bad: dict[int, tuple[float, float]], dump: int) -> list[str]:
    """Make 14 steps of two ranks' losses, 1 and 2 but in bad steps; return what was written."""
    rank = dist.get_rank()
    ring = AnomalyRing(PlainView(torch.nn.Linear(2, 2)), RecordWriter(folder, rank, 2), AnomalyPlan(dump=dump))
    found = []
    for step in range(14):
        ring.step_begins(step)
        ring.take([], list)
        ring.loss(torch.tensor(bad.get(step, (1.0, 2.0))[rank]))
        ring.gradients_reduced()
        ring.gradients_clipped(torch.tensor(1.0))
        found.append(ring.step_ends(1e-3))
    found.append(ring.stop())
    return [path.name for path in found if path]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({}, []),
        ({3: (100.0, 2.0)}, []),  # nobody knows yet what is usual
        ({9: (1.0, 8.1), 11: (4.0, 4.9)}, ["step_0000009"]),  # 9.1 and 8.9, where 3 is usual
        ({13: (9.1, 0.0)}, ["step_0000013"]),  # the last one
        ({9: (9.1, 0.0), 10: (9.1, 9.1), 11: (0.0, 9.2)}, ["step_0000009"]),  # once, not at every step
        ({9: (9.1, 0.0), 11: (9.1, 9.1)}, ["step_0000009", "step_0000011"]),
        ({2: (math.nan, 2.0), 10: (1.0, math.inf)}, ["step_0000002", "step_0000010"]),
    ],
)
def test_a_leap_of_the_loss_of_one_rank_is_an_anomaly_on_all(
    ranks2: RankPool, tmp_path: Path, bad: dict[int, tuple[float, float]], expected: list[str]
) -> None:
    assert ranks2.run(leaps_of_the_loss, tmp_path, bad, dump=3) == [expected, expected]
    assert ranks2.run(leaps_of_the_loss, tmp_path, bad, dump=2) == [expected, expected], "in its place"
    for name in expected:
        kept = Record.open(tmp_path / name)
        step = kept.manifest["anomaly"]["step"]
        assert kept.steps == [step - 1, step]
        assert kept.manifest["anomaly"]["loss"] == pytest.approx(sum(bad[step]), nan_ok=True)


def test_a_step_that_was_broken_off_does_not_hide_the_one_before(tmp_path: Path) -> None:
    """A rollback breaks a step off and makes those before it anew."""
    ring = AnomalyRing(PlainView(torch.nn.Linear(2, 2)), RecordWriter(tmp_path, 0, 1), AnomalyPlan(dump=2))

    def begin(step: int, loss: float) -> None:
        ring.step_begins(step)
        ring.take([], list)
        ring.loss(torch.tensor(loss))
        ring.gradients_reduced()

    def finish() -> Path | None:
        ring.gradients_clipped(torch.tensor(1.0))
        return ring.step_ends(1e-3)

    found = []
    for step, loss in [*((step, 1.0) for step in range(10)), (10, math.nan)]:
        begin(step, loss)
        found.append(finish())
    begin(11, 1.0)  # and back to the state after step 8
    for step, loss in [(9, 1.5), (10, 1.0), (11, math.inf)]:
        begin(step, loss)
        found.append(finish())
    begin(12, 1.0)
    found.append(ring.stop())
    assert [path.name for path in found if path] == ["step_0000010", "step_0000011"]
    assert Record.open(tmp_path / "step_0000010").steps == [9, 10]
    assert Record.open(tmp_path / "step_0000010").step(9).scalars["loss"] == 1.0, "before it went back"
    assert Record.open(tmp_path / "step_0000011").steps == [10, 11]


@pytest.mark.parametrize("text", ["dump=0", "3", "dump=3,spike=1", "dumps=3", "loss=0.5", "dump=nan", "spike=x"])
def test_an_anomaly_plan_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="dump=3"):
        read_anomaly_plan(text)
