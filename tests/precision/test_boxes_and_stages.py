"""A tensor that ranks hold in several boxes each, and modules that run on one pipeline stage after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_mm.checkpoint.boxes import range_boxes
from mindspeed_mm.precision.recording.placement import Placed, box_of
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.records.record import Key, RankStep, Record, RecordWriter
from mindspeed_mm.precision.records.sketch import Sketch, distance

WEIGHT = Key("weights", "w", "parameter")
LOCAL = Key("grad_local", "w", "gradient")


def sketched(whole: torch.Tensor, ranges: list[tuple[int, int]], copy: bool, times: int = 1) -> RankStep:
    """Return what a rank notes that holds flat ranges of a tensor, box by box, and ``times`` summands of all of it."""
    pool = StepPool()
    for begin, end in ranges:
        for box in range_boxes(whole.shape, begin, end):
            local = whole[box]
            part = box_of([one.start for one in box], local.shape)
            pool.add_whole(WEIGHT, Placed(local, tuple(whole.shape), part, copy, True))
    for _ in range(times):
        for rows in (slice(0, 2), slice(2, 5)):  # boxes of a fused layer
            local = whole[rows] / (2 * times)
            part = box_of([rows.start, 0], local.shape)
            pool.add_whole(LOCAL, Placed(local, tuple(whole.shape), part, copy, True), summed=True)
    return RankStep(entries=pool.read())


def test_boxes_of_ranks_add_up_to_the_whole(tmp_path: Path) -> None:
    whole = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    ranks = [([(0, 4), (20, 35)], False, 1), ([(4, 20)], False, 2), ([(0, 4), (20, 35)], True, 1)]
    for rank, (ranges, copy, times) in enumerate(ranks):
        writer = RecordWriter(tmp_path, rank, len(ranks))
        if rank == 0:
            writer.start({})
        writer.write(0, sketched(whole, ranges, copy, times))
    step = Record.open(tmp_path).step(0)
    plain = StepPool()
    plain.add_whole(WEIGHT, whole)
    expected = plain.read()[WEIGHT]
    for key in (WEIGHT, LOCAL):
        found = step.entries[key]
        assert distance(found, expected).relative < 1e-6, key
        assert (found.count, found.shape, found.part) == (35, (5, 7), None), key
    assert step.entries[WEIGHT].norm == pytest.approx(float(whole.norm()), rel=1e-6)
    first, last = step.of_rank(0)[WEIGHT], step.of_rank(2)[WEIGHT]
    assert first.part == last.part is not None and first.part != step.of_rank(1)[WEIGHT].part


def test_modules_are_in_the_order_in_which_a_pipeline_runs(tmp_path: Path) -> None:
    sketch = Sketch(torch.ones(32).numpy(), 1, 1.0, 1.0, 1.0, 1.0, 0, "float32", (1,))
    # Two ranks of two interleaved chunks each: layers 0 and 2, and 1 and 3.
    for rank in range(2):
        layers = {rank: rank, rank + 2: rank + 2}
        entries, stages = {Key("weights", f"layers.{layer}", "parameter"): sketch for layer in layers}, {}
        for phase, order in (("forward", list(layers)), ("backward", list(layers)[::-1])):
            for layer in order:
                for what in ("input.0", "output.0") if phase == "forward" else ("grad_output.0", "grad_input.0"):
                    entries[Key(phase, f"layers.{layer}", what)] = sketch
                    stages[Key(phase, f"layers.{layer}", what)] = layers[layer]
        writer = RecordWriter(tmp_path, rank, 2)
        if rank == 0:
            writer.start({})
        writer.write(0, RankStep(entries=entries, stages=stages))
    step = Record.open(tmp_path).step(0)
    ran = {
        phase: [(key.site[-1], key.what) for key in step.entries if key.phase == phase]
        for phase in ("forward", "backward")
    }
    assert ran["forward"] == [(n, what) for n in "0123" for what in ("input.0", "output.0")]
    assert ran["backward"] == [(n, what) for n in "3210" for what in ("grad_output.0", "grad_input.0")]
