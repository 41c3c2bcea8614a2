"""What a step of a run starts from: what the step before it has left, or something else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mindspeed_mm.precision.comparing.band import gap
from mindspeed_mm.precision.comparing.pairing import NEIGHBOURS, block
from mindspeed_mm.precision.records.record import Key, Record, StepRecord
from mindspeed_mm.precision.records.sketch import Sketch
from mindspeed_mm.precision.replaying.optimizer_rules import ADAM_STATE, SGD_STATE

STATES = (*ADAM_STATE, *SGD_STATE)
_EXACT = 5e-6  # relative: what sums in another order differ by
_LOADED = 0.05  # of a state that came with weights that agree
_EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def before(record: Record, step: int) -> StepRecord | None:
    """Return the step before this one, if it was recorded."""
    return record.step(step - 1) if step - 1 in record.steps else None


def rewritten(earlier: StepRecord, step: StepRecord) -> dict[str, float]:
    """Return the parameters that something else than the optimizer has changed, and by how much of their norm.

    In every run the weights of a step and its update are the weights of the next.
    """
    found: dict[str, float] = {}
    for key, before in earlier.of_phase("weights").items():
        update, now = earlier.entries.get(Key("optimizer", key.site, "update")), step.entries.get(key)
        if now is None or now.shape != before.shape or now.nonfinite or before.nonfinite:
            continue
        made = before.vector + (update.vector if update is not None else 0.0)
        apart = float(np.linalg.norm(now.vector - made)) / len(made) ** 0.5
        size = max(now.norm, before.norm)
        rounding = 0.0 if update is None else _EPS.get(now.dtype, 0.0) * update.norm
        if apart > _EXACT * size + rounding:
            found[key.site] = apart / max(size, 1e-30)
    return found


def start(step: StepRecord, earlier: StepRecord | None) -> dict[Key, Sketch]:
    """Return the optimizer's state that a step begins with, under the names it has after the step.

    It is recorded itself where recording begins; otherwise it is what ``earlier``, the step before, has left.
    """
    left = {} if earlier is None else earlier.of_phase("optimizer")
    found = {key: sketch for key, sketch in left.items() if key.what in STATES}
    for key, sketch in step.of_phase("optimizer").items():
        name = key.what.removesuffix(".before")
        if name != key.what and name in STATES:
            found[Key(key.phase, key.site, name)] = sketch
    return found


def replaced(earlier: StepRecord, step: StepRecord) -> dict[str, list[str]]:
    """Return the parameters whose optimizer state is not what the step before has left, by the name of the state."""
    found: dict[str, list[str]] = {}
    for key, left in earlier.of_phase("optimizer").items():
        if key.what in STATES and key in step.entries and _apart(key, earlier, step) > _EXACT * left.norm:
            found.setdefault(key.what, []).append(key.site)
    return found


def begun_apart(ours: Mapping[Key, Sketch], theirs: Mapping[Key, Sketch]) -> dict[str, list[str]]:
    """Return the parameters whose state two runs begin with differently, by the name of the state."""
    largest: dict[tuple[str, str], float] = {}
    for key, sketch in ours.items():
        place = (key.what, block(key.site))
        largest[place] = max(largest.get(place, 0.0), sketch.norm / max(sketch.count, 1) ** 0.5)
    off: dict[str, list[str]] = {}
    for key in ours.keys() & theirs.keys():
        sketch = ours[key]
        # Where the gradient is zero but for rounding, so is what has been made of it.
        scale = max(sketch.norm, NEIGHBOURS * largest[key.what, block(key.site)] * sketch.count**0.5)
        if gap(sketch, theirs[key]).distance > _LOADED * scale:
            off.setdefault(key.what, []).append(key.site)
    return off


def steps_made(step: StepRecord) -> dict[str, float]:
    """Return how many steps each parameter's optimizer has made after this one, where its state counts them."""
    return {key.site: sketch.total for key, sketch in step.of_phase("optimizer").items() if key.what == "step"}


def _apart(key: Key, earlier: StepRecord, step: StepRecord) -> float:
    """Return the distance between what ``earlier`` has left and what ``step`` found; 0 where that is not known."""
    name = Key(key.phase, key.site, f"{key.what}.before")
    left, now = earlier.tensor(key), step.tensor(name)
    if left is not None and step.tensor(key) is not None:
        return math.inf if now is None else float((now.double() - left.double()).norm())
    sketch = step.entries.get(name)
    return 0.0 if sketch is None else gap(sketch, earlier.entries[key]).distance
