"""Which positions of a micro-batch a rank computes, when context-parallel ranks share its sequences.

Every sequence is cut into ``2 * size`` chunks, of which rank r holds chunks r and ``2 * size - 1 - r``: with causal
attention each rank then has the same work. megatron-core's rotary embeddings and Transformer Engine cut this way too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


class SequenceSplit:
    """Pads the sequences of one micro-batch until they can be cut, and cuts.

    The padding comes at the end of each sequence, where nothing that causal attention computes depends on it.

    The loss needs no communication. Shift the labels and count the targets of each sample while they are whole, then
    take the targets; the summed cross entropy of each sample (by :attr:`local_cu_seqlens` where samples are packed)
    over the count of the whole sample is this rank's part of the loss, and the parts of all ranks add up to it. All
    losses of :data:`mindspeed_mm.losses.REDUCTIONS` are linear in these sums.

    Args:
        length: s, of a row.
        cu_seqlens: (n + 1,) integers, where the sequences of a packed row begin and the last one ends; padding may
            follow. None: each row is one sequence. On a device, the host waits for it.
        size: context-parallel ranks.
        rank: this one's place among them.
        divisor: the number of positions of each rank is made a multiple of it: the tensor-parallel size under
            sequence parallelism.

    Attributes:
        lengths: of the sequences, with their padding, all ranks together. What follows the last packed sequence
            counts as one more.
    """

    def __init__(
        self, length: int, cu_seqlens: Tensor | None = None, *, size: int = 1, rank: int = 0, divisor: int = 1
    ) -> None:
        own = [length]
        self._samples = 0
        if cu_seqlens is not None:
            ends = cu_seqlens.tolist()
            own = [b - a for a, b in itertools.pairwise(ends)]
            self._samples = len(own)
            own += [length - ends[-1]] if length > ends[-1] else []
        self._own, self._size, self._rank = tuple(own), size, rank
        chunks = 2 * size if size > 1 else 1
        lengths = [_round_up(n, chunks) for n in own]
        self.lengths = tuple(lengths)
        self.extend(_round_up(sum(lengths), math.lcm(chunks, size * divisor)))

    def extend(self, total: int) -> None:
        """Add padding at the end until the row is ``total`` long, all ranks together."""
        *others, last = self.lengths
        self.lengths = (*others, last + total - sum(self.lengths))

    @property
    def is_whole(self) -> bool:
        """Whether this rank computes all positions and none was added."""
        return self._size == 1 and self.lengths == self._own

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Where ``lengths`` lie in the padded row, all ranks together, int32 on the host; None if nothing is packed."""
        if not self._samples:
            return None
        return torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    @property
    def local_cu_seqlens(self) -> Tensor | None:
        """Where the given sequences lie among the positions of this rank, (n + 1,); None if nothing is packed."""
        return None if self.cu_seqlens is None else self.cu_seqlens[: self._samples + 1] // self._size

    def take(self, tensor: Tensor, dim: int, fill: float = 0) -> Tensor:
        """Return this rank's positions of a tensor that has all of them.

        Args:
            tensor: its dimension ``dim`` is ``length`` long.
            dim: of the positions.
            fill: value of positions that are padding.
        """
        if self.is_whole:
            return tensor
        if tensor.shape[dim] != sum(self._own):
            raise ValueError(f"dimension {dim} of {tuple(tensor.shape)} is not {sum(self._own)} positions long")
        source = self.source(tensor.device)
        taken = tensor.index_select(dim, source.clamp(min=0))
        if self.lengths == self._own:
            return taken
        shape = [1] * tensor.dim()
        shape[dim] = -1
        return taken.masked_fill((source < 0).view(shape), fill)

    def source(self, device: torch.device | str) -> Tensor:
        """Return the position that each of this rank's is, -1 for padding; (positions of this rank,) int64."""
        return _source(self._own, self.lengths, self._size, self._rank, torch.device(device))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@lru_cache(maxsize=8)
def _source(own: Sequence[int], padded: Sequence[int], size: int, rank: int, device: torch.device) -> Tensor:
    parts, start = [], 0
    for length, total in zip(own, padded, strict=True):
        positions = torch.full((total,), -1)
        positions[:length] = torch.arange(start, start + length)
        if size == 1:
            parts.append(positions)
        else:
            chunks = positions.view(2 * size, total // (2 * size))
            parts += [chunks[rank], chunks[2 * size - 1 - rank]]
        start += length
    return torch.cat(parts).to(device, non_blocking=True)


@lru_cache(maxsize=8)
def ascending(lengths: Sequence[int], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the order that undoes the cutting among ranks that are neighbours, and its inverse.

    Args:
        lengths: of each sequence's part on one rank.
        size: of a group of neighbours, whose parts lie one after another, by rank.
        device: of the result.

    Returns:
        Two (size * sum of lengths,) int64. Neighbours hold neighbouring chunks; in the first order the group holds
        them in the way that one rank of ``1 / size`` times as many ranks would.
    """
    places = torch.arange(size * sum(lengths)).view(size, -1)
    parts = []
    for part in places.split(list(lengths), dim=1):
        first, second = part.unflatten(1, (2, part.shape[1] // 2)).unbind(1)
        parts += [first.flatten(), second.flip(0).flatten()]
    order = torch.cat(parts)
    return order.to(device, non_blocking=True), order.argsort().to(device, non_blocking=True)
