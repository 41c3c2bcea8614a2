"""What has to hold within one run, whatever the model: no reference is needed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from mindspeed_mm.precision.comparing.band import Gap, gap
from mindspeed_mm.precision.comparing.compare import common_site
from mindspeed_mm.precision.comparing.continuity import rewritten
from mindspeed_mm.precision.finding import Finding, Measurement, Verdict
from mindspeed_mm.precision.records.record import PHASES, Key, Record, StepRecord
from mindspeed_mm.precision.records.sketch import Sketch

# Relative: sums in another order, in the dtype they are reduced in.
_SUMS = {"float32": 2e-5, "float64": 1e-11, "bfloat16": 2e-2, "float16": 4e-3}
_CLIPPED = 1e-5
# What ranks that hold the same part have to agree on, bit for bit but for the digest.
_REPLICATED = ("weights", "grad_reduced", "grad_clipped", "optimizer")
_NOISE = 1e-3


def invariants(record: Record) -> Verdict:
    """Check a run against itself: replicas, reductions, clipping, the optimizer's writes.

    Args:
        record: one run.
    """
    verdict = Verdict("invariants")
    if not record.steps:
        verdict.undecided = f"{record.folder}: no step was recorded"
        return verdict
    clip = _clip_grad(record)
    for number in record.steps:
        step = record.step(number)
        verdict.findings += _finite(step) + _replicas(step) + _reduction(step, verdict)
        verdict.findings += _clipping(step, clip, verdict) + _writes(record, step)
    if len(record.ranks) == 1:
        verdict.notes.append("one rank wrote the record: there are no replicas to compare")
    verdict.findings.sort(key=lambda f: (f.step or 0, PHASES.index(f.phase)))
    return verdict


def _finite(step: StepRecord) -> list[Finding]:
    """Nothing is NaN or infinite; the first tensor that is, in causal order."""
    first = min(
        (key for key, sketch in step.entries.items() if sketch.nonfinite),
        key=lambda key: PHASES.index(key.phase),
        default=None,
    )
    if first is None:
        return []
    ranks = [rank for rank in step.ranks if (s := step.of_rank(rank).get(first)) and s.nonfinite]
    where = f" on rank {', '.join(map(str, ranks))} of {len(step.ranks)}" if len(step.ranks) > 1 else ""
    text = f"{first.what} holds NaN or infinity{where}"
    command = "look at what goes in there: record the step with tensors=" + (first.site or "*")
    return [Finding(first.phase, first.site, step.step, text, command)]


def _replicas(step: StepRecord) -> list[Finding]:
    """Ranks that hold the same part of a parameter hold the same numbers."""
    apart: dict[str, dict[str, str]] = defaultdict(dict)
    for key in step.entries:
        if key.phase not in _REPLICATED:
            continue
        holders: dict[Any, list[tuple[int, Sketch]]] = defaultdict(list)
        for rank in step.ranks:
            if (sketch := step.of_rank(rank).get(key)) is not None:
                holders[sketch.part].append((rank, sketch))
        for held in holders.values():
            for rank, sketch in held[1:]:
                found = gap(sketch, held[0][1])
                if found.distance > 2e-6 * max(held[0][1].norm, sketch.norm):
                    size = found.distance / max(held[0][1].norm, 1e-30)
                    apart[key.phase][key.site] = f"{key.what} on ranks {held[0][0]} and {rank}, {size:.2g} of its norm"
    findings = []
    for phase, sites in apart.items():
        text = f"{len(sites)} parameters differ between ranks that hold the same: {next(iter(sites.values()))}"
        command = "see that every rank loads, reduces and updates these parameters alike"
        findings.append(_finding(step, phase, sites, text, command))
    return findings


def _reduction(step: StepRecord, verdict: Verdict) -> list[Finding]:
    """The reduced gradient is the sum of the local ones."""
    off: dict[str, float] = {}
    for key, local in step.of_phase("grad_local").items():
        reduced = step.entries.get(Key("grad_reduced", key.site, key.what))
        if reduced is None or local.shape != reduced.shape or local.nonfinite or reduced.nonfinite:
            continue
        tolerance = max(_SUMS.get(d, 2e-5) for d in (local.dtype, reduced.dtype))
        scale = max(reduced.norm, _NOISE * _neighbours(step, key))
        found = gap(reduced, local).distance / max(scale, 1e-30)
        verdict.table.append(Measurement(step.step, "grad_reduced", key.site, "sum of local", found, tolerance))
        if found > tolerance:
            off[key.site] = found
    if not off:
        return []
    worst = max(off, key=lambda site: off[site])
    text = f"{len(off)} reduced gradients are not the sum of the local ones: {worst} by {off[worst]:.2g} of its norm"
    command = "see which parameters are left out of FSDP (ignored_modules) and whether their gradients are reduced"
    return [_finding(step, "grad_reduced", off, text, command)]


def _clipping(step: StepRecord, clip: float | None, verdict: Verdict) -> list[Finding]:
    """The norm is that of all gradients, and clipping multiplies all of them by the same factor."""
    reduced, clipped = step.of_phase("grad_reduced"), step.of_phase("grad_clipped")
    if not reduced or any(sketch.nonfinite for sketch in reduced.values()):
        return []
    norm = math.sqrt(sum(sketch.square_sum for sketch in reduced.values()))
    told = step.scalars.get("grad_norm")
    command = "see over which parameters and which ranks the norm is taken"
    if told is not None and abs(told - norm) > _CLIPPED * norm:
        text = f"the gradient norm is {told:.7g}, that of the reduced gradients is {norm:.7g}"
        return [Finding("grad_clipped", "", step.step, text, command)]
    if clip is None or not clipped:
        return []
    factor = min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0
    off: dict[str, float] = {}
    for key, sketch in clipped.items():
        before = reduced.get(Key("grad_reduced", key.site, key.what))
        if before is None:
            continue
        apart = Gap(float(np.linalg.norm(sketch.vector - factor * before.vector)) / len(sketch.vector) ** 0.5)
        tolerance = max(_CLIPPED, _SUMS.get(sketch.dtype, _CLIPPED) / 4)
        size = apart.distance / max(factor * before.norm, 1e-30)
        verdict.table.append(Measurement(step.step, "grad_clipped", key.site, "clipped", size, tolerance))
        if size > tolerance:
            off[key.site] = sketch.norm / max(before.norm, 1e-30)
    if not off:
        return []
    text = f"{len(off)} of {len(clipped)} gradients were multiplied by about {next(iter(off.values())):.6g}; to clip a "
    text += f"norm of {norm:.6g} at {clip:g} takes {factor:.6g}"
    return [_finding(step, "grad_clipped", off, text, command)]


def _writes(record: Record, step: StepRecord) -> list[Finding]:
    """Only the optimizer writes parameters: a step's weights plus its update are the next step's weights."""
    if step.step + 1 not in record.steps:
        return []
    off = rewritten(step, record.step(step.step + 1))
    if not off:
        return []
    worst = max(off, key=lambda site: off[site])
    text = f"{len(off)} parameters were changed by something else than the optimizer: {worst} by {off[worst]:.2g}"
    return [_finding(step, "optimizer", off, text, "see what writes to them: an average, a tie, a checkpoint")]


def _neighbours(step: StepRecord, key: Key) -> float:
    """Return the norm that a gradient would have if its elements were as large as its siblings' are."""
    around = key.site.rpartition(".")[0].rpartition(".")[0]
    sizes = [
        sketch.norm / sketch.count**0.5
        for other, sketch in step.of_phase("grad_reduced").items()
        if sketch.count and other.site.startswith(around)
    ]
    return max(sizes, default=0.0) * step.entries[key].count ** 0.5


def _clip_grad(record: Record) -> float | None:
    value = _search(record.manifest, ("clip_grad", "max_grad_norm"))
    return None if value is None else float(value)


def _search(values: Any, names: Iterable[str]) -> Any:
    """Return the first value under one of these keys, however deep."""
    if isinstance(values, dict):
        for name in names:
            if name in values and isinstance(values[name], (int, float)):
                return values[name]
        for inner in values.values():
            if (found := _search(inner, names)) is not None:
                return found
    return None


def _finding(step: StepRecord, phase: str, sites: Iterable[str], text: str, command: str) -> Finding:
    sites = tuple(sites)
    everything = [key.site for key in step.of_phase(phase)]
    return Finding(phase, common_site(sites, everything), step.step, text, command, sites=sites)
