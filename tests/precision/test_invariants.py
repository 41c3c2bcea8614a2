"""What holds within a run, on records that are written by hand and on runs of two ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_mm.precision.comparing.invariants import invariants
from mindspeed_mm.precision.records.record import Key, RankStep, Record, RecordWriter
from mindspeed_mm.precision.records.sketch import SIZE, Sketch

NAMES = ["a.weight", "b.weight", "b.bias"]
CLIP = 0.5
WRITTEN = [Key("weights", "b.weight", "parameter")]


def sketch(values: np.ndarray, part: Any = None) -> Sketch:
    """Sketch a vector of ``SIZE`` numbers by itself: it is linear, and its norm is known."""
    return Sketch(
        vector=values * SIZE**0.5,
        count=SIZE,
        total=float(values.sum()),
        square_sum=float(values @ values),
        maximum=float(values.max()),
        minimum=float(values.min()),
        nonfinite=0,
        dtype="float32",
        shape=(SIZE,),
        part=part,
    )


def write(folder: Path, change: Any = None) -> Record:
    """Write two steps of two ranks that hold all parameters; ``change(step, rank, key, values)`` returns others."""
    for rank in range(2):
        writer = RecordWriter(folder, rank, 2)
        if rank == 0:
            writer.start({"arguments": {"clip_grad": CLIP}})
        weights = {name: np.random.default_rng(len(name)).normal(size=SIZE) for name in NAMES}
        for step in range(2):
            rng = np.random.default_rng(100 + step)
            locals_ = {name: rng.normal(size=(2, SIZE)) * 0.1 for name in NAMES}
            reduced = {name: value.sum(0) for name, value in locals_.items()}
            norm = float(np.sqrt(sum(value @ value for value in reduced.values())))
            factor = min(1.0, CLIP / (norm + 1e-6))
            data = RankStep(scalars={"grad_norm": (norm, "same")})
            for name in NAMES:
                update = rng.normal(size=SIZE) * 1e-3
                values = {
                    Key("weights", name, "parameter"): weights[name],
                    Key("grad_local", name, "gradient"): locals_[name][rank],
                    Key("grad_reduced", name, "gradient"): reduced[name],
                    Key("grad_clipped", name, "gradient"): factor * reduced[name],
                    Key("optimizer", name, "update"): update,
                }
                for key, value in values.items():
                    other = change(step, rank, key, value) if change else None
                    one = sketch(value if other is None else other)
                    replicated = key.phase != "grad_local" and rank > 0
                    data.entries[key] = replace(one, copy=replicated, summed=key.phase == "grad_local")
                weights[name] = weights[name] + update
            writer.write(step, data)
    return Record.open(folder)


def test_a_sound_run_has_no_findings(tmp_path: Path) -> None:
    verdict = invariants(write(tmp_path))
    assert not verdict.findings and verdict.exit_code == 0 and verdict.table


BREAKS: dict[str, tuple[Any, str, str, int]] = {
    "gradient not reduced": (
        lambda step, rank, key, value: value * 0.5 if key.phase == "grad_reduced" and key.site == "b.bias" else None,
        "grad_reduced",
        "b.bias",
        0,
    ),
    "replicas differ": (
        lambda step, rank, key, value: value + 1e-3 * rank if key == Key("weights", "a.weight", "parameter") else None,
        "weights",
        "a.weight",
        0,
    ),
    "clipped twice": (
        lambda step, rank, key, value: value * 0.5 if key.phase == "grad_clipped" else None,
        "grad_clipped",
        "",
        0,
    ),
    "weights written by something else": (
        lambda step, rank, key, value: (
            value * 1.01 if (step, key.phase, key.site) == (1, "weights", "b.weight") else None
        ),
        "optimizer",
        "b.weight",
        0,
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_does_not_hold_is_found(name: str, tmp_path: Path) -> None:
    change, phase, site, step = BREAKS[name]
    first = invariants(write(tmp_path, change)).first
    assert first is not None and (first.phase, first.site, first.step) == (phase, site, step), first


def test_nan_of_one_rank(tmp_path: Path) -> None:
    record = write(tmp_path)
    path = tmp_path / "nan"
    for rank in range(2):
        writer = RecordWriter(path, rank, 2)
        if rank == 0:
            writer.start({})
        entries = dict(record.step(0).of_rank(rank))
        key = Key("grad_local", "b.weight", "gradient")
        if rank == 1:
            entries[key] = replace(entries[key], nonfinite=3)
        writer.write(0, RankStep(entries=entries))
    first = invariants(Record.open(path)).first
    assert first is not None and (first.phase, first.site) == ("grad_local", "b.weight")
    assert "on rank 1 of 2" in first.evidence


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", [None, "F05 vision tower not reduced", "F11 clipping by a partial norm"])
def test_runs_of_two_ranks(name: str | None, ranks2: Any, tmp_path: Path) -> None:
    from tests.precision.bench import find, record, save_model

    run = record(ranks2, tmp_path / "run", save_model(tmp_path / "hf"), fault=name)
    first, fault = invariants(run).first, find(name)
    if fault is None:
        assert first is None, first
    else:
        assert first is not None and first.phase == fault.phase, first
