"""What the differences of stored weights and optimizer states mean for alignment."""

from __future__ import annotations

from mindspeed_mm.checkpoint.compare import Difference
from mindspeed_mm.checkpoint.optimizer_state import PREFIX
from mindspeed_mm.checkpoint.store import MODEL
from mindspeed_mm.precision.finding import Finding, Verdict

_WEIGHTS = "compare how the weights were converted: names, the order of heads, ties, what was left random"
_STATE = "compare the optimizer's settings: mindspeed-mm precision config-diff REF CAND"
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
