"""What a precision check answers: findings, the measurements behind them, and the verdict they make together."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ALIGNED, DIFFERENT, UNDECIDED = 0, 1, 2
NAME = "verdict.json"


@dataclass(frozen=True)
class Finding:
    """A place where the candidate leaves the reference, and what to do next.

    Attributes:
        phase: one of ``record.PHASES``, or a check's own word where no phase fits (``checklist``, ``curve``).
        site: path of the module or parameter, in HF names; of several parameters what they have in common.
        step: 0-based step, the iterations done before; None where steps have no part in it.
        evidence: one sentence with the numbers.
        next_command: what to run, or do, next.
        severity: ``error`` makes the verdict negative, ``warning`` and ``note`` do not.
        sites: every path concerned, when there are several.
    """

    phase: str
    site: str
    step: int | None
    evidence: str
    next_command: str
    severity: str = "error"
    sites: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "" if self.step is None else f"step {self.step}, "
        return f"{where}{self.phase}, {self.site or 'the whole model'}: {self.evidence}\n  next: {self.next_command}"


@dataclass(frozen=True)
class Measurement:
    """One line of the table behind a comparison: a distance and what was allowed."""

    step: int
    phase: str
    site: str
    what: str
    relative: float
    tolerance: float
    note: str = ""

    @property
    def in_band(self) -> bool:
        """Whether the distance is allowed and nothing else is noted. NaN is out."""
        return self.relative <= self.tolerance and not self.note


@dataclass
class Verdict:
    """What a check says; ``findings`` in the order of their causes, the first is the one to look at.

    Attributes:
        check: the verb, ``compare`` or ``invariants`` say.
        findings: empty when nothing was found.
        notes: what a reader has to know to judge the verdict: a default band, steps that were not recorded.
        undecided: why nothing can be said; None when something can.
        table: everything that was measured, in causal order.
    """

    check: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    undecided: str | None = None
    table: list[Measurement] = field(default_factory=list)

    @property
    def first(self) -> Finding | None:
        """The first finding that counts."""
        return next((finding for finding in self.findings if finding.severity == "error"), None)

    @property
    def exit_code(self) -> int:
        """0 aligned, 1 not, 2 cannot be judged."""
        if self.first:
            return DIFFERENT
        return ALIGNED if self.undecided is None else UNDECIDED

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as plain values, without the table."""
        answer = {ALIGNED: "aligned", DIFFERENT: "not aligned", UNDECIDED: "cannot be judged"}[self.exit_code]
        return {
            "check": self.check,
            "verdict": answer,
            "exit_code": self.exit_code,
            "undecided": self.undecided,
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
        }

    def write(self, folder: Path) -> Path:
        """Write ``verdict.json``, and the table beside it as ``table.jsonl``."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        with (folder / "table.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({**asdict(row), "in_band": row.in_band}) + "\n" for row in self.table)
        return path

    def __str__(self) -> str:
        lines = [str(self.first)] if self.first else [f"cannot be judged: {self.undecided}"] if self.undecided else []
        lines = lines or ["aligned"]
        others = len(self.findings) - 1 if self.first else len(self.findings)
        if others:
            lines.append(f"({others} more in {NAME})")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
