"""The device side of a sketch: its signs, and the pass over a tensor that adds it up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mindspeed_mm import accelerator
from mindspeed_mm.precision.records.sketch import SIZE

WIDTH = SIZE + 5
"""Numbers of a digest: the sketch's vector, total, square sum, maximum, minimum, pieces that are not finite."""

_BLOCK = 1 << 22  # elements: a 16-bit tensor is widened a piece at a time
_NARROWEST = 128  # columns, of several dimensions if need be, so that few products have few columns
_TALL, _WIDEST = 256, 4096  # rows and columns for which that takes a noticeable time and loses little
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """Return a random function of each uint64: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hashes(key: np.ndarray | int, index: np.ndarray) -> np.ndarray:
    """Return uint64 hashes of ``index`` under ``key``, which broadcast: bit ``j`` is sign ``j`` of that row."""
    with np.errstate(over="ignore"):
        return mix(np.asarray(key, dtype=np.uint64) + (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


@contextmanager
def unnoticed(device: torch.device) -> Iterator[None]:
    """Compute in full precision, and outside of autograd and of all that watches operators.

    Among these is selective recompute, which would take the outputs of a digest for those of the layer.
    """
    has_autocast = torch.amp.is_autocast_available(device.type)
    with (
        torch.no_grad(),
        _disable_current_modes(),
        torch.autocast(device.type, enabled=False) if has_autocast else nullcontext(),
        accelerator.full_float32(),
    ):
        yield


@dataclass(frozen=True)
class RowSigns:
    """What tells the rows of a tensor apart: (N,) int64 hashes on its device, and their signs (N, SIZE)."""

    hashes: Tensor
    signs: Tensor

    @classmethod
    def of(cls, values: np.ndarray, device: torch.device) -> RowSigns:
        """Take (N,) uint64 hashes to a device, without waiting for it."""
        placed = to_device(values, device)
        return cls(placed, _expand(placed))


def digest(value: Tensor, rows: RowSigns | None = None, offset: Sequence[int] | None = None) -> Tensor:
    """Return the digest of one part of a tensor, (WIDTH,) float32 on its device. The host does not wait.

    It is linear in all but the last four numbers. To be called within :func:`unnoticed`.

    Args:
        value: any shape and dtype.
        rows: of the first dimension; None: its indices are hashed as those of the others.
        offset: where ``value`` lies in the full tensor, for the dimensions that are told apart by index.
    """
    value = value.detach()
    if value.is_complex():
        value, offset = torch.view_as_real(value), None if offset is None else [*offset, 0]
    if value.numel() == 0:
        nothing = torch.zeros(WIDTH, device=value.device)
        nothing[SIZE + 2], nothing[SIZE + 3] = -torch.inf, torch.inf
        return nothing
    sizes = list(value.shape)
    starts = list(offset) if offset is not None else [0] * len(sizes)
    dims = [(size, start, len(sizes) - 1 - i) for i, (size, start) in enumerate(zip(sizes, starts, strict=True))]
    first = 0 if rows is None else 1
    split = len(dims)
    while split > first and (split == len(dims) or _product(dims[split:]) < _NARROWEST):
        split -= 1
    columns = _signs(tuple(dims[split:]), value.device)
    if rows is None:
        signs = _signs(tuple(dims[:split]), value.device)
    elif split == 1:
        signs = rows.signs
    else:
        others = [_index_hashes(dim, value.device) for dim in dims[1:split]]
        signs = _expand(_outer([rows.hashes, *others], value.device))
    flat = value.reshape(len(signs), -1)
    step = max(1, _BLOCK // flat.shape[1])
    begins = range(0, len(flat), step)
    parts = [_block(flat[begin : begin + step], signs[begin : begin + step], columns) for begin in begins]
    if len(parts) == 1:
        return parts[0]
    table = torch.stack(parts)
    joined = table.sum(0)
    joined[SIZE + 2], joined[SIZE + 3] = table[:, SIZE + 2].amax(), table[:, SIZE + 3].amin()
    return joined


def _block(block: Tensor, signs: Tensor, columns: Tensor) -> Tensor:
    """Return the digest of (R, C), given the signs (R, SIZE) of its rows and (C, SIZE) of its columns."""
    block = block.float()
    # The product adds up the smaller dimension, since long sums in float32 lose digits. Tall products are faster.
    rows, width = block.shape
    if width > rows and not (rows >= _TALL and width <= _WIDEST):
        sums = signs.T @ block
        vector = (sums * columns.T).sum(1)
    else:
        sums = (block @ columns).T
        vector = (sums.T * signs).sum(0)
    low, high = torch.aminmax(block)  # NaN comes through
    squares = torch.linalg.vector_norm(block, dim=1).square().sum()  # row by row: fewer roundings
    broken = (~torch.isfinite(sums[0])).sum()
    return torch.cat([vector, torch.stack([block.sum(), squares, high, low, broken.float()])])


def _expand(row_hashes: Tensor) -> Tensor:
    """Return the signs (N, SIZE) in the low bits of (N,) hashes."""
    return 1.0 - 2.0 * ((row_hashes[:, None] >> _bits(row_hashes.device)) & 1).float()


@lru_cache(maxsize=8)
def _bits(device: torch.device) -> Tensor:
    return torch.arange(SIZE, device=device)


@lru_cache(maxsize=256)
def _index_hashes(dim: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return (size,) hashes of the indices of a dimension: its size, its offset, its number counted from the last."""
    size, start, number = dim
    return to_device(hashes(int(mix(np.array(number + 1))), np.arange(start, start + size)), device)


@lru_cache(maxsize=256)
def _signs(dims: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """Return the signs (C, SIZE) of dimensions laid one after the other."""
    return _expand(_outer([_index_hashes(dim, device) for dim in dims], device))


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return uint64 hashes as an int64 tensor, without waiting for the device."""
    return torch.from_numpy(values.view(np.int64)).to(device, non_blocking=True)


def _outer(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the hashes of all combinations, flattened: the sign of a product is the exclusive or of the bits."""
    joined = torch.zeros(1, dtype=torch.int64, device=device)
    for part in parts:
        joined = (joined[:, None] ^ part[None, :]).reshape(-1)
    return joined


def _product(dims: Sequence[tuple[int, int, int]]) -> int:
    product = 1
    for size, _, _ in dims:
        product *= size
    return product
