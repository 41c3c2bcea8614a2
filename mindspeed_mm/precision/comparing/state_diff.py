"""What the differences of stored weights and optimizer states mean for alignment."""

from __future__ import annotations

from pathlib import Path

from mindspeed_mm.checkpoint.compare import Difference
from mindspeed_mm.checkpoint.optimizer_state import PREFIX
from mindspeed_mm.checkpoint.store import MODEL
from mindspeed_mm.precision.finding import Finding, Verdict
from mindspeed_mm.precision.records.record import MANIFEST, Key, Record
from mindspeed_mm.precision.records.sketch import Sketch, distance

_WEIGHTS = "compare how the weights were converted: names, the order of heads, ties, what was left random"
_STATE = "compare the optimizer's settings: mindspeed-mm precision config-diff REF CAND"
_ROUNDING = 5e-6  # relative: what sums of squares lose
_MISSING = "give it to the converter, or find out why the model does not have it"


def judge_state(count: int, differences: list[Difference], tolerance: float = 0.0) -> Verdict:
    """Turn differences into findings: weights first, what is missing before what differs, the farthest first.

    Args:
        count: tensors that were compared or found in one place only.
        differences: between them.
        tolerance: relative L2 distance that is allowed; values that are equal in another dtype are only noted.
    """
    verdict = Verdict("state-diff")
    for difference in differences:
        weight = difference.name.startswith(MODEL) or not difference.name.startswith((PREFIX, "optimizer", "mp_rank_"))
        known = difference.relative_l2 == difference.relative_l2
        evidence = f"{difference.reason}; " if difference.reason else ""
        if known:
            evidence += f"relative L2 {difference.relative_l2:.3g}, largest difference {difference.max_abs:.3g}"
        command = _MISSING if not known else _WEIGHTS if weight else _STATE
        allowed = known and difference.relative_l2 <= tolerance
        verdict.findings.append(
            Finding(
                "weights" if weight else "optimizer",
                difference.name,
                None,
                evidence.rstrip("; "),
                command,
                "note" if allowed else "error",
            )
        )
    far = {difference.name: difference.relative_l2 for difference in differences}
    verdict.findings.sort(key=lambda f: (f.severity != "error", f.phase != "weights", _rank(far[f.site])))
    verdict.notes.append(f"{count - len(differences)} of {count} tensors are equal")
    return verdict


def _rank(relative: float) -> float:
    return -relative if relative == relative else float("-inf")


def is_record(folder: Path) -> bool:
    """Return whether a folder is that of a record; a checkpoint has a file of the same name."""
    file = folder / MANIFEST
    return file.is_file() and '"precision_format"' in file.read_text(encoding="utf-8")


def judge_records(reference: Record, candidate: Record, tolerance: float = 0.0) -> Verdict:
    """Compare the weights that two records started from, and the optimizer's state of their first common step.

    What a record holds of a tensor gives its norm to 6 digits and a distance to about 20 %.
    """
    ours, theirs = _states(reference, candidate)
    verdict = Verdict("state-diff")
    if not ours or not theirs:
        verdict.undecided = f"no weights in {(candidate if ours else reference).folder}"
        return verdict
    apart: list[tuple[float, Finding]] = []
    for key in dict.fromkeys([*ours, *theirs]):
        phase = "weights" if key.phase == "weights" else "optimizer"
        command = _WEIGHTS if phase == "weights" else _STATE
        if key not in ours or key not in theirs:
            where = "reference" if key in ours else "candidate"
            text = f"{key.what}: only in the {where}"
            apart.append((float("inf"), Finding(phase, key.site, None, text, _MISSING)))
        elif text := _apart(ours[key], theirs[key], tolerance):
            far = distance(theirs[key], ours[key]).relative
            apart.append((far, Finding(phase, key.site, None, f"{key.what}: {text}", command)))
    apart.sort(key=lambda pair: (pair[1].phase != "weights", -pair[0]))
    verdict.findings = [finding for _, finding in apart]
    verdict.notes.append(f"{len(ours.keys() & theirs.keys())} tensors compared, {len(apart)} differ or are missing")
    return verdict


def _apart(ours: Sketch, theirs: Sketch, tolerance: float) -> str:
    if ours.shape != theirs.shape:
        return f"shape {ours.shape} and {theirs.shape}"
    found = distance(theirs, ours)
    worst = max(found.relative, found.norm_gap)
    if worst <= max(tolerance, _ROUNDING):
        return ""
    exchanged = found.norm_gap <= _ROUNDING < found.relative
    return f"relative distance about {worst:.2g}" + (
        ", with the same norm: values are exchanged, or change their signs" if exchanged else ""
    )


def _states(reference: Record, candidate: Record) -> tuple[dict[Key, Sketch], dict[Key, Sketch]]:
    weights = dict(reference.weights), dict(candidate.weights)
    common = sorted(set(reference.steps) & set(candidate.steps))
    if common:
        for found, record in zip(weights, (reference, candidate), strict=True):
            entries = record.step(common[0]).of_phase("optimizer")
            left_out = ("update", "parameter")
            found |= {k: s for k, s in entries.items() if k.what not in left_out and not k.what.endswith(".before")}
    return weights
