"""Tensors in a folder, as ``torch.distributed.checkpoint`` lays them out, digested on their way in and out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem

from mindspeed_mm.checkpoint.coordination import condense, gather
from mindspeed_mm.checkpoint.digest import add, digest, times
from mindspeed_mm.checkpoint.tensor_index import read_index
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


class TensorReader(dcp.FileSystemReader):
    """Reads tensors of a folder, and never anything else: other values lie there as pickles.

    Attributes:
        metadata: the index, read once.

    Raises:
        UserError: the index is damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = read_index(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        return self.metadata

    def read(self, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
        """Fill ``tensors`` in place, casting to their dtypes. With a group, a collective.

        Raises:
            UserError: a file is missing or damaged; raised on all ranks.
        """
        try:
            with _one_process_is_fine():
                dcp.load(tensors, storage_reader=self, planner=_TensorPlanner(), process_group=group)
        except CheckpointException as error:  # a BaseException, which would pass as none of the user's
            raise UserError(f"cannot read {self.path}: {condense(error)}") from error


class _TensorPlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        raise UserError(f"{read_item.dest_index.fqn} is a pickled object where a tensor belongs; it may run code")


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
    TensorReader(folder).read(tensors, group)


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
