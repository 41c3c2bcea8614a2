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


def group_position(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return this rank's number among those of ``group`` (default all) and how many they are."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return what every rank passes, in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def condense(error: BaseException) -> str:
    """Return one line for an error, also for DCP's, whose own text is a page for each rank."""
    if isinstance(error, CheckpointException) and error.failures:
        failed, (error, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {failed}: {condense(error)}"
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def run_together(what: str, action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Run ``action`` on this rank and wait until all ranks have; return this rank's result.

    When it fails anywhere, all ranks raise the same message, so that none is left waiting in the next collective.

    Raises:
        UserError: some rank raised one, or could not read or write.
        RuntimeError: some rank failed in another way; on that rank the cause has the traceback.
    """
    result, error, report = None, None, None
    try:
        result = action()
    # CheckpointException is a BaseException. Whatever it was, the other ranks have to hear of it.
    except (Exception, CheckpointException) as e:  # noqa: BLE001
        error = e
        kind = UserError if isinstance(e, UserError | OSError | CheckpointException) else RuntimeError
        text = str(e) if isinstance(e, UserError) else f"{what} failed on rank {rank()}: {condense(e)}"
        report = (kind, text)
    for of_rank in gather(report, group):
        if of_rank is not None:
            kind, text = of_rank
            raise kind(text) from error
    return result
