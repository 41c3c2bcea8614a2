"""A number for a tensor's values that does not depend on how the tensor is split over ranks.

Every element is hashed together with its position in the full tensor, and the hashes are added modulo 2^64. So ranks
digest their own parts and the parts' digests add up to the tensor's, for any world size and any sharding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_CHUNK = 1 << 15  # elements: what is at hand at a time stays in the processor's cache
_MODULUS = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
_RAMP = np.arange(_CHUNK, dtype=np.uint64) * np.uint64(_GOLDEN)
_BITS = {
    1: (torch.uint8, np.uint8),
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
    8: (torch.int64, np.uint64),
}


def digest(block: torch.Tensor, shape: Sequence[int], offset: Sequence[int]) -> int:
    """Return the sum of the hashes of a block's elements, in ``range(2**64)``.

    The hash of an element is that of splitmix64 (Steele, Lea, Flood 2014), without the last shift, of its bits and its
    position.

    Args:
        block: any dtype, on any device; hashed on the CPU, a piece at a time.
        shape: of the full tensor.
        offset: where the block starts in it, one number for each dimension.
    """
    block = block.detach()
    if block.is_complex():
        block, shape, offset = torch.view_as_real(block), [*shape, 2], [*offset, 0]
    signed, unsigned = _BITS[block.element_size()]
    flat = block.reshape(-1).view(signed)
    start, runs = _runs(block.shape, shape, offset)
    total = 0
    spare = np.empty(_CHUNK, dtype=np.uint64)
    for begin in range(0, flat.numel(), _CHUNK):
        bits = flat[begin : begin + _CHUNK].cpu().numpy().view(unsigned)
        z = _spread_positions(begin, bits.size, start, runs)
        z += bits
        shifted = spare[: bits.size]
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= np.right_shift(z, np.uint64(shift), out=shifted)
            z *= np.uint64(factor)
        total += int(z.sum(dtype=np.uint64))
    return total % _MODULUS


def add(digests: dict[str, int], name: str, part: int) -> None:
    """Add the digest of a part of tensor ``name`` to what is known of that tensor."""
    digests[name] = (digests.get(name, 0) + part) % _MODULUS


def times(one: int, copies: int) -> int:
    """Return what the digests of so many copies of a tensor add up to."""
    return one * copies % _MODULUS


def _runs(block: Sequence[int], shape: Sequence[int], offset: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """Return the position of a block's first element and its dimensions as ``(size, stride in the full tensor)``.

    Dimensions that lie behind one another in memory are merged: a shard along the first dimension is a single run.
    """
    runs: list[tuple[int, int]] = []
    start, stride = 0, 1
    for size, full, first in zip(reversed(block), reversed(shape), reversed(offset), strict=True):
        start += first * stride
        if runs and runs[-1][0] * runs[-1][1] == stride:
            runs[-1] = (runs[-1][0] * size, runs[-1][1])
        else:
            runs.append((size, stride))
        stride *= full
    return start, runs


def _spread_positions(begin: int, count: int, start: int, runs: list[tuple[int, int]]) -> np.ndarray:
    """Return the positions of ``count`` elements of a block, from its element ``begin`` on, times the golden ratio."""
    if len(runs) <= 1:
        return _RAMP[:count] + np.uint64((begin + start) * _GOLDEN % _MODULUS)
    index = np.arange(begin, begin + count, dtype=np.uint64)
    position = np.full(count, start, dtype=np.uint64)
    for size, stride in runs[:-1]:
        position += index % np.uint64(size) * np.uint64(stride)
        index //= np.uint64(size)
    position += index * np.uint64(runs[-1][1])
    return position * np.uint64(_GOLDEN)
