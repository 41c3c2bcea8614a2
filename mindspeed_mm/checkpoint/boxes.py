"""A tensor of which this rank holds some rectangular boxes, in a form that DCP reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True)
class Box:
    """A box of a whole tensor.

    Attributes:
        offsets: where it begins in the whole.
        tensor: its values, a view of where they live.
    """

    offsets: tuple[int, ...]
    tensor: Tensor


class BoxedTensor(Tensor):
    """Has the shape and dtype of the whole tensor, and of its values the boxes of this rank.

    The methods with underscores around their names are DCP's protocol for sharded tensors.
    """

    boxes: list[Box]

    @staticmethod
    def __new__(cls, shape: Sequence[int], boxes: Sequence[Box]) -> BoxedTensor:
        """Make one of boxes of one dtype, at least one."""
        dtype = boxes[0].tensor.dtype
        made: BoxedTensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device="cpu")
        made.boxes = list(boxes)
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to compute: there is only a part of the values."""
        raise NotImplementedError(f"{function} of a tensor of which this rank has some boxes only")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Show the shape and how many boxes there are."""
        return f"BoxedTensor({tuple(self.shape)}, {self.dtype}, {len(self.boxes)} boxes)"

    def host_copy(self, pin_memory: bool) -> BoxedTensor:
        """Return one with memory of its own on the CPU, values undefined."""
        boxes = [
            Box(box.offsets, torch.empty_like(box.tensor, device="cpu", pin_memory=pin_memory)) for box in self.boxes
        ]
        return BoxedTensor(self.shape, boxes)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Return what this rank writes of the tensor called ``fqn``."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box), properties=TensorProperties.create_from_tensor(box.tensor), size=self.shape
                ),
            )
            for box in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return where the boxes lie."""
        return [_chunk(box) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the values of the box that begins where ``index`` says."""
        return next(box.tensor for box in self.boxes if torch.Size(box.offsets) == index.offset)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=box.tensor.shape)


def range_boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[slice, ...]]:
    """Yield boxes of a tensor of ``shape`` that together are its elements ``begin`` to ``end - 1``, in C order."""
    if begin >= end:
        return
    if not shape:
        yield ()
        return
    if len(shape) == 1:
        yield (slice(begin, end),)
        return
    row = 1
    for size in shape[1:]:
        row *= size
    first, last = -(-begin // row), end // row  # the whole rows
    if first > last:  # all within one row
        at = begin // row
        yield from ((slice(at, at + 1), *box) for box in range_boxes(shape[1:], begin - at * row, end - at * row))
        return
    head, tail = first * row - begin, end - last * row
    if head:
        yield from ((slice(first - 1, first), *box) for box in range_boxes(shape[1:], row - head, row))
    if first < last:
        yield (slice(first, last), *(slice(0, size) for size in shape[1:]))
    if tail:
        yield from ((slice(last, last + 1), *box) for box in range_boxes(shape[1:], 0, tail))


def overlap(one: Sequence[slice], other: Sequence[slice]) -> tuple[slice, ...] | None:
    """Return the box that two boxes share, None if there is none."""
    shared = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return shared if all(part.start < part.stop for part in shared) else None
