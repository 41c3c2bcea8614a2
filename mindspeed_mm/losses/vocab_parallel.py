"""Cross entropy where each rank of a group has the logits of its own part of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_token_losses(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup, first_word: int | None = None
) -> Tensor:
    """Return the cross entropy of each position over the whole vocabulary; a collective of ``group``.

    Equal to :func:`~mindspeed_mm.losses.cross_entropy.token_losses` of all logits side by side.

    Args:
        logits: (..., v), those of the ``v`` words from ``first_word`` on; ``v`` may differ between ranks, and be 0.
            Not changed.
        targets: (...) integers in the whole vocabulary, negative where there is no target; the same on all ranks.
        group: whose ranks have the other parts.
        first_word: here; None: all have as many, in the order of their ranks.

    Returns:
        (...) in fp32 (fp64 for fp64 logits), the same on all ranks; 0 without a target.
    """
    first_word = dist.get_rank(group) * logits.shape[-1] if first_word is None else first_word
    result: Tensor = _CrossEntropy.apply(logits, targets, group, first_word)
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, first_word: int) -> Tensor:
        values = logits if logits.dtype == torch.float64 else logits.float()
        if not values.shape[-1]:  # a word that cannot be
            values = values.new_full((*values.shape[:-1], 1), -torch.inf)
        largest = values.amax(dim=-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        values = values - largest[..., None]
        words = logits.shape[-1]
        local = targets - first_word
        here = (targets >= 0) & (local >= 0) & (local < words)
        index = local.where(here, 0)[..., None]
        chosen = values.gather(-1, index)[..., 0].where(here, 0)
        exponentials = values.exp_()
        both = torch.stack([exponentials.sum(dim=-1), chosen])
        dist.all_reduce(both, group=group)
        total, chosen = both
        ctx.save_for_backward(exponentials.div_(total[..., None]), index, here, targets >= 0)
        ctx.dtype, ctx.words = logits.dtype, words
        return (total.log() - chosen).where(targets >= 0, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, index, here, counted = ctx.saved_tensors
        result = probabilities.clone()
        result.scatter_add_(-1, index, -here[..., None].to(result.dtype))
        result.mul_((gradient * counted)[..., None])
        return result[..., : ctx.words].to(ctx.dtype), None, None, None
