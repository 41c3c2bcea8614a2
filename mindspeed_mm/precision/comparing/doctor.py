"""The documented runbook of precision tuning, stage by stage, until one fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.comparing.band import Band
from mindspeed_mm.precision.comparing.compare import compare
from mindspeed_mm.precision.finding import Finding, Verdict
from mindspeed_mm.precision.records.record import Record

# Which phases of a comparison a stage is about.
_PREPARATION = ("data", "weights")
_LOSS = ("forward", "loss")
_NORMS = ("backward", "grad_local", "grad_reduced", "grad_clipped")
_OPTIMIZER = ("optimizer",)


@dataclass(frozen=True)
class Stage:
    """One stage of the runbook.

    Attributes:
        name: short.
        question: what it asks, in the words of the guide.
        passed: None where it could not be asked.
        findings: why it failed.
        why_not: why it could not be asked.
    """

    name: str
    question: str
    passed: bool | None
    findings: tuple[Finding, ...] = ()
    why_not: str = ""

    def __str__(self) -> str:
        word = {True: "holds", False: "FAILS", None: "not asked"}[self.passed]
        return f"{self.name}: {self.question} {word}" + (f" ({self.why_not})" if self.why_not else "")


@dataclass
class Folders:
    """What there is of two runs.

    Attributes:
        reference, candidate: folders of runs (``--save``) or of their records.
        band: the reference's measured spread.
        lr0: two runs made with ``--precision-mode lr0``.
    """

    reference: Path
    candidate: Path
    band: Band | None = None
    lr0: tuple[Path, Path] | None = None


def doctor(folders: Folders, min_steps: int = 1000) -> tuple[Verdict, list[Stage]]:
    """Go through the runbook and stop at the first stage that fails.

    Args:
        folders: what was recorded.
        min_steps: of the long curves; fewer are said to be few.

    Returns:
        The verdict, whose findings are those of the failing stage, and the stages that were asked.
    """
    verdict = Verdict("doctor")
    comparison = _comparison(folders)
    stages: list[Stage] = []
    asked: list[Callable[[], Stage]] = [
        lambda: _checklist(folders),
        lambda: _of_phases("preparation", "Are data and weights the same?", comparison, _PREPARATION),
        lambda: _of_phases("step 1 loss", "Does the forward pass give the same loss?", comparison, _LOSS),
        lambda: _of_phases("local norms", "Does the backward pass give the same gradients?", comparison, _NORMS),
        lambda: _of_phases("optimizer", "Does the optimizer make the same step of them?", comparison, _OPTIMIZER),
        lambda: _lr0(folders),
        lambda: _curve(folders, min_steps),
    ]
    for ask in asked:
        stage = ask()
        stages.append(stage)
        if stage.passed is False:
            verdict.findings = list(stage.findings)
            break
    if isinstance(comparison, Verdict):
        verdict.notes += comparison.notes
        verdict.table = comparison.table
    left_out = [stage for stage in stages if stage.passed is None]
    if verdict.first is None and any(stage.name in ("step 1 loss", "local norms", "optimizer") for stage in left_out):
        verdict.undecided = "; ".join(f"{stage.name}: {stage.why_not}" for stage in left_out)
    verdict.notes += [str(stage) for stage in left_out]
    return verdict, stages


def _comparison(folders: Folders) -> Verdict | str:
    """Compare the records; where that is not possible say why."""
    try:
        return compare(Record.open(folders.reference), Record.open(folders.candidate), folders.band)
    except UserError as error:
        return str(error)


def _checklist(folders: Folders) -> Stage:
    """Settings that decide what is computed. Differences that only may matter do not stop the runbook."""
    from mindspeed_mm.precision.settings.config_diff import judge
    from mindspeed_mm.precision.settings.config_side import understand
    from mindspeed_mm.precision.settings.config_sources import read_sources

    question = "Are the settings the same?"
    try:
        sides = [understand(read_sources(str(place))) for place in (folders.reference, folders.candidate)]
        found = judge(*sides)
    except UserError as error:
        return Stage("checklist", question, None, why_not=str(error))
    if found.undecided and not found.findings:
        return Stage("checklist", question, None, why_not=found.undecided)
    return _stage("checklist", question, found.findings)


def _of_phases(name: str, question: str, comparison: Verdict | str, phases: Sequence[str]) -> Stage:
    if isinstance(comparison, str):
        return Stage(name, question, None, why_not=comparison)
    if comparison.undecided:
        return Stage(name, question, None, why_not=comparison.undecided)
    first = comparison.first
    if first is not None and first.phase in phases:
        return _stage(name, question, comparison.findings)
    return Stage(name, question, True)


def _lr0(folders: Folders) -> Stage:
    from mindspeed_mm.precision.comparing.lr0 import compare_lr0, read_lr0

    name, question = "learning rate 0", "Do loss and norms stay together while the weights do not change?"
    if folders.lr0 is None:
        return Stage(name, question, None, why_not="give two runs made with --precision-mode lr0: --lr0 REF CAND")
    found = compare_lr0(read_lr0(*folders.lr0))
    if found.undecided:
        return Stage(name, question, None, why_not=found.undecided)
    return _stage(name, question, found.findings)


def _curve(folders: Folders, min_steps: int) -> Stage:
    from mindspeed_mm.precision.curves.criteria import judge_curves
    from mindspeed_mm.precision.curves.curves import read_curve

    name, question = "long curve", "Do the loss curves stay together?"
    try:
        found, _ = judge_curves(
            read_curve(folders.reference), read_curve(folders.candidate), None, "spec004", min_steps
        )
    except UserError as error:
        return Stage(name, question, None, why_not=str(error))
    if found.first is None and found.undecided:
        return Stage(name, question, None, why_not=found.undecided)
    return _stage(name, question, found.findings)


def _stage(name: str, question: str, findings: Sequence[Finding]) -> Stage:
    failed = any(finding.severity == "error" for finding in findings)
    return Stage(name, question, not failed, tuple(findings))
