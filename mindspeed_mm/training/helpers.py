"""Small functions that user scripts call from their callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.arguments import get_args
from mindspeed_mm.distributed.state import average_over, data_parallel_group


def average_losses_across_data_parallel_group(losses: Sequence[Tensor]) -> Tensor:
    """Return the mean of each loss over the data-parallel ranks, as one tensor of shape ``(len(losses),)``."""
    return average_over(torch.cat([loss.detach().reshape(1) for loss in losses]), data_parallel_group())


def unwrap_model(model: Any) -> Any:
    """Return the model itself, for scripts written for wrappers. FSDP2 shards in place and wraps nothing."""
    if isinstance(model, (list, tuple)):
        return [unwrap_model(m) for m in model]
    while isinstance(model, nn.Module) and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def get_num_microbatches() -> int:
    """Return the number of micro-batches of a step: global batch / (micro batch * data-parallel size)."""
    return int(get_args().num_microbatches)
