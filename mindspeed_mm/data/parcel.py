"""A batch on its way from a worker to the training process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; any dtype may begin there


@dataclass(frozen=True)
class _Place:
    offset: int
    dtype: torch.dtype
    shape: torch.Size


class Parcel:
    """The tensors of a batch in one piece of memory.

    Handing a tensor to another process costs a file descriptor and a message, whatever its size. A batch with vision
    metadata has a dozen, and the training process would wait for them one by one; in a parcel they travel as one, and
    are pinned as one.

    Args:
        batch: dicts, lists and tuples of anything; tensors on the CPU.
    """

    def __init__(self, batch: dict[str, Any]) -> None:
        self._tensors: list[tuple[_Place, Tensor]] = []
        self._size = 0
        self._layout = self._lay_out(batch)
        self._memory = torch.empty(self._size, dtype=torch.uint8)
        for place, tensor in self._tensors:
            self._bytes(place, tensor.nbytes).copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
        del self._tensors

    def pin_memory(self) -> Parcel:
        """Move the memory into page-locked memory; the loader calls it."""
        self._memory = self._memory.pin_memory()
        return self

    def unpack(self) -> dict[str, Any]:
        """Return the batch. Its tensors are views of the one memory and do not overlap."""
        return self._fill(self._layout)

    def _lay_out(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout is torch.strided and value.is_cpu:
            place = _Place(self._size, value.dtype, value.shape)
            self._size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._tensors.append((place, value))
            return place
        if type(value) is dict:
            return {key: self._lay_out(item) for key, item in value.items()}
        return type(value)(map(self._lay_out, value)) if type(value) in (list, tuple) else value

    def _fill(self, value: Any) -> Any:
        if isinstance(value, _Place):
            return self._bytes(value, value.shape.numel() * value.dtype.itemsize).view(value.dtype).view(value.shape)
        if type(value) is dict:
            return {key: self._fill(item) for key, item in value.items()}
        return type(value)(map(self._fill, value)) if type(value) in (list, tuple) else value

    def _bytes(self, place: _Place, count: int) -> Tensor:
        return self._memory[place.offset : place.offset + count]
