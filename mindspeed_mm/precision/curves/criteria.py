"""Whether a loss curve passes: the documented criteria, and what they do not see.

Preset ``spec004``: first loss within 0.005 or 0.5 %; mean difference below 0.01 or 1 %; mean relative difference of
the gradient norm at most 10 %; at least 1,000 steps. Preset ``lr0``, for runs whose weights do not change: every loss
within 0.001. Both: differences that lie around zero; with a second run of the reference, differences within its own
noise. If that second run itself violates a limit, the limit becomes twice what it needs, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.precision.curves.curve_statistics import band, one_sidedness, onset
from mindspeed_mm.precision.curves.curves import GRAD_NORM, LEARNING_RATE, LOSS, Curve, Pair, align
from mindspeed_mm.precision.finding import Finding, Measurement, Verdict

PRESETS = ("spec004", "lr0")
MIN_STEPS = 1000
_SIDED = 0.5  # |mean d| / mean |d|
_ROUNDING = 1e-4  # relative: smaller differences may lie on one side, they are how numbers round
_FEW = 32  # steps that lie on one side by chance
_INSIDE = 0.95  # part of the steps that has to be within the reference's noise
_WIDENING = 2.0
_LR_ROUNDING = 1e-5  # relative; logs have 7 digits


@dataclass(frozen=True)
class Criterion:
    """One criterion and how the curves stand to it.

    Attributes:
        name: of it.
        values, limits: pairs of which one has to hold: ``value < limit``.
        at_most: ``value <= limit`` instead.
        step: the step it is about; None for all.
        widened: the limits are the reference's own.
    """

    name: str
    values: tuple[float, ...]
    limits: tuple[float, ...]
    units: tuple[str, ...]
    at_most: bool = False
    step: int | None = None
    widened: bool = False

    @property
    def passed(self) -> bool:
        """Whether one of its pairs holds; NaN never does."""
        pairs = zip(self.values, self.limits, strict=True)
        return any(value <= limit if self.at_most else value < limit for value, limit in pairs)

    def __str__(self) -> str:
        """Return values and limits for people."""
        sign = "<=" if self.at_most else "<"
        parts = [
            f"{_number(value, unit)} {sign} {_number(limit, unit)}"
            for value, limit, unit in zip(self.values, self.limits, self.units, strict=True)
        ]
        return " or ".join(parts) + (" (widened to the reference's own noise)" if self.widened else "")


def _number(value: float, unit: str) -> str:
    return f"{value * 100:.4g} %" if unit == "%" else f"{value:.4g}"


def criteria(preset: str, loss: Pair, grad_norm: Pair) -> list[Criterion]:
    """Return the criteria of a preset for two curves; those of the gradient norm only where both have one."""
    found: list[Criterion] = []
    gap = np.abs(loss.difference)
    if preset == "spec004":
        first = (float(gap[0]), float(loss.relative[0])), int(loss.steps[0])
        found.append(Criterion("first loss", first[0], (0.005, 0.005), ("", "%"), step=first[1]))
        means = float(gap.mean()), float(loss.relative.mean())
        found.append(Criterion("mean of the loss", means, (0.01, 0.01), ("", "%")))
    else:
        worst = int(np.argmax(gap))
        step = int(loss.steps[worst])
        found.append(Criterion("every loss", (float(gap[worst]),), (0.001,), ("",), at_most=True, step=step))
    if grad_norm.steps.size:
        mean = float(grad_norm.relative.mean())
        found.append(Criterion("mean of the gradient norm", (mean,), (0.1,), ("%",), at_most=True))
    return found


def judge_curves(
    reference: Curve,
    candidate: Curve,
    second: Curve | None = None,
    preset: str = "spec004",
    min_steps: int = MIN_STEPS,
) -> tuple[Verdict, list[Criterion]]:
    """Judge a candidate's curves by a reference's.

    Args:
        reference: the run to reach.
        candidate: the run in question.
        second: another run of the reference, for its noise.
        preset: one of ``PRESETS``.
        min_steps: fewer common steps that pass give "cannot be judged", exit code 2, rather than "aligned".

    Returns:
        The verdict, and the criteria with their values.

    Raises:
        UserError: the preset is not known, or the curves have no step in common.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: there are {', '.join(PRESETS)}.{did_you_mean(preset, PRESETS)}")
    verdict = Verdict("curve", notes=[*reference.notes, *candidate.notes])
    whole = align(reference, candidate, LOSS)
    if not whole.steps.size:
        raise UserError(
            f"{reference.place} and {candidate.place} have no step in common: {_range(reference)} and "
            f"{_range(candidate)}; compare runs of the same steps"
        )
    loss, grad_norm = whole.finite, align(reference, candidate, GRAD_NORM).finite
    verdict.findings += _not_finite(whole)
    verdict.notes += _gaps(reference, candidate, whole, grad_norm)
    if not loss.steps.size:
        verdict.undecided = "no step has a finite loss on both sides"
        return verdict, []
    found = criteria(preset, loss, grad_norm)
    if second is not None:
        found = _widened(found, preset, reference, second, verdict)
        verdict.findings += _outside_of_noise(loss, align(reference, second, LOSS).finite)
    start = onset(loss.difference)
    since = f"; the differences grow from step {loss.steps[start]} on" if start is not None else ""
    if since:
        verdict.notes.append(since[2:])
    for criterion in found:
        rows = zip(criterion.values, criterion.limits, strict=True)
        step = criterion.step if criterion.step is not None else int(loss.steps[-1])
        verdict.table += [Measurement(step, "curve", "", criterion.name, value, limit) for value, limit in rows]
        if not criterion.passed:
            verdict.findings.append(_finding(criterion.name, criterion.step, f"{criterion}{since}"))
    own = None if second is None else one_sidedness(align(reference, second, LOSS).finite.difference)
    verdict.findings += _one_sided(loss, own)
    verdict.findings += _learning_rates(align(reference, candidate, LEARNING_RATE).finite)
    count = loss.steps.size * (int(np.median(np.diff(loss.steps))) if loss.steps.size > 1 else 1)
    if count < min_steps and verdict.first is None:
        verdict.undecided = (
            f"all criteria hold over {count} steps, but at least {min_steps} are wanted; "
            "train longer, or accept fewer with --min-steps"
        )
    elif count < min_steps:
        verdict.notes.append(f"{count} steps were compared; {min_steps} are wanted for a positive answer")
    return verdict, found


def _finding(site: str, step: int | None, evidence: str, severity: str = "error") -> Finding:
    if site == "first loss":
        command = "the forward pass differs: mindspeed-mm precision compare REF CAND on records of the first step"
    elif site == "learning rate":
        command = "mindspeed-mm precision config-diff REF CAND"
    else:
        command = "mindspeed-mm precision doctor REF CAND; with --ref2 another run of the reference shows its own noise"
    # Steps count from 0 in findings and from 1 in logs.
    return Finding("curve", site, None if step is None else step - 1, evidence, command, severity)


def _not_finite(whole: Pair) -> Iterator[Finding]:
    ours, theirs = np.isfinite(whole.reference), np.isfinite(whole.candidate)
    if (bad := np.flatnonzero(ours & ~theirs)).size:
        step = int(whole.steps[bad[0]])
        evidence = (
            f"the candidate's loss is {whole.candidate[bad[0]]} where the reference's is {whole.reference[bad[0]]:g}"
        )
        yield _finding("loss", step, f"{evidence}, {bad.size} such steps")
    if (bad := np.flatnonzero(~ours)).size:
        step = int(whole.steps[bad[0]])
        yield _finding(
            "loss", step, f"the reference's loss is {whole.reference[bad[0]]}, {bad.size} such steps", "warning"
        )


def _gaps(reference: Curve, candidate: Curve, loss: Pair, grad_norm: Pair) -> Iterator[str]:
    for name, curve in (("reference", reference), ("candidate", candidate)):
        steps = curve.steps(LOSS)
        if steps and steps[0] < loss.steps[0]:
            yield f"the {name} begins at step {steps[0]}; what is compared begins at step {loss.steps[0]}"
    ours, theirs = set(reference.steps(LOSS)), set(candidate.steps(LOSS))
    first, last = int(loss.steps[0]), int(loss.steps[-1])
    missing = sum(first <= step <= last for step in ours ^ theirs)
    if missing and abs(len(ours) - len(theirs)) < min(len(ours), len(theirs)):
        yield f"{missing} steps between {first} and {last} were logged by one run only"
    if not grad_norm.steps.size:
        yield "no gradient norm on both sides: that criterion was not looked at"


def _range(curve: Curve) -> str:
    steps = curve.steps(LOSS)
    return f"steps {steps[0]} to {steps[-1]}"


def _widened(found: list[Criterion], preset: str, reference: Curve, second: Curve, verdict: Verdict) -> list[Criterion]:
    loss, norm = align(reference, second, LOSS).finite, align(reference, second, GRAD_NORM).finite
    if not loss.steps.size:
        verdict.notes.append(f"{second.place} has no step in common with {reference.place}: its noise is not known")
        return found
    own = {criterion.name: criterion for criterion in criteria(preset, loss, norm)}
    result = []
    for criterion in found:
        noise = own.get(criterion.name)
        if noise is not None and not noise.passed:
            limits = tuple(
                max(limit, _WIDENING * value) for limit, value in zip(criterion.limits, noise.values, strict=True)
            )
            verdict.notes.append(
                f"the reference itself violates the preset: {noise.name}, {noise}; the limit is widened"
            )
            criterion = replace(criterion, limits=limits, widened=True)
        result.append(criterion)
    return result


def _outside_of_noise(loss: Pair, noise: Pair) -> Iterator[Finding]:
    common, mine, its = np.intersect1d(loss.steps, noise.steps, return_indices=True)
    if common.size < _FEW:
        return
    gap = np.abs(loss.difference[mine])
    limit = np.maximum(band(noise.difference[its]), _ROUNDING * np.abs(loss.reference[mine]))
    outside = gap > limit
    share = 1 - float(outside.mean())
    if share < _INSIDE:
        step = int(common[np.argmax(outside)])
        yield _finding(
            "noise of the reference", step, f"{share:.1%} of the steps are within it, {_INSIDE:.0%} are wanted"
        )


def _one_sided(loss: Pair, own: float | None) -> Iterator[Finding]:
    if loss.steps.size < _FEW or float(loss.relative.mean()) < _ROUNDING:
        return
    share = one_sidedness(loss.difference)
    if share > max(_SIDED, own or 0.0):
        mean = float(loss.difference.mean())
        side = "above" if mean > 0 else "below"
        beside = "" if own is None else f", {own:.2f} between two runs of the reference"
        yield _finding(
            "one-sided difference",
            None,
            f"the candidate's loss lies {side} the reference's by {abs(mean):.4g} on average; "
            f"|mean d| / mean |d| is {share:.2f}, at most {_SIDED} is usual for noise{beside}",
        )


def _learning_rates(rates: Pair) -> Iterator[Finding]:
    count = rates.steps.size
    if not count:
        return
    off = ~_close(rates.reference, rates.candidate)
    # Some trainers log the rate of the next step.
    if count > 2 and (
        _close(rates.reference[1:], rates.candidate[:-1]).all()
        or _close(rates.reference[:-1], rates.candidate[1:]).all()
    ):
        return
    if off.any():
        i = int(np.argmax(off))
        evidence = (
            f"reference {rates.reference[i]:.6g}, candidate {rates.candidate[i]:.6g}, {int(off.sum())} such steps"
        )
        yield _finding("learning rate", int(rates.steps[i]), evidence, "warning")


def _close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(a - b) <= _LR_ROUNDING * np.maximum(np.abs(a), np.abs(b)))
