"""Ulysses: for attention, ranks that share a sequence trade positions for heads (Jacobs et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.distributed.sequence_split import ascending


def can_share_heads(heads: int, groups: int, size: int) -> bool:
    """Return whether ``size`` ranks can share so many query and key heads; key heads are repeated where needed."""
    return heads % math.lcm(groups, size) == 0


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each rank all positions of the group for its share of the heads.

    Args:
        query: (s, b, h, d), this rank's positions.
        key: (s, b, g, d).
        value: (s, b, g, d).
        lengths: of each sequence's part on this rank, s together.
        group: of neighbouring context-parallel ranks.

    Returns:
        (size * s, b, h / size, d) and twice (size * s, b, g / size, d) with at least one key head: the positions in
        the order of the sequence, or, if there are more context-parallel ranks than these, as
        :class:`~mindspeed_mm.distributed.sequence_split.SequenceSplit` cuts for one rank for each group.
    """
    size = group.size()
    repeats = size // math.gcd(key.shape[2], size)
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    shares = [tensor.unflatten(2, (size, -1)) for tensor in (query, key, value)]
    traded = _AllToAll.apply(torch.cat(shares, dim=3).movedim(2, 0), group)
    order, _ = ascending(tuple(lengths), size, query.device)
    whole = traded.flatten(0, 1).index_select(0, order)
    query, key, value = whole.split([share.shape[3] for share in shares], dim=2)
    return query, key, value


def to_positions(out: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Undo :func:`to_heads` for what attention returned.

    Args:
        out: (size * s, b, h / size, d).
        lengths: as there.
        group: as there.

    Returns:
        (s, b, h, d).
    """
    _, order = ascending(tuple(lengths), group.size(), out.device)
    parts = out.index_select(0, order).unflatten(0, (group.size(), -1))
    traded: Tensor = _AllToAll.apply(parts, group)
    return traded.movedim(0, 2).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Sends the i-th piece along dimension 0 to rank i; its own inverse, so its gradient goes the same way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        tensor = tensor.contiguous()  # or else the bytes of both buffers lie in another order than the shape says
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradients[0], ctx.group), None
