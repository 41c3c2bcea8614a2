"""Norms that know which of their gradients sequence-parallel ranks have to add up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    """RMSNorm or LayerNorm, whichever ``config.normalization`` names; megatron-core's own needs extras for it.

    Args:
        config: megatron-core's ``TransformerConfig``.
        hidden_size: size of the last dimension.
        eps: added to the mean square, or variance.
        **_: what megatron-core passes to other kinds of norms.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        centred = config.normalization == "LayerNorm"
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)) if centred else None
        for parameter in self.parameters():
            # Each rank sees a part of the sequence only: megatron-core adds up the gradients of such parameters.
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, or its centred variant."""
        if self.bias is None:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(hidden_states, self.weight.shape, self.weight, self.bias, self.eps)
