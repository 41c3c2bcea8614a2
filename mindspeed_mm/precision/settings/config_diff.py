"""Which settings of two sides differ, whatever each system calls and writes them."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_mm.precision.finding import Finding, Verdict
from mindspeed_mm.precision.settings.config_keys import Key, keys
from mindspeed_mm.precision.settings.config_side import Setting, Side
from mindspeed_mm.precision.settings.config_values import equal

SAME, DIFFERENT, ONE_SIDE = "same", "different", "known on one side only"


@dataclass(frozen=True)
class Row:
    """A setting of both sides; None where a side does not say it and no default is known."""

    key: Key
    reference: Setting | None
    candidate: Setting | None

    @property
    def outcome(self) -> str:
        """One of ``SAME``, ``DIFFERENT``, ``ONE_SIDE``."""
        if self.reference is None or self.candidate is None:
            return ONE_SIDE
        return SAME if equal(self.key, self.reference.value, self.candidate.value) else DIFFERENT


def rows(reference: Side, candidate: Side) -> list[Row]:
    """Return all settings that at least one side has, in the order of the tables."""
    found: list[Row] = []
    constant = reference.value("lr_schedule") == candidate.value("lr_schedule") == "constant"
    for key in keys().values():
        pair = reference.settings.get(key.name), candidate.settings.get(key.name)
        if key.only_derives or pair == (None, None) or (constant and key.name in ("decay_steps", "min_learning_rate")):
            continue
        if key.instead_of and all(key.instead_of in side.settings for side in (reference, candidate)):
            continue
        found.append(Row(key, *pair))
    return found


def judge(reference: Side, candidate: Side) -> Verdict:
    """Return the differences as findings, the gravest first, each with the sentence of the checklist it belongs to."""
    verdict = Verdict("config-diff")
    table = rows(reference, candidate)
    different = [row for row in table if row.outcome == DIFFERENT]
    order = ("error", "warning", "note")
    for row in sorted(different, key=lambda row: order.index(row.key.severity)):
        evidence = f"reference {row.reference}, candidate {row.candidate}"
        verdict.findings.append(Finding("checklist", row.key.name, None, evidence, row.key.check, row.key.severity))
    compared = sum(row.outcome != ONE_SIDE for row in table)
    if not compared:
        verdict.undecided = "no setting is known on both sides"
    verdict.notes.append(f"{compared} settings compared, {compared - len(different)} of them the same")
    for name, side in (("reference", reference), ("candidate", candidate)):
        verdict.notes += [f"{name}: {note}" for note in side.notes]
    for row in table:
        if row.outcome == ONE_SIDE and row.key.severity == "error":
            where, setting = ("reference", row.reference) if row.reference else ("candidate", row.candidate)
            if setting is not None and setting.value not in (None, False, ()):
                verdict.notes.append(f"{row.key.name} is known of the {where} only: {setting}")
    for name, side in (("reference", reference), ("candidate", candidate)):
        for system, names in side.unknown.items():
            listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
            verdict.notes.append(f"{name}: not compared, no table has them ({system}): {listed}")
    return verdict
