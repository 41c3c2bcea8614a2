"""Which boxes of named whole tensors a main parameter of the Megatron road is, or any tensor laid out as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from mindspeed_mm.checkpoint.boxes import Box, overlap, range_boxes
from mindspeed_mm.distributed.main_parameters import MainParameter
from mindspeed_mm.distributed.piece import Piece


def main_boxes(main: MainParameter, layout: Sequence[Piece], tensor: Tensor) -> Iterator[tuple[Piece, Box]]:
    """Yield the boxes of a tensor of a main parameter's shape, as parts of the whole tensors.

    Args:
        main: whole, or a range of the flattened parameter.
        layout: pieces of that parameter.
        tensor: its value, its gradient or the like.
    """
    if main.whole:
        yield from ((piece, Box(piece.offsets, piece.view(tensor))) for piece in layout)
        return
    shape = tuple(main.parameter.shape)
    for local in range_boxes(shape, main.start, main.start + tensor.numel()):
        for piece in layout:
            if (shared := overlap(local, piece.local)) is not None:
                yield piece, _box_of_range(piece, shared, tensor, main.start, shape)


def _box_of_range(piece: Piece, local: tuple[slice, ...], flat: Tensor, start: int, shape: tuple[int, ...]) -> Box:
    """Return the box of the whole tensor that is ``local`` in a parameter of which ``flat`` begins at ``start``."""
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    first = sum(part.start * stride for part, stride in zip(local, strides, strict=True)) - start
    sizes = [part.stop - part.start for part in local]
    extra = len(piece.sizes) - len(local)  # dimensions of the whole alone; it is 1 long in them
    offsets = piece.offsets[:extra] + tuple(
        offset + part.start - mine.start
        for offset, part, mine in zip(piece.offsets[extra:], local, piece.local, strict=True)
    )
    view = flat.as_strided([1] * extra + sizes, [1] * extra + strides, flat.storage_offset() + first)
    return Box(offsets, view)
