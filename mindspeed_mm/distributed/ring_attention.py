"""Ring attention: keys and values go round the ranks that share a sequence (Liu et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm import accelerator


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *, scale: float, group: dist.ProcessGroup
) -> Tensor:
    """Return causal attention over sequences that the ranks of ``group`` share.

    Each rank computes, in as many steps as there are ranks, its queries' attention to the keys of one rank, while
    these are already on their way to the next. Results of the steps are combined by their log-sum-exp, and the
    gradient of each step is computed with that of the whole: both are exact.

    Args:
        query: (b, h, s, d), the positions of this rank as
            :class:`~mindspeed_mm.distributed.sequence_split.SequenceSplit` cuts them.
        key: (b, g, s, d).
        value: (b, g, s, d).
        lengths: of each sequence's part on this rank, s together.
        scale: of the scores.
        group: the ring.

    Returns:
        (b, h, s, d).
    """
    out: Tensor = _RingAttention.apply(query, key, value, tuple(lengths), scale, group)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.zeros_like(query, dtype=wide, memory_format=torch.contiguous_format)
        lse = out.new_full(query.shape[:3], -torch.inf)
        for pair, theirs in _round(torch.stack([key, value]), group):
            for rows, columns, causal in _visible(lengths, group.rank(), theirs):
                q, (k, v) = query[:, :, rows], pair[:, :, :, columns]
                part, part_lse = accelerator.attend_block(q, k, v, causal=causal, scale=scale)
                before, lse[:, :, rows] = lse[:, :, rows].clone(), torch.logaddexp(lse[:, :, rows], part_lse)
                old, new = ((one - lse[:, :, rows]).exp()[..., None] for one in (before, part_lse))
                out[:, :, rows] = out[:, :, rows] * old + part * new
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.lengths, ctx.scale, ctx.group = lengths, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        gradient, group = gradients[0].contiguous(), ctx.group
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.zeros_like(query, dtype=wide)
        arriving: Callable[[], Tensor] | None = None
        for pair, theirs in _round(torch.stack([key, value]), group):
            here = torch.zeros_like(pair, dtype=wide)
            for rows, columns, causal in _visible(ctx.lengths, group.rank(), theirs):
                g, q, o, total = (tensor[:, :, rows] for tensor in (gradient, query, out, lse))
                k, v = pair[:, :, :, columns]
                grads = accelerator.block_gradients(g, q, k, v, o, total, causal=causal, scale=ctx.scale)
                grad_query[:, :, rows] += grads[0]
                here[:, :, :, columns] += torch.stack(grads[1:])
            # The gradient of a pair follows it around the ring, one step behind, and so ends where the pair began.
            if arriving:
                here += arriving()
            arriving = _pass_on(here, group)
        assert arriving is not None
        grad_key, grad_value = arriving().to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None


def _visible(lengths: Sequence[int], mine: int, theirs: int) -> Iterator[tuple[slice, slice, bool]]:
    """Yield the queries of rank ``mine`` and the keys of rank ``theirs`` that they see, for each sequence.

    Of each sequence a rank has an early chunk, the earlier the lower the rank, and a late one, the later the lower
    the rank; all early ones come before all late ones.
    """
    start = 0
    for length in lengths:
        middle, end = start + length // 2, start + length
        if theirs == mine:
            yield slice(start, end), slice(start, end), True
        elif theirs < mine:
            yield slice(start, end), slice(start, middle), False
        else:
            yield slice(middle, end), slice(start, end), False
        start = end


def _round(tensor: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[Tensor, int]]:
    """Yield what each rank has, and whose it is, beginning with this one's own; the next one is on its way by then."""
    rank, size = group.rank(), group.size()
    for step in range(size):
        arriving = _pass_on(tensor, group) if step + 1 < size else None
        yield tensor, (rank - step) % size
        if arriving:
            tensor = arriving()


def _pass_on(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Send a contiguous tensor to the next rank; the result waits for, and returns, that of the previous one."""
    rank, size = group.rank(), group.size()
    received = torch.empty_like(tensor)
    following, previous = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    send = dist.P2POp(dist.isend, tensor, following, group)
    receive = dist.P2POp(dist.irecv, received, previous, group)
    works = dist.batch_isend_irecv([send, receive])

    def wait(sent: Tensor = tensor) -> Tensor:  # what is sent has to stay until it has left
        for work in works:
            work.wait()
        return received

    return wait
