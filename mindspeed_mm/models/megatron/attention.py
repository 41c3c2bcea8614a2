"""The core attention of megatron-core's layers by torch's fused kernels, for where Transformer Engine is absent."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm import accelerator
from mindspeed_mm.errors import UserError


class CoreAttention(nn.Module):
    """``submodules.core_attention`` of a layer spec; the class itself, no ``ModuleSpec`` around it.

    Unlike megatron-core's own one it holds no scores of s x s for causal input, does not repeat the heads of keys
    where the kernel need not have them repeated, and takes packed sequences and sequences that are shared by
    context-parallel ranks.

    Args:
        config: megatron-core's ``TransformerConfig``.
        layer_number: unused.
        attn_mask_type: causal, or not.
        attention_type: "self".
        attention_dropout: default that of ``config``.
        softmax_scale: of the scores; default ``1 / sqrt(head size)``.
        cp_comm_type: how context-parallel ranks share a sequence; default that of ``config``.
        **_: process groups, which newer versions of megatron-core pass: these are the global ones.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if getattr(config, "window_size", None) is not None:
            raise UserError("window_size: sliding windows need Transformer Engine; leave it out of model.json")
        self.config = config
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (s, b, h, d), or (t, h, d) for packed sequences.
            key: (s, b, g, d) or (t, g, d).
            value: as ``key``.
            attention_mask: bool, broadcast to (b, h, s, s), True where a query must *not* see a key, beside what
                causality hides. Padding at the end of causal input needs none.
            attn_mask_type: default that of the layer.
            attention_bias: not supported.
            packed_seq_params: whose ``cu_seqlens_q`` (or ``cu_seqlens_q_padded``, where sequences are padded) say
                where each sequence of the row begins; no sequence sees another.

        Returns:
            (s, b, h * d) or (t, h * d).
        """
        if attention_bias is not None:
            raise NotImplementedError("attention bias")
        causal = "causal" in (attn_mask_type or self.attn_mask_type).name and query.shape[0] > 1
        packed = query.dim() == 3
        if packed:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        lengths = sequence_lengths(packed_seq_params) or [query.shape[0]]
        mask = None if attention_mask is None else ~attention_mask.bool()
        if mask is not None and len(lengths) > 1:
            raise NotImplementedError("a mask for packed sequences")
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        with self._random_state():
            parts = [
                accelerator.attend(
                    q, k, v, causal=causal, scale=self.scale, mask=mask, dropout=self.dropout * self.training
                )
                for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
            ]
        out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out.squeeze(1) if packed else out

    def _random_state(self) -> Any:
        """Draw other numbers on each tensor-parallel rank, which has other heads; sequence parallelism does already."""
        if not (self.dropout and self.training) or self.config.sequence_parallel:
            return nullcontext()
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return get_cuda_rng_tracker().fork()


def sequence_lengths(packed_seq_params: Any) -> list[int] | None:
    """Return the lengths of the packed sequences, with their padding; None if nothing is packed.

    The host has to know them: what is on the device is read once for each micro-batch, and kept.
    """
    if packed_seq_params is None:
        return None
    ends = packed_seq_params.cu_seqlens_q_padded
    ends = packed_seq_params.cu_seqlens_q if ends is None else ends
    if ends is None:
        return None
    if getattr(packed_seq_params, "lengths", None) is None:
        packed_seq_params.lengths = ends.diff().tolist()
    lengths: list[int] = packed_seq_params.lengths
    return lengths
