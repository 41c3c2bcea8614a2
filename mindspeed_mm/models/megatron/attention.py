"""The core attention of megatron-core's layers by torch's fused kernels, for where Transformer Engine is absent."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from mindspeed_mm import accelerator
from mindspeed_mm.distributed.context_parallel import ContextParallel
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
        if (kind := getattr(config, "softmax_type", "vanilla")) != "vanilla":
            raise UserError(f"softmax_type '{kind}' needs Transformer Engine; leave it out of model.json")
        self.config = config
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.context_parallel = _context_parallel(config, cp_comm_type) if config.context_parallel_size > 1 else None

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
                causality hides. Padding at the end of causal input needs none. Or where packed sequences begin and
                the last one ends, (n + 1,) integers on the host.
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
        lengths = sequence_lengths(packed_seq_params)
        if attention_mask is not None and attention_mask.dim() == 1:
            lengths, attention_mask = attention_mask.diff().tolist(), None
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            if self.context_parallel is not None:
                if attention_mask is not None:
                    raise NotImplementedError("a mask for sequences that ranks share")
                out = self.context_parallel.attend(
                    query, key, value, lengths, causal=causal, scale=self.scale, dropout=dropout
                )
            else:
                mask = None if attention_mask is None else ~attention_mask.bool()
                query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
                out = accelerator.attend_each(
                    query,
                    key,
                    value,
                    lengths or query.shape[2:3],
                    causal=causal,
                    scale=self.scale,
                    mask=mask,
                    dropout=dropout,
                ).permute(2, 0, 1, 3)
        out = out.flatten(2)
        return out.squeeze(1) if packed else out

    def _random_state(self, dropout: float) -> Any:
        """Draw other numbers on each tensor-parallel rank, which has other heads; sequence parallelism does already."""
        if not dropout or self.config.sequence_parallel or self.config.tensor_model_parallel_size == 1:
            return nullcontext()
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return get_cuda_rng_tracker().fork()


def _context_parallel(config: Any, kind: str | None) -> ContextParallel:
    from megatron.core import parallel_state

    group = parallel_state.get_context_parallel_group()
    return ContextParallel.of(group, kind or config.cp_comm_type, config.hierarchical_context_parallel_sizes)


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
