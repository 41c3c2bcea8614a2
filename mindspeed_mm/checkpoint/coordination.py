"""Steps that all ranks take together and that fail on all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mindspeed_mm.errors import UserError


def rank() -> int:
    """Return the global rank, 0 outside a distributed run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def condense(error: BaseException) -> str:
    """Return one line for an error, also for DCP's, whose own text is a page for each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        failed, (error, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {failed}: {condense(error)}"
    text = str(error)
    if isinstance(error, UserError):
        return text
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def run_together(what: str, action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Run ``action`` on this rank and wait until all ranks have; return this rank's result.

    Raises:
        UserError: the action failed on some rank. All ranks raise the same message, so none is left waiting in
            the next collective and the job prints one error.
    """
    result, error = None, None
    try:
        result = action()
    # CheckpointException is a BaseException. Whatever it was, the other ranks have to hear of it.
    except (Exception, CheckpointException) as e:  # noqa: BLE001
        error = e
    reports: list[str | None] = [condense(error) if error else None]
    if dist.is_initialized():
        reports = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, condense(error) if error else None, group=group)
    for index, report in enumerate(reports):
        if report is not None:
            where = "" if len(reports) == 1 or report.startswith("rank ") else f" on rank {index}"
            raise UserError(f"{what} failed{where}: {report}") from error
    return result
