"""Attention by torch's fused kernels, whole or in blocks that are put together afterwards.

All tensors are ``(b, h, s, d)``: batch, heads, sequence and head size. Keys and values may have fewer heads than
queries, each then serving ``h / g`` query heads in a row (grouped queries).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.accelerator.hardware import device_type

_HALF = (torch.float16, torch.bfloat16)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return ``softmax(scale * query key^T) value``.

    Args:
        query: (b, h, s, d).
        key: (b, g, t, d).
        value: (b, g, t, d).
        causal: position i sees the positions up to i; needs s = t.
        scale: of the scores.
        mask: bool, to be broadcast to (b, h, s, t): True where a query may see a key; with it scores of s x t are
            held. None: no such tensor exists anywhere.
        dropout: probability that a weight of a value is dropped.
    """
    if mask is not None and causal:
        mask = mask & torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=mask.device).tril()
    shared = query.shape[1] != key.shape[1]
    if shared and not _kernel_shares_heads(query.dtype):
        key, value, shared = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1]), False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=shared,
    )


def attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Do the same to sequences that lie one after another and do not see each other.

    Args:
        query: (b, h, s, d).
        key: (b, g, s, d).
        value: (b, g, s, d).
        lengths: of the sequences, s together.
        causal: see :func:`attend`.
        scale: see :func:`attend`.
        mask: see :func:`attend`; only for one sequence.
        dropout: see :func:`attend`.
    """
    assert mask is None or len(lengths) == 1
    parts = [
        attend(q, k, v, causal=causal, scale=scale, mask=mask, dropout=dropout)
        for q, k, v in zip(*(tensor.split(list(lengths), dim=2) for tensor in (query, key, value)), strict=True)
        if q.shape[2]
    ]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Return ``(b, heads, s, d)`` with each head of ``(b, g, s, d)`` repeated ``heads / g`` times in a row."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _kernel_shares_heads(dtype: torch.dtype) -> bool:
    """Return whether a fused kernel takes fewer key heads than query heads; torch else falls back to s x t scores."""
    return device_type() == "cuda" and dtype in _HALF


def attend_block(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention to one block of keys, and what is needed to combine it with that to others.

    Not differentiable: its gradient is :func:`block_gradients`.

    Returns:
        What :func:`attend` returns; and ``logsumexp(scale * query key^T)``, (b, h, s), in fp32 or fp64.
    """
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    if kernel := _kernel(query.dtype):
        out, lse, *_ = kernel[0](query, key, value, 0.0, causal, scale=scale)
        return out, lse
    scores = _scores(query, key, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def block_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one block of keys contributes to the gradients of query, key and value.

    The gradient of attention falls apart into blocks once the result and the log-sum-exp over *all* keys are known:
    with ``P = exp(scale * query key^T - lse)`` and ``D = rowsum(gradient * out)`` it is ``dV = P^T gradient``,
    ``dS = P * (gradient value^T - D)``, ``dQ = scale * dS key``, ``dK = scale * dS^T query`` (Dao et al., 2022,
    FlashAttention, appendix B.4).

    Args:
        gradient: of the whole result, (b, h, s, d).
        query: (b, h, s, d).
        key: (b, g, t, d), of this block.
        value: (b, g, t, d), of this block.
        out: the attention to all blocks, (b, h, s, d).
        lse: over all blocks, (b, h, s).
        causal: as for this block.
        scale: of the scores.
    """
    groups, heads = key.shape[1], query.shape[1]
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    if kernel := _kernel(query.dtype):
        grads = kernel[1](gradient, query, key, value, out, lse, causal, scale)
    else:
        weights = (_scores(query, key, causal, scale) - lse[..., None]).exp()
        gradient, out = gradient.to(weights.dtype), out.to(weights.dtype)
        inner = weights * (gradient @ value.to(weights.dtype).mT - (gradient * out).sum(-1, keepdim=True)) * scale
        grads = inner @ key.to(weights.dtype), inner.mT @ query.to(weights.dtype), weights.mT @ gradient
    grad_query, *others = grads
    grad_key, grad_value = (g if groups == heads else g.unflatten(1, (groups, heads // groups)).sum(2) for g in others)
    return grad_query, grad_key, grad_value


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores


def _kernel(dtype: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return the forward and backward of a kernel that tells its log-sum-exp, None if this device has none.

    torch has no public function for that: the operators are looked up by name, and without them the formulas are
    computed in plain PyTorch, with the scores of one block at a time.
    """
    kind, aten = device_type(), torch.ops.aten
    if kind == "cpu" and hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return aten._scaled_dot_product_flash_attention_for_cpu, _backward_on_cpu
    return None


def _backward_on_cpu(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads: tuple[Tensor, Tensor, Tensor] = backward(gradient, query, key, value, out, lse, 0.0, causal, scale=scale)
    return grads
