"""Next-token cross entropy, and the three ways to reduce it over a micro-batch.

Every loss here is a function of two vectors over the samples of the micro-batch: the summed cross entropy of
each sample and its number of target tokens. That keeps the reductions independent of how the cross entropy was
computed, in one piece or in chunks, and of whether a sample is a row or a piece of a packed one.
``docs/en/losses.md`` says what becomes of them over a global batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def shift_labels(labels: Tensor) -> Tensor:
    """Return the target of every position: the label of the next one.

    Args:
        labels: (B, S) integers, aligned with ``input_ids``; every negative value marks "not a target".

    Returns:
        (B, S) integers, ``targets[b, s] = labels[b, s + 1]``, with ``-100`` in the last column and wherever the
        label is negative.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return targets.masked_fill(targets < 0, IGNORE)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of each position, ``- log softmax(logits[..., :])[targets[...]]``.

    Args:
        logits: (..., V), any floating dtype. Less than fp32 is raised to fp32 first.
        targets: (...) integers, ``-100`` where there is no target.

    Returns:
        (...) in fp32 (fp64 for fp64 logits). A position without a target gives 0 and stays in the graph, so that
        every rank runs the same backward pass.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view(targets.shape)


def sum_by_sample(values: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the sum over each sample: over each row, or over each piece of one packed row.

    Args:
        values: (B, S); bool is counted.
        cu_seqlens: (N + 1,) integers, ascending from 0: sample ``n`` of a packed row (B = 1) is
            ``[cu_seqlens[n], cu_seqlens[n + 1])``. What lies behind the last is added to it; it must be 0.

    Returns:
        (B,), or (N,) of a packed row; int64 for bool and integers.
    """
    if cu_seqlens is None:
        return values.sum(dim=1)
    values = values[0].long() if values.dtype == torch.bool else values[0]
    return values.new_zeros(len(cu_seqlens) - 1).index_add(0, _sample_of_each(len(values), cu_seqlens), values)


def spread_over_samples(values: Tensor, length: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Give each position the value of its sample: (B, S), from what :func:`sum_by_sample` returns; ``length`` is S."""
    if cu_seqlens is None:
        return values[:, None].expand(-1, length)
    return values[_sample_of_each(length, cu_seqlens)][None]


def _sample_of_each(length: int, cu_seqlens: Tensor) -> Tensor:
    positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:-1], right=True)


def cross_entropy_sums(logits: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the cross entropy of each sample, summed over its target tokens; 0 where it has none.

    ``sums[b] = - sum over s with targets[b, s] >= 0 of log softmax(logits[b, s])[targets[b, s]]``

    Args:
        logits: (B, S, V), any floating dtype.
        targets: (B, S) from :func:`shift_labels`.
        cu_seqlens: of a packed row, see :func:`sum_by_sample`.

    Returns:
        (B,), or (N,) of a packed row, in fp32 (fp64 for fp64 logits).
    """
    return sum_by_sample(token_losses(logits, targets), cu_seqlens)


def mean_token_loss(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean over the target tokens of the micro-batch: ``sum_b sums[b] / sum_b counts[b]``; 0 without targets.

    Args:
        sums: (B,) summed cross entropy of each sample, or (1,) of all of them.
        counts: (B,) number of target tokens of each sample.
    """
    return sums.sum() / counts.sum().clamp(min=1)


def per_sample_loss(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean over samples of each sample's own mean: ``1 / B * sum_b sums[b] / counts[b]``.

    A sample without targets counts as 0. It still counts in B, so that the mean over a global batch does not
    depend on how that batch is split into micro-batches.

    Args:
        sums: (B,) summed cross entropy of each sample.
        counts: (B,) number of target tokens of each sample.
    """
    return (sums / counts.clamp(min=1)).mean()


def token_sum_loss(sums: Tensor, counts: Tensor) -> Tensor:
    """Sum over the target tokens, ``sum_b sums[b]``; whoever knows the global token count divides by it.

    Args:
        sums: (B,) summed cross entropy of each sample, or (1,) of all of them.
        counts: (B,), unused: all three reductions are called alike.
    """
    return sums.sum()


# By the name that `loss_cfg.loss_type` gives them in model.json.
REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "default": mean_token_loss,
    "per_sample_loss": per_sample_loss,
    "per_token_loss": token_sum_loss,
}
