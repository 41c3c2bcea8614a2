"""The log line, and how micro-batch reports are combined."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.reporting import StepRecord, TrainingLog, format_log_line, merge_reports, read_quotients
from mindspeed_mm.training.sinks import TensorBoardSink, WandbSink, open_sinks
from tests.ranks import RankPool

NOW = datetime(2025, 12, 8, 10, 0, 0)


def line(**changes: object) -> str:
    values: dict = dict(
        iteration=1,
        train_iters=10000,
        consumed_samples=16,
        seconds_per_iteration=6.842,
        learning_rate=1e-5,
        global_batch_size=16,
        values={"loss": 1.548069},
        grad_norm=12.3454,
        skipped=0,
        nan=0,
        now=NOW,
    )
    return format_log_line(**{**values, **changes})


def test_log_line_is_megatrons() -> None:
    assert line() == (
        " [2025-12-08 10:00:00] iteration        1/   10000 | consumed samples:           16 | "
        "elapsed time per iteration (ms): 6842.0 | learning rate: 1.000000E-05 | global batch size:    16 | "
        "loss: 1.548069E+00 | loss scale: 1.0 | grad norm: 12.345 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |"
    )


def test_negative_and_nan_losses_are_printed() -> None:
    assert "loss: -2.500000E-01 |" in line(values={"loss": -0.25})
    assert "loss: NAN |" in line(values={"loss": math.nan})


def test_throughput_column() -> None:
    assert "| throughput per GPU (TFLOP/s/GPU): 1.2 | learning rate" in line(tflops=1.23)


def test_the_elapsed_time_stays_where_published_scripts_look_for_it() -> None:
    assert line().split(":")[4].strip().startswith("6842.0")  # awk -F ':' '{print $5}'


def test_scalars_average_and_pairs_divide_sums() -> None:
    merged = merge_reports([{"a": torch.tensor(1.0), "b": (4.0, 2)}, {"a": torch.tensor(3.0), "b": (2.0, 4)}])
    assert merged["a"].tolist() == [4.0, 2.0]
    assert merged["b"].tolist() == [6.0, 6.0]


def quotients_of_rank() -> list[float]:
    import torch.distributed as dist

    from mindspeed_mm.distributed import state

    rank = dist.get_rank()
    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    # mean of 1 and 3; 10 of rank 0's 2 tokens with 20 of rank 1's 8 tokens; nothing to divide by
    pairs = torch.tensor([[1.0 + 2 * rank, 1.0], [10.0 * (rank + 1), 2.0 + 6 * rank], [0.0, 0.0]])
    return read_quotients(pairs)


def test_quotients_over_ranks(ranks2: RankPool) -> None:
    assert ranks2.run(quotients_of_rank) == [[2.0, 3.0, 0.0]] * 2


def join_and_open(folder: str, *, train_iters: int, log_interval: int, tensorboard: str | None = None) -> TrainingLog:
    """Join the other ranks and open the log of a run."""
    from mindspeed_mm.distributed import state

    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    return TrainingLog(
        train_iters=train_iters,
        log_interval=log_interval,
        global_batch_size=8,
        metrics_path=Path(folder) / "metrics.jsonl",
        start_iteration=0,
        sinks=open_sinks(Namespace(tensorboard_dir=tensorboard, wandb_project=None)),
        sink_interval=1,
        flops_per_token=None,
    )


def log_what_differs(folder: str, names: tuple[tuple[str, ...], ...]) -> None:
    import torch.distributed as dist

    log = join_and_open(folder, train_iters=1, log_interval=1)
    rank = dist.get_rank()
    values = merge_reports([{name: torch.tensor(float(len(name) + rank)) for name in names[rank]}])
    log.add(StepRecord(1, 8, 1e-3, values, torch.tensor(2.0), 0.5, 0.1, 100, False))
    log.write()
    log.close()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((("loss", "text"), ("loss", "image")), {"loss": 4.5, "text": 4.0, "image": 6.0}),
        ((("loss",), ("image", "loss")), {"loss": 4.5, "image": 6.0}),
    ],
)
def test_ranks_that_report_different_names_are_not_mixed_up(
    ranks2: RankPool, tmp_path: Path, names: Any, expected: dict[str, float]
) -> None:
    ranks2.run(log_what_differs, str(tmp_path), names)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {key: row[key] for key in ("loss", "text", "image") if key in row} == expected


def log_now_and_then(folder: str) -> str:
    """Log three steps, of which the second reports an accuracy on one rank, and a name that rows have too."""
    import torch.distributed as dist

    from tests.training.test_saving import capture

    log = join_and_open(folder, train_iters=3, log_interval=3)
    for i in range(1, 4):
        report = {"loss": 1.0 * i, "tokens": (5.0, 2)}
        if i == 2 and dist.get_rank() == 1:
            report["accuracy"] = 0.5
        log.add(StepRecord(i, 8 * i, 1e-3, merge_reports([report]), torch.tensor(float(i)), 0.5, 0.1, 100))
    _, text = capture(log.write)
    log.close()
    return text


def test_a_step_that_does_not_report_a_value_has_none(ranks2: RankPool, tmp_path: Path) -> None:
    text = ranks2.run(log_now_and_then, str(tmp_path))[1]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("accuracy") for row in rows] == [None, 0.5, None]
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert "| loss: 2.000000E+00 | tokens: 2.500000E+00 | accuracy: 5.000000E-01 | loss scale" in text
    assert [row["tokens"] for row in rows] == [200] * 3, "rows have the framework's"


def write_log(folder: str) -> None:
    log = join_and_open(folder, train_iters=4, log_interval=2, tensorboard=f"{folder}/tensorboard")
    for i in range(1, 4):
        values = merge_reports([{"loss": torch.tensor(1 / 3, dtype=torch.float64)}])
        log.add(StepRecord(i, 8 * i, 1e-3, values, torch.tensor(2.0), 0.5, 0.1, 100, False))
        log.write()
    log.close()


def test_metrics_have_every_step_with_full_precision(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(write_log, str(tmp_path))
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert rows[0]["loss"] == 1 / 3
    assert rows[0]["tokens"] == 200  # both ranks'
    expected = {"grad_norm": 2.0, "learning_rate": 1e-3, "step_time": 0.5, "data_wait_time": 0.1, "samples": 8}
    assert {key: rows[0][key] for key in expected} == expected
    assert rows[0]["tokens_per_second"] == pytest.approx(400)
    assert rows[0]["memory_bytes"] > 0
    assert list((tmp_path / "tensorboard").glob("events*"))


class RecordingWandb:
    """Stands in for the package: keeps what is called on it and on the run it returns."""

    Error = ConnectionError

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.calls: list[tuple[str, Any]] = []

    def init(self, **settings: Any) -> RecordingWandb:
        if self.fails:
            raise self.Error("no API key")
        self.calls.append(("init", settings))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", (name, step_metric)))

    def log(self, values: dict[str, float]) -> None:
        self.calls.append(("log", values))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def wandb_args(folder: Path) -> Namespace:
    return Namespace(
        tensorboard_dir=None, wandb_project="p", wandb_exp_name="n", wandb_save_dir=None, save=str(folder / "s"), lr=0.1
    )


def test_wandb_gets_every_value_over_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = RecordingWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    args = wandb_args(tmp_path)
    (sink,) = open_sinks(args)
    sink.write({"loss": 0.5}, 3, 24)
    sink.close()
    config = {key: value for key, value in vars(args).items() if value is not None}
    assert wandb.calls == [
        ("init", {"project": "p", "name": "n", "dir": args.save, "config": config}),
        ("define_metric", ("*", "iteration")),
        ("log", {"loss": 0.5, "iteration": 3, "samples": 24}),
        ("finish", None),
    ]
    assert Path(args.save).is_dir()


def test_a_log_writes_steps_and_validation_to_its_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[dict[str, float], int, int]] = []
    sink = SimpleNamespace(write=lambda *row: rows.append(row), close=lambda: rows.append(({}, 0, 0)))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, **_: None)
    for group in ("data_parallel_group", "loader_group"):
        monkeypatch.setattr(f"mindspeed_mm.training.reporting.{group}", lambda: None)
    log = TrainingLog(
        train_iters=4,
        log_interval=4,
        global_batch_size=8,
        metrics_path=None,
        start_iteration=0,
        sinks=[sink],
        sink_interval=2,
        flops_per_token=None,
    )
    for i in range(1, 5):
        values = merge_reports([{"loss": torch.tensor(float(i))}])
        log.add(StepRecord(i, 8 * i, 1e-3, values, torch.tensor(2.0), 0.5, 0.1, 100, False))
        log.write()
    log.validation(4, 32, {"loss": 7.0})
    log.close()
    (second, *at_second), (_, *at_fourth), validation, closed = rows
    assert (at_second, at_fourth) == ([2, 16], [4, 32])
    assert {"loss": 2.0, "grad-norm": 2.0, "learning-rate": 1e-3, "throughput": 16.0}.items() <= second.items()
    perplexity = pytest.approx(1096.633158)  # e to the 7
    assert validation == ({"loss validation": 7.0, "loss validation ppl": perplexity}, 4, 32)
    assert closed == ({}, 0, 0)


def test_sinks_that_cannot_start_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--wandb-project needs .*pip install 'mindspeed-mm\[wandb\]'"):
        open_sinks(wandb_args(tmp_path))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--tensorboard-dir needs .*pip install 'mindspeed-mm\[tensorboard\]'"):
        TensorBoardSink(str(tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", RecordingWandb(fails=True))
    with pytest.raises(UserError, match=r"no API key.*wandb login"):
        WandbSink("p", None, None, {})
