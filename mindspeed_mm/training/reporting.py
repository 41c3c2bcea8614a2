"""What a run tells: Megatron's log line, metrics.jsonl, sinks such as TensorBoard, and a progress bar.

Values stay on the device until a step that logs: the steps in between cost the host no synchronisation.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm import accelerator
from mindspeed_mm.distributed.state import (
    data_parallel_group,
    is_last_rank,
    loader_group,
    print_line,
    print_rank_last,
    same_on_all,
)
from mindspeed_mm.training.patient_file import PatientFile
from mindspeed_mm.training.sinks import Shown, Sink


@dataclass
class StepRecord:
    """One training step as the loop saw it; tensors are not read before the next logging step."""

    iteration: int
    consumed_samples: int
    learning_rate: float
    values: dict[str, Tensor]
    grad_norm: Tensor
    seconds: float
    data_wait_seconds: float
    tokens: int
    skipped: bool = False
    local_norms: Tensor | None = None
    """Norm of each parameter's gradient, the same on all ranks."""


def merge_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Combine the micro-batches' reports of one step into a ``[numerator, denominator]`` tensor for each key.

    A scalar counts as its value over 1, so that the quotient of the sums is the mean over micro-batches; a
    ``(numerator, denominator)`` pair counts as it stands. Sums over ranks keep that meaning, and change nothing
    for values that a ``loss_func`` has already averaged or summed over the data-parallel ranks.
    """
    merged: dict[str, Tensor] = {}
    for report in reports:
        for key, value in report.items():
            pair = torch.stack([_scalar(part) for part in (value if isinstance(value, (tuple, list)) else (value, 1))])
            merged[key] = merged[key] + pair if key in merged else pair
    return merged


def agree_on_names(names: Iterable[Any]) -> list[Any]:
    """Return the names that any data-parallel rank reports, in the same order on all. A collective.

    A batch decides what a ``loss_func`` reports, and ranks have different ones. Numbers meet by their place.
    """
    names, group = list(names), data_parallel_group()
    if same_on_all(repr(names).encode(), group, accelerator.device()):
        return names
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, names, group=group)
    return list(dict.fromkeys(name for theirs in everyone for name in theirs))


def read_means(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the quotient of every name that any data-parallel rank reports. A collective.

    Args:
        values: by name, numerator and denominator of this rank, (2,); at least one.
    """
    names = agree_on_names(values)
    nothing = torch.zeros_like(next(iter(values.values())))
    return dict(zip(names, read_quotients(torch.stack([values.get(name, nothing) for name in names])), strict=True))


def read_quotients(pairs: Tensor) -> list[Any]:
    """Sum ``[..., 2]`` numerators and denominators over the data-parallel ranks and return the quotients.

    Where there is nothing to divide by (no target token anywhere) the value is 0. A collective, and the place
    where the host waits for the device.
    """
    dist.all_reduce(pairs, group=data_parallel_group())
    numerator, denominator = pairs.unbind(-1)
    return torch.where(denominator == 0, numerator, numerator / denominator).tolist()


def is_loss(name: str) -> bool:
    """Return whether a value of an evaluation is the loss: ``loss``, or ``loss/<data set>``."""
    return name.partition("/")[0] == "loss"


def perplexity(loss: float) -> float:
    """Return e to the power of a loss in nats per token, capped as Megatron's is."""
    return math.nan if math.isnan(loss) else math.exp(min(20, loss))


def _scalar(value: Any) -> Tensor:
    dtype = torch.float64 if accelerator.has_float64() else torch.float32
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(dtype)
    return torch.full((), float(value), dtype=dtype, device=accelerator.device())  # filled there: nothing is copied


def format_log_line(
    *,
    iteration: int,
    train_iters: int,
    consumed_samples: int,
    seconds_per_iteration: float,
    learning_rate: float,
    global_batch_size: int,
    values: Mapping[str, float],
    grad_norm: float,
    skipped: int,
    nan: int,
    tflops: float | None = None,
    now: datetime | None = None,
) -> str:
    """Return Megatron's training log line, character for character, except that no value is ever left out."""
    stamp = (now or datetime.now()).strftime("%Y-%m-%d %H:%M:%S")
    parts = [
        f" [{stamp}] iteration {iteration:8d}/{train_iters:8d} |",
        f" consumed samples: {consumed_samples:12d} |",
        f" elapsed time per iteration (ms): {seconds_per_iteration * 1000.0:.1f} |",
    ]
    if tflops is not None:
        parts.append(f" throughput per GPU (TFLOP/s/GPU): {tflops:.1f} |")
    parts += [f" learning rate: {learning_rate:.6E} |", f" global batch size: {global_batch_size:5d} |"]
    parts += [f" {key}: {value:.6E} |" for key, value in values.items()]
    parts += [
        " loss scale: 1.0 |",
        f" grad norm: {grad_norm:.3f} |",
        f" number of skipped iterations: {skipped:3d} |",
        f" number of nan iterations: {nan:3d} |",
    ]
    return "".join(parts)


class TrainingLog:
    """Collects step records and writes them out at logging steps. Every rank calls it; the last rank writes.

    Args:
        train_iters: length of the run, for the log line.
        log_interval: steps between two log lines.
        global_batch_size: samples of a step.
        metrics_path: where ``metrics.jsonl`` goes, None for nowhere.
        start_iteration: rows after it are dropped from an existing file: they are about to be made again.
        sinks: further places to write to, on the last rank.
        sink_interval: steps between two points in the sinks.
        flops_per_token: of forward and backward, for the throughput column; None leaves it out.
    """

    def __init__(
        self,
        *,
        train_iters: int,
        log_interval: int,
        global_batch_size: int,
        metrics_path: Path | None,
        start_iteration: int,
        sinks: Sequence[Sink],
        sink_interval: int,
        flops_per_token: float | None,
    ) -> None:
        self.train_iters = train_iters
        self.log_interval = log_interval
        self.global_batch_size = global_batch_size
        self.sinks = sinks
        self.sink_interval = sink_interval
        self.flops_per_token = flops_per_token
        self.parameter_names: list[str] = []
        """Of the local norms of the records."""
        self._records: list[StepRecord] = []
        self._writes = is_last_rank()
        self._metrics = _open_metrics(metrics_path, start_iteration) if metrics_path and self._writes else None
        self._progress = _start_progress(train_iters) if self._writes and sys.stdout.isatty() else None

    def add(self, record: StepRecord) -> None:
        """Take a step."""
        self._records.append(record)

    def write(self) -> None:
        """Print the line, and write everything taken so far, if the last step taken is one that logs."""
        if self._records and self._records[-1].iteration % self.log_interval == 0:
            self.flush(print_line=True)

    def flush(self, print_line: bool = False) -> None:
        """Read the collected values from the device and write them. A collective: call it on every rank."""
        records, self._records = self._records, []
        if not records:
            return
        # Only what a step reported is in its row: a metric that comes every tenth step is not 0 in between.
        cells = agree_on_names((number, key) for number, record in enumerate(records) for key in record.values)
        keys = list(dict.fromkeys(key for _, key in cells))
        reported: list[dict[str, float]] = [{} for _ in records]
        for (number, key), value in zip(cells, read_quotients(_pairs(records, cells)), strict=True):
            reported[number][key] = value
        grad_norms = torch.stack([record.grad_norm for record in records]).tolist()
        norms = _read_norms(records)
        tokens = torch.tensor([r.tokens for r in records], device=accelerator.device())
        dist.all_reduce(tokens, group=loader_group())
        if not self._writes:
            return
        rows = [
            self._metrics_row(record, numbers, norm, count)
            for record, numbers, norm, count in zip(records, reported, grad_norms, tokens.tolist(), strict=True)
        ]
        for row, numbers, local_norms in zip(rows, reported, norms, strict=True):
            if local_norms:
                row["local_norm"] = dict(zip(self.parameter_names, local_norms, strict=True))
            if self._metrics:
                self._metrics.write(json.dumps(row) + "\n")
            if row["iteration"] % self.sink_interval == 0:
                self._sink(_curves(row, numbers), row["iteration"], row["consumed_samples"])
        if self._metrics:
            self._metrics.flush()
        if print_line:
            self._print(records, rows, reported, keys)

    def roll_back(self, bad: StepRecord, iteration: int, samples: Sequence[tuple[int, int]]) -> None:
        """Write everything down, then drop the rows after ``iteration``, where the run goes on. A collective.

        What made it go back stays: a row ``{"iteration", "rolled_back", "left_out_samples"}`` holds the row of the
        bad step, and all ranges of samples ``[first, end)`` that are left out from here on.
        """
        self.flush(print_line=True)
        if self._metrics:
            path = Path(self._metrics.name)
            self._metrics.close()
            rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
            cause = [row for row in rows if row["iteration"] == bad.iteration and row.get("skipped")][-1]
            self._metrics = _open_metrics(path, iteration, continues=True)
            row = {"iteration": iteration, "rolled_back": cause, "left_out_samples": list(samples)}
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()

    def validation(self, iteration: int, consumed_samples: int, losses: Mapping[str, float]) -> None:
        """Record validation losses, and the perplexity of those that are called ``loss``."""
        ppl = {key: perplexity(value) for key, value in losses.items() if is_loss(key)}
        if self._metrics:
            row = {f"validation {key}": value for key, value in losses.items()}
            row |= {f"validation {key} PPL": value for key, value in ppl.items()}
            self._metrics.write(json.dumps({"iteration": iteration, **row}) + "\n")
            self._metrics.flush()
        curves = {f"{key} validation": value for key, value in losses.items()}
        curves |= {f"{key} validation ppl": value for key, value in ppl.items()}
        self._sink(curves, iteration, consumed_samples)

    def generations(self, iteration: int, consumed_samples: int, accuracy: float, shown: Sequence[Shown]) -> None:
        """Record what the model wrote for some samples, with their pictures, and how many answers were right."""
        if self._metrics:
            row = {"iteration": iteration, "validation exact match": accuracy}
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
        self._sink({"exact match validation": accuracy}, iteration, consumed_samples)
        for sink in self.sinks:
            sink.show(shown, iteration)

    def close(self) -> None:
        """Write what is left and close the files. A collective."""
        self.flush()
        for file in (self._metrics, *self.sinks):
            if file:
                file.close()
        self.stop_progress()

    def stop_progress(self) -> None:
        """Give the terminal back."""
        if self._progress:
            self._progress.stop()

    def _metrics_row(
        self, record: StepRecord, numbers: Mapping[str, float], grad_norm: float, tokens: int
    ) -> dict[str, Any]:
        return {
            "iteration": record.iteration,
            **numbers,
            "grad_norm": grad_norm,
            "learning_rate": record.learning_rate,
            "consumed_samples": record.consumed_samples,
            "samples": self.global_batch_size,
            "tokens": tokens,
            "step_time": record.seconds,
            "data_wait_time": record.data_wait_seconds,
            "samples_per_second": self.global_batch_size / record.seconds,
            "tokens_per_second": tokens / record.seconds,
            "memory_bytes": accelerator.memory_stats()["max_allocated"],
            "skipped": record.skipped,
            "nan": not all(math.isfinite(value) for value in numbers.values()),
        }

    def _print(
        self,
        records: list[StepRecord],
        rows: list[dict[str, Any]],
        reported: list[dict[str, float]],
        keys: list[str],
    ) -> None:
        seconds = sum(r.seconds for r in records) / len(records)
        made = [numbers for record, numbers in zip(records, reported, strict=True) if not record.skipped]
        found = {key: [n[key] for n in made if key in n] or [n[key] for n in reported if key in n] for key in keys}
        tflops = None
        if self.flops_per_token is not None:
            tokens = sum(row["tokens"] for row in rows) / len(rows)
            tflops = self.flops_per_token * tokens / seconds / dist.get_world_size() / 1e12
        line = format_log_line(
            iteration=records[-1].iteration,
            train_iters=self.train_iters,
            consumed_samples=records[-1].consumed_samples,
            seconds_per_iteration=seconds,
            learning_rate=records[-1].learning_rate,
            global_batch_size=self.global_batch_size,
            values={key: sum(numbers) / len(numbers) for key, numbers in found.items()},
            grad_norm=rows[-1]["grad_norm"],
            skipped=sum(r.skipped for r in records),
            nan=sum(row["nan"] for row in rows),
            tflops=tflops,
        )
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=records[-1].iteration)
            self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print_line(line)

    def _sink(self, values: Mapping[str, float], iteration: int, samples: int) -> None:
        for sink in self.sinks:
            sink.write(values, iteration, samples)


def _curves(row: Mapping[str, Any], numbers: Mapping[str, float]) -> dict[str, float]:
    """Return what the sinks show of a step, under Megatron's names."""
    return {
        **numbers,
        "learning-rate": row["learning_rate"],
        "grad-norm": row["grad_norm"],
        "iteration-time": row["step_time"],
        "throughput": row["samples_per_second"],
        "mem-allocated-bytes": row["memory_bytes"],
        **{f"local-norm/{name}": norm for name, norm in row.get("local_norm", {}).items()},
    }


def _pairs(records: Sequence[StepRecord], cells: Sequence[tuple[int, str]]) -> Tensor:
    """Return ``(numerator, denominator)`` of each cell, ``(cells, 2)``; a cell that only other ranks have is zero."""
    some = next(iter(records[0].values.values()))
    nothing = torch.zeros_like(some)
    return torch.stack([records[number].values.get(key, nothing).to(some) for number, key in cells])


def _read_norms(records: Sequence[StepRecord]) -> list[list[float]]:
    """Return the local norms of each step, empty where it has none."""
    found = [record.local_norms for record in records if record.local_norms is not None]
    rows = iter(torch.stack(found).tolist() if found else [])
    return [next(rows) if record.local_norms is not None else [] for record in records]


def report_memory(iteration: int) -> None:
    """Print this device's memory once training has reached its working size."""
    megabytes = {name: size / 2**20 for name, size in accelerator.memory_stats().items()}
    print_rank_last(
        f"[Rank {dist.get_rank()}] (after {iteration} iterations) memory (MB)"
        f" | allocated: {megabytes['allocated']} | max allocated: {megabytes['max_allocated']}"
        f" | reserved: {megabytes['reserved']} | max reserved: {megabytes['max_reserved']}"
    )


def _open_metrics(path: Path, start_iteration: int, continues: bool = False) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and start_iteration == 0 and not continues:
        path.rename(path.with_name(f"metrics-until-{datetime.now():%Y%m%d-%H%M%S-%f}.jsonl"))  # another run's
    elif path.exists():
        complete = [text for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if text.endswith("\n")]
        kept = [text for text in complete if json.loads(text)["iteration"] <= start_iteration]
        path.write_text("".join(kept), encoding="utf-8")
    return PatientFile(path)


def _start_progress(train_iters: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    progress = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
    progress.add_task("training", total=train_iters)
    progress.start()
    return progress
