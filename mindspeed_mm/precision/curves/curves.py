"""Loss, gradient norm and learning rate over the steps of a run, from whatever its trainer has left behind."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra

LOSS, GRAD_NORM, LEARNING_RATE = "loss", "grad_norm", "learning_rate"
# What trainers call them, compared in lower case with "-" and " " for "_".
_NAMES = {
    "step": ("step", "iteration", "iter", "global_step", "train/global_step"),
    LOSS: ("loss", "lm_loss", "train/loss", "train_loss", "training_loss", "loss_metrics/global_avg_loss"),
    GRAD_NORM: ("grad_norm", "train/grad_norm", "gnorm", "global_norm"),
    LEARNING_RATE: ("learning_rate", "lr", "train/learning_rate"),
}
_MEANING = {name: meaning for meaning, names in _NAMES.items() for name in names}
_LOG_LINE = re.compile(r"iteration\s+(\d+)\s*/\s*\d+ \|(.*)")
_LOG_VALUE = re.compile(r"\s*([^:|]+?):\s*([-+.\deE]+|[-+]?nan|[-+]?inf)\s*\|", re.IGNORECASE)
_READABLE = (
    "metrics.jsonl, a log with Megatron's lines, trainer_state.json of Hugging Face, TensorBoard event files, "
    "or a CSV file with the columns step and loss"
)


@dataclass
class Curve:
    """What a run has logged.

    Attributes:
        place: where it was read.
        points: value by step for each of ``loss``, ``grad_norm``, ``learning_rate``; steps count from 1.
        notes: what a reader should know, such as steps that were logged twice.
    """

    place: str
    points: dict[str, dict[int, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def steps(self, name: str) -> list[int]:
        """Return the steps at which ``name`` was logged, in order."""
        return sorted(self.points.get(name, {}))


def read_curve(path: str | Path) -> Curve:
    """Read a run's curves from a file, or a folder in which such a file lies.

    Of a step that was logged again after a resume, and of all steps behind it, the later run counts.

    Raises:
        UserError: there is nothing to read, or no loss in it.
    """
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{path}: there is no such file; give {_READABLE}")
    curve = Curve(str(file))
    rows = _rows(file)
    repeated = _collect(curve, rows)
    if not curve.points.get(LOSS):
        raise UserError(f"{file}: no loss by step in it; give {_READABLE}")
    if repeated:
        curve.notes.append(f"{file}: {repeated} points were logged again after a resume; the later ones count")
    return curve


def _file_in(folder: Path) -> Path:
    for pattern in ("metrics.jsonl", "trainer_state.json", "checkpoint-*/trainer_state.json", "*.log", "*.csv"):
        if found := sorted(folder.glob(pattern), key=lambda path: (path.stat().st_mtime, path.name)):
            return found[-1]
    if any(folder.rglob("events.out.tfevents.*")):
        return folder
    raise UserError(f"{folder}: no curve in this folder; give {_READABLE}")


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield ``{"step": ..., "loss": ...}`` in the order of the file."""
    if path.is_dir() or path.name.startswith("events.out.tfevents"):
        yield from _event_rows(path)
        return
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        if path.suffix == ".jsonl":
            yield from (_renamed(json.loads(line)) for line in file if line.strip())
        elif path.suffix == ".json":
            history = json.load(file)
            if "log_history" not in history:
                raise UserError(f"{path}: has no log_history; give {_READABLE}")
            yield from map(_renamed, history["log_history"])
        elif path.suffix == ".csv":
            yield from map(_renamed, csv.DictReader(file))
        else:
            for line in file:
                if found := _LOG_LINE.search(line):
                    yield _renamed({"step": found[1], **dict(_LOG_VALUE.findall(found[2]))})


def _renamed(row: Mapping[str, Any]) -> Mapping[str, Any]:
    named: dict[str, Any] = {}
    if "train_runtime" in row:  # HF Trainer's summary, which has a mean of all losses
        return named
    for name, value in row.items():
        # W&B writes "name of the run - loss" in its CSV files.
        plain = str(name).rpartition(" - ")[2].strip().lower().replace("-", "_").replace(" ", "_")
        if plain in _MEANING and value not in (None, ""):
            named.setdefault(_MEANING[plain], value)
    return named


def _event_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    module = "tensorboard.backend.event_processing.event_accumulator"
    reader = import_extra(module, "tensorboard", "a TensorBoard folder")
    folders = {path} if path.is_file() else {file.parent for file in path.rglob("events.out.tfevents.*")}
    for folder in sorted(folders):
        events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        points = [(point, tag) for tag in events.Tags()["scalars"] for point in events.Scalars(tag)]
        for point, tag in sorted(points, key=lambda pair: pair[0].wall_time):
            yield _renamed({"step": point.step, tag: point.value})


def _collect(curve: Curve, rows: Iterable[Mapping[str, Any]]) -> int:
    repeated = 0
    newest: dict[str, int] = {}
    for row in rows:
        if "step" not in row:
            continue
        step = int(float(row["step"]))
        for name in (LOSS, GRAD_NORM, LEARNING_RATE):
            if name not in row:
                continue
            points = curve.points.setdefault(name, {})
            if step <= newest.get(name, step - 1):
                old = [other for other in points if other >= step]
                repeated += len(old)
                for other in old:
                    del points[other]
            points[step], newest[name] = float(row[name]), step
    return repeated


@dataclass(frozen=True)
class Pair:
    """Two runs at the steps that both have logged.

    Attributes:
        steps: (N,) int64.
        reference, candidate: (N,) float64.
    """

    steps: np.ndarray
    reference: np.ndarray
    candidate: np.ndarray

    @property
    def finite(self) -> Pair:
        """The steps at which both are finite."""
        kept = np.isfinite(self.reference) & np.isfinite(self.candidate)
        return Pair(self.steps[kept], self.reference[kept], self.candidate[kept])

    @property
    def difference(self) -> np.ndarray:
        """Candidate minus reference."""
        return np.asarray(self.candidate - self.reference)

    @property
    def relative(self) -> np.ndarray:
        """Absolute difference over the reference's absolute value; 0 where both are 0."""
        size = np.abs(self.reference)
        gap = np.abs(self.difference)
        return np.divide(gap, size, out=np.where(gap == 0, 0.0, np.inf), where=size != 0)


def align(reference: Curve, candidate: Curve, name: str) -> Pair:
    """Bring two curves to common steps.

    A loss that was logged every k steps is the mean since the line before, as Megatron and HF Trainer have it. Where
    the other run has logged more often, the mean of the same steps is taken. Other values are those of the step itself.
    """
    ours, theirs = reference.points.get(name, {}), candidate.points.get(name, {})
    if name == LOSS:
        coarse = ours if len(ours) <= len(theirs) else theirs
        ours, theirs = _averaged(ours, coarse), _averaged(theirs, coarse)
    steps = sorted(ours.keys() & theirs.keys())
    columns = ([points[step] for step in steps] for points in (ours, theirs))
    return Pair(np.array(steps, dtype=np.int64), *(np.array(column, dtype=np.float64) for column in columns))


def _averaged(fine: dict[int, float], coarse: dict[int, float]) -> dict[int, float]:
    """Return the means of ``fine`` over the steps since the point before, at the steps of ``coarse``."""
    ends = sorted(coarse)
    if len(ends) < 2 or len(fine) <= len(coarse):
        return fine
    averaged: dict[int, float] = {}
    before = ends[0] - (ends[1] - ends[0])
    for end in ends:
        inside = [fine[step] for step in range(max(before, 0) + 1, end + 1) if step in fine]
        if end in fine and inside:
            averaged[end] = float(np.mean(inside)) if end - before == len(inside) or end == ends[0] else fine[end]
        before = end
    return averaged
