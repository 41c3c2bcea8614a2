"""The cross entropy of an output projection, its gradients computed in the same pass over the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mindspeed_mm.losses.cross_entropy import IGNORE

# What fp32 is needed for in a bf16 model is done piece by piece: so much less than a chunk is in memory twice.
_PRECISE_TOKENS = 128
_WORDS = 16_384


def linear_cross_entropy(
    head: nn.Linear, hidden: Tensor, targets: Tensor, chunk_size: int, divisors: Tensor | None = None
) -> Tensor:
    """Return the summed cross entropy of ``head(hidden)``, of whose logits ``chunk_size`` tokens exist at a time.

    The gradient of a sum with respect to the logits, ``softmax(logits) - one_hot(target)``, is known as soon as they
    are. It is taken through the projection while they exist, so nothing is computed twice; the backward pass multiplies
    with the gradient of the sum. Until then it keeps arrays of the size of ``hidden`` and of the projection. Those of
    the projection are added up in fp32.

    Args:
        head: with or without a bias; its forward is not called.
        hidden: (N, H), any floating dtype.
        targets: (N,) integers, ``-100`` where there is no target.
        chunk_size: tokens of each chunk.
        divisors: (N,), what the loss of each token is divided by.

    Returns:
        A scalar in fp32 (fp64 for fp64 hidden states), 0 with a gradient of zeros where there are no targets.
    """
    sums: Tensor = _LinearCrossEntropy.apply(
        hidden, head.weight, head.bias, targets, divisors, chunk_size, torch.is_grad_enabled()
    )
    return sums


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        divisors: Tensor | None,
        chunk_size: int,
        differentiate: bool,
    ) -> Tensor:
        of_hidden, of_weight, of_bias = (needed and differentiate for needed in ctx.needs_input_grad[:3])
        precise = {"dtype": torch.promote_types(hidden.dtype, torch.float32)}
        total = hidden.new_zeros((), **precise)
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        weight_grad = torch.zeros_like(weight, **precise) if of_weight else None
        bias_grad = torch.zeros_like(weight[:, 0], **precise) if of_bias else None
        for chunk in _slices(len(hidden), chunk_size):
            states, words = hidden[chunk], targets[chunk]
            logits = F.linear(states, weight, bias)
            for rows in _slices(len(logits), _PRECISE_TOKENS):
                losses, gradient = _of_logits(logits[rows].to(**precise), words[rows])
                if divisors is not None:
                    losses /= divisors[chunk][rows, None]
                    gradient /= divisors[chunk][rows, None]
                total += losses.sum()
                if bias_grad is not None:
                    bias_grad += gradient.sum(dim=0)
                if gradient.dtype != logits.dtype:
                    logits[rows] = gradient
            logits_grad = logits  # which has taken their place
            if hidden_grad is not None:
                hidden_grad[chunk] = logits_grad @ weight
            if weight_grad is not None:
                _add_product(weight_grad, logits_grad.T, states)
            del logits, logits_grad  # before those of the next chunk are made
        ctx.save_for_backward(
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(weight.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: with retain_graph there may be another backward pass.
        return *(None if kept is None else kept * gradient for kept in ctx.saved_tensors), None, None, None, None


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``, without another array of its size."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for rows in _slices(len(total), _WORDS):
        total[rows] += left[rows] @ right


def _of_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropies of logits (n, V), (n, 1), and the gradient of their sum, written over the logits."""
    ignored = targets == IGNORE
    words = targets.masked_fill(ignored, 0).unsqueeze(-1)
    scores = logits.sub_(logits.amax(dim=-1, keepdim=True))
    of_targets = scores.gather(-1, words)
    weights = scores.exp_()
    sums = weights.sum(dim=-1, keepdim=True)
    losses = (sums.log() - of_targets).masked_fill(ignored.unsqueeze(-1), 0)
    gradient = weights.div_(sums).scatter_add_(-1, words, weights.new_full(words.shape, -1.0))
    return losses, gradient.masked_fill_(ignored.unsqueeze(-1), 0)
