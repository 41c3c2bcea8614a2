"""Two runs whose weights do not change: is there a bias that grows with the steps, where rounding averages out?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.comparing.band import gap
from mindspeed_mm.precision.curves.curves import Curve, align, read_curve
from mindspeed_mm.precision.finding import Finding, Measurement, Verdict
from mindspeed_mm.precision.records.record import Record

# A mean so many standard errors away from 0 is no accident, nor, for paired steps of one model, a matter of samples.
_SIGMAS = 5.0
_SMALLEST = {"loss": 1e-7, "grad_norm": 1e-6}
_PER_STEP = 1e-3
_GROWTH = 0.8


@dataclass(frozen=True)
class Bias:
    """Signed differences over steps, relative to the reference.

    Attributes:
        mean: of the differences: stays where it is with more steps if there is a bias.
        error: standard error of the mean: shrinks as the square root of the steps.
        steps: how many.
    """

    mean: float
    error: float
    steps: int

    @classmethod
    def of(cls, reference: np.ndarray, candidate: np.ndarray) -> Bias:
        """Return the bias of a scalar that both runs have at the same steps."""
        relative = (candidate - reference) / np.maximum(np.abs(reference), 1e-30)
        error = float(relative.std(ddof=1)) / math.sqrt(len(relative)) if len(relative) > 1 else math.inf
        return cls(float(relative.mean()), error, len(relative))

    def is_there(self, smallest: float) -> bool:
        """Whether the mean is not explained by what averages out."""
        return abs(self.mean) > max(smallest, _SIGMAS * self.error)

    def __str__(self) -> str:
        return f"{self.mean:+.3g} of the reference on average over {self.steps} steps, give or take {self.error:.2g}"


@dataclass(frozen=True)
class Runs:
    """What two runs of ``--precision-mode lr0`` have left; None for what one of them has not.

    Attributes:
        curves: loss and gradient norm of every step.
        records: the steps that were recorded. The norm of a module's output is a signed quantity too, and names the
            first module that is biased.
        sums: the gradients of all steps added up.
    """

    curves: tuple[Curve, Curve] | None = None
    records: tuple[Record, Record] | None = None
    sums: tuple[Record, Record] | None = None


def compare_lr0(runs: Runs) -> Verdict:
    """Judge two runs made with ``--precision-mode lr0``: the module first, if one is known, then gradients and loss."""
    curves = runs.curves
    verdict = Verdict("lr0")
    for name in ("loss", "grad_norm") if curves else ():
        assert curves is not None
        pair = align(*curves, name).finite
        if not len(pair.steps):
            continue
        bias = Bias.of(pair.reference, pair.candidate)
        worst = float(np.abs(pair.difference).max())
        row = Measurement(0, "loss", name, "mean signed difference", abs(bias.mean), _SIGMAS * bias.error)
        verdict.table.append(row)
        if bias.is_there(_SMALLEST[name]):
            text = f"{name} is biased: {bias}"
            verdict.findings.append(Finding("loss", name, None, text, "record steps of both runs and compare them"))
        elif name == "loss" and worst > _PER_STEP:
            step = int(pair.steps[int(np.abs(pair.difference).argmax())])
            text = f"loss differs by {worst:.3g} at step {step}, allowed {_PER_STEP:g}, with weights that do not change"
            command = f"record step {step} of both runs (--precision-capture steps={step}) and compare"
            verdict.findings.append(Finding("loss", "loss", step, text, command))
    if runs.sums is not None and (found := _growing_sum(*runs.sums, verdict)):
        verdict.findings.insert(0, found)
    if runs.records is not None and (found := _biased_module(*runs.records, verdict)):
        verdict.findings.insert(0, found)
    if not verdict.table:
        verdict.undecided = "the runs have no step in common"
    return verdict


def read_lr0(reference: Path, candidate: Path) -> Runs:
    """Read what two runs have left, given their ``--save`` folders or those of their records.

    Raises:
        UserError: there is nothing.
    """
    curves = records = sums = None
    problems = []
    try:
        curves = (read_curve(reference), read_curve(candidate))
    except UserError as error:
        problems.append(str(error))
    try:
        records = (Record.open(reference), Record.open(candidate))
    except UserError as error:
        problems.append(str(error))
    places = [
        next((p for p in (f / "precision" / "lr0", f / "lr0") if p.is_dir()), None) for f in (reference, candidate)
    ]
    if places[0] and places[1]:
        sums = (Record.open(places[0]), Record.open(places[1]))
    if curves is records is sums is None:
        raise UserError("; ".join(problems))
    return Runs(curves, records, sums)


def _growing_sum(reference: Record, candidate: Record, verdict: Verdict) -> Finding | None:
    """Return the gradient that is most biased, if the sums part faster than rounding lets them."""
    steps = [step for step in reference.steps if step in candidate.steps]
    if len(steps) < 2:
        verdict.notes.append("the sums of the gradients were written once: how they grow takes 200 steps")
        return None
    sides = [[record.step(step) for step in steps] for record in (reference, candidate)]
    counts = [step.scalars["lr0_steps"] for step in sides[0]]
    keys = [key for key in sides[0][0].entries if all(key in step.entries for side in sides for step in side)]
    apart = np.array(
        [[gap(b.entries[key], a.entries[key]).distance for key in keys] for a, b in zip(*sides, strict=True)]
    )
    sizes = np.array([sides[0][-1].entries[key].norm for key in keys])
    first, last = np.linalg.norm(apart[0]), np.linalg.norm(apart[-1])
    if not last > _SMALLEST["grad_norm"] * np.linalg.norm(sizes):
        return None
    power = math.log(last / first) / math.log(counts[-1] / counts[0]) if first > 0 else math.inf
    row = Measurement(steps[-1], "grad_reduced", "", "growth of the sums' distance", power, _GROWTH)
    verdict.table.append(row)
    if power <= _GROWTH:
        return None
    worst = keys[int((apart[-1] / np.maximum(sizes, 1e-30)).argmax())]
    text = f"the sums of the gradients part as the power {power:.2f} of the steps (rounding: 0.5, a bias: 1)"
    command = f"mindspeed-mm precision compare {reference.folder.parent} {candidate.folder.parent}"
    return Finding("grad_reduced", worst.site, steps[-1], f"{text}; most of all that of {worst.site}", command)


def _biased_module(reference: Record, candidate: Record, verdict: Verdict) -> Finding | None:
    """Return the first module, in the order of execution, whose output's norm is off to one side in all steps."""
    steps = [step for step in reference.steps if step in candidate.steps]
    if len(steps) < 4:
        verdict.notes.append(f"{len(steps)} recorded steps in common: signed accumulation takes 4 or more")
        return None
    ours, theirs = [[record.step(n).entries for n in steps] for record in (reference, candidate)]
    for key in ours[0]:
        if key.phase not in ("forward", "backward") or not key.what.startswith(("output", "grad_input")):
            continue
        if not all(key in entries for entries in [*ours, *theirs]):
            continue
        norms = [np.array([entries[key].norm for entries in side]) for side in (ours, theirs)]
        if not np.isfinite(norms).all() or not norms[0].all():
            continue
        bias = Bias.of(*norms)
        verdict.table.append(Measurement(steps[0], key.phase, key.site, key.what, abs(bias.mean), _SIGMAS * bias.error))
        if bias.is_there(_floor(ours[0][key].dtype)):
            text = f"the norm of {key.what} is biased: {bias}"
            command = f"mindspeed-mm precision replay module {reference.folder} {candidate.folder} --site {key.site}"
            return Finding(key.phase, key.site, steps[0], text, command)
    return None


def _floor(dtype: str) -> float:
    return {"bfloat16": 2e-4, "float16": 3e-5}.get(dtype, 1e-6)
