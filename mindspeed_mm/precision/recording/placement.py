"""Where this rank's part of a tensor lies in the full one, and whether it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Part = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Placed:
    """This rank's part of a tensor.

    Attributes:
        local: its values.
        shape: of the full tensor.
        part: ``(offset, size)`` in each dimension; None for all of it.
        copy: another rank of the tensor's mesh holds the same and speaks for it.
        on_mesh: it is known who else holds what of it, as it is of a DTensor.
        partial: others hold values that are to be added to these, element by element.
        first: of those; the elements count here.
    """

    local: Tensor
    shape: tuple[int, ...]
    part: Part | None
    copy: bool
    on_mesh: bool = False
    partial: bool = False
    first: bool = True

    @property
    def offset(self) -> list[int] | None:
        """Where the part begins."""
        return None if self.part is None else [start for start, _ in self.part]


def box_of(offsets: Sequence[int], sizes: Sequence[int]) -> Part:
    """Return where a box lies, given where it begins and its size in each dimension."""
    return tuple((int(at), int(size)) for at, size in zip(offsets, sizes, strict=True))


def place(tensor: Tensor) -> Placed:
    """Return this rank's part of a plain tensor or DTensor: the parts that are no copies add up to the tensor.

    Of a replicated dimension of the mesh the first rank speaks. Partial sums count on every rank; a partial mean, in
    proportion.
    """
    if not isinstance(tensor, DTensor):
        return Placed(tensor, tuple(tensor.shape), None, False)
    local, copy = tensor.to_local(), False
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # not of this mesh
        return Placed(local, tuple(tensor.shape), None, True, True)
    partial, first = False, True
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copy |= coordinate[dimension] > 0
        elif placement.is_partial():
            partial, first = True, first and coordinate[dimension] == 0
            if getattr(placement, "reduce_op", "sum") == "avg":
                local = local / tensor.device_mesh.size(dimension)
    part = None
    if any(placement.is_shard() for placement in tensor.placements):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        part = box_of(offset, shape)
    return Placed(local, tuple(tensor.shape), part, copy, True, partial, first)
