"""Which checkpoints of a run are kept."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm.checkpoint import manifest
from mindspeed_mm.checkpoint.integrity import inspect
from mindspeed_mm.checkpoint.publish import checkpoints_in, iteration_of, read_tracker
from mindspeed_mm.errors import UserError


@dataclass(frozen=True)
class Retention:
    """What to keep; a rule that is None keeps nothing, and with all of them None everything stays.

    Attributes:
        last: so many of the newest.
        every: those whose iteration is a multiple of it.
        best: so many of those with the lowest validation loss.
    """

    last: int | None = None
    every: int | None = None
    best: int | None = None

    def __bool__(self) -> bool:
        return any(rule is not None for rule in (self.last, self.every, self.best))


def reasons_to_keep(folder: Path, keep: Retention, *, quick: bool) -> dict[Path, str]:
    """Return every checkpoint, the oldest first, with the reason why it stays; empty for those that may go.

    The tracker's, the newest good one and ``release`` always stay.

    Args:
        folder: holds the checkpoints.
        keep: the rules.
        quick: whether files of the right size make a checkpoint good; else their checksums are compared.
    """
    present = checkpoints_in(folder)
    reasons = {path: "" if keep and iteration_of(path) is not None else "is not pruned" for path in present}
    runs = [path for path in present if iteration_of(path) is not None]

    def stay(paths: list[Path], why: str) -> None:
        for path in paths:
            reasons[path] = reasons[path] or why

    with suppress(UserError):  # a folder without a tracker, whose newest good one stays
        stay([path for path in present if path.name == read_tracker(folder)], "the tracker names it")
    stay(runs[-keep.last :] if keep.last else [], f"one of the last {keep.last}")
    stay([path for path in runs if keep.every and (iteration_of(path) or 0) % keep.every == 0], f"every {keep.every}")
    if keep.best:
        losses = {path: loss for path in runs if (loss := validation_loss(path)) is not None}
        stay(
            sorted(losses, key=lambda path: (losses[path], -runs.index(path)))[: keep.best],
            f"one of the best {keep.best}",
        )
    if not all(reasons.values()):
        stay(_newest_good(runs, quick), "the newest good one")
    return reasons


def validation_loss(path: Path) -> float | None:
    """Return a checkpoint's validation loss, or None if it is not known or no number."""
    try:
        known = manifest.read(path)
    except UserError:
        return None
    return known.validation_loss if known and math.isfinite(known.validation_loss or 0) else None


def _newest_good(paths: list[Path], quick: bool) -> list[Path]:
    return next(([path] for path in reversed(paths) if inspect(path, quick=quick).good), [])
