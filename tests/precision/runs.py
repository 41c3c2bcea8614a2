"""Recorded training runs, and how far two records are apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mindspeed_mm.precision.records.record import Key, Record, StepRecord
from mindspeed_mm.precision.records.sketch import Sketch, distance
from tests.data.tiny import save_digits
from tests.ranks import RankPool
from tests.training.job import Job, run_here


def varied_rows(folder: Path) -> list[dict[str, Any]]:
    """Return sharegpt rows of different lengths with one image, two or none; two of them are the same."""
    small = save_digits(folder, 8, scale=2)
    large = save_digits(folder, 8, scale=3)  # over the small ones: odd images are large, even ones small
    save_digits(folder, 1, scale=2)
    rows = []
    for index in range(8):
        question = "What digit is this? " * (1 + index % 3)
        images, marks = large[index]["images"], "<image>\n"
        if index == 2:
            images, marks = [small[0]["images"][0], large[3]["images"][0]], "<image>\n<image>\n"
        if index == 5:
            images, marks = [], ""
        messages = [
            {"role": "user", "content": marks + question},
            {"role": "assistant", "content": f"The answer is {index}."},
        ]
        rows.append({"messages": messages} | ({"images": images} if images else {}))
    return [*rows[:7], rows[3]]


def record(pool: RankPool, job: Job, folder: Path, **flags: Any) -> Record:
    """Run the job in pool ranks with some flags changed (``None`` leaves one out) and return its record."""
    before = dict(job.flags)
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()} | {"precision-dir": folder}
    outcomes = pool.run(run_here, job.command(), job.folder, timeout=240)
    job.flags = before
    assert not any(outcome.code for outcome in outcomes), outcomes[0].text
    return Record.open(folder)


def comparable(step: StepRecord) -> dict[Key, Sketch]:
    """Return the entries of a step without positions: some batches hand them on, with others modules make them."""
    return {k: s for k, s in step.entries.items() if "int" not in s.dtype or not re.match(r"input\.(?!0\b)", k.what)}


def distances(a: Record, b: Record, step: int = 0) -> dict[Key, float]:
    """Return the distance of each entry that a step of both has."""
    first, second = comparable(a.step(step)), comparable(b.step(step))
    found = {}
    for key in first.keys() & second.keys():
        assert first[key].rows == second[key].rows, key
        apart = distance(first[key], second[key])
        found[key] = max(apart.relative, apart.norm_gap)
    return found


def worst(found: dict[Key, float], phases: str) -> tuple[float, str]:
    """Return the largest distance in some phases, and of what it is."""
    return max((value, str(key)) for key, value in found.items() if key.phase in phases.split())
