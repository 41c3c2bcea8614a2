"""Losses of one micro-batch: plain functions of tensors, computed in fp32."""

from mindspeed_mm.losses.chunked import head_returns_loss_sums, logits_bytes
from mindspeed_mm.losses.cross_entropy import (
    IGNORE,
    REDUCTIONS,
    cross_entropy_sums,
    mean_token_loss,
    per_sample_loss,
    shift_labels,
    spread_over_samples,
    sum_by_sample,
    token_losses,
    token_sum_loss,
)
from mindspeed_mm.losses.linear_cross_entropy import linear_cross_entropy
from mindspeed_mm.losses.vocab_parallel import vocab_parallel_token_losses

__all__ = [
    "IGNORE",
    "REDUCTIONS",
    "cross_entropy_sums",
    "head_returns_loss_sums",
    "linear_cross_entropy",
    "logits_bytes",
    "mean_token_loss",
    "per_sample_loss",
    "shift_labels",
    "spread_over_samples",
    "sum_by_sample",
    "token_losses",
    "token_sum_loss",
    "vocab_parallel_token_losses",
]
