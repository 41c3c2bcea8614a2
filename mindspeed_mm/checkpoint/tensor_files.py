"""Tensors in a folder, as ``torch.distributed.checkpoint`` lays them out, digested on their way in and out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem

from mindspeed_mm.checkpoint.coordination import condense, gather
from mindspeed_mm.checkpoint.digest import add, digest, times
from mindspeed_mm.checkpoint.tensors import local_blocks
from mindspeed_mm.errors import UserError


class DigestingPlanner(dcp.DefaultSavePlanner):
    """Plans a save and digests what this rank is told to write; of several copies one rank writes one.

    Attributes:
        digests: of the parts that this rank has written, by the tensors' names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.digests: dict[str, int] = {}

    def resolve_data(self, write_item: WriteItem) -> Any:
        """Return what to write for an item of the plan."""
        data = super().resolve_data(write_item)
        if isinstance(data, torch.Tensor):
            placed = write_item.tensor_data
            add(self.digests, write_item.index.fqn, digest(data, placed.size, placed.chunk.offsets))
        return data


def read_metadata(path: Path) -> Metadata:
    """Return the index of a checkpoint's tensors.

    Raises:
        UserError: the index is damaged.
    """
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except Exception as error:
        raise UserError(
            f"cannot read {path / '.metadata'}: {condense(error)}; pass --ckpt-step for another checkpoint"
        ) from error


def write_tensors(
    tensors: dict[str, torch.Tensor],
    folder: Path,
    planner: DigestingPlanner | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, int]:
    """Write this rank's parts of ``tensors`` to ``folder``, flush them to the disk and return their digests."""
    planner = planner or DigestingPlanner()
    with _one_process_is_fine():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), planner=planner, process_group=group)
    return planner.digests


def read_tensors(tensors: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Fill ``tensors`` in place from the checkpoint in ``folder``, casting to their dtypes."""
    with _one_process_is_fine():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), process_group=group)


def changed_tensors(
    tensors: dict[str, torch.Tensor], digests: dict[str, int], group: dist.ProcessGroup | None = None
) -> list[str]:
    """Return the names of the tensors whose values on the ranks are not those of ``digests``. A collective.

    A tensor may be split and replicated in any way: the digests of all parts on all ranks must add up to that of as
    many copies as there are elements for. What ``digests`` does not hold is not looked at.
    """
    parts = {name: _digest_of(tensor) for name, tensor in tensors.items() if name in digests}
    sums: dict[str, int] = {}
    sizes: dict[str, int] = {}
    whole: dict[str, int] = {}
    for of_rank in gather(parts, group):
        for name, (part, size, full) in of_rank.items():
            add(sums, name, part)
            sizes[name] = sizes.get(name, 0) + size
            whole[name] = full
    changed = []
    for name, size in sizes.items():
        copies, rest = divmod(size, max(1, whole[name]))
        if rest or sums[name] != times(digests[name], copies):
            changed.append(name)
    return changed


def _digest_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return the digest of this rank's parts, their number of elements, and that of the whole tensor."""
    blocks = local_blocks(tensor)
    total: dict[str, int] = {}
    for block in blocks:
        add(total, "", digest(block.tensor, tensor.shape, block.offsets))
    return total.get("", 0), sum(block.tensor.numel() for block in blocks), tensor.numel()


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Silence DCP's warning that no process group exists."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to .* in a single process.*")
        yield
