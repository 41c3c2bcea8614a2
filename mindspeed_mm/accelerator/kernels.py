"""Kernels of other libraries, where one is installed and runs on the device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from mindspeed_mm.accelerator.hardware import device_type


@cache
def fused_linear_cross_entropy() -> Callable[[nn.Linear, Tensor, Tensor], Tensor] | None:
    """Return Liger's cross entropy of an output projection, None where it is not installed or cannot run.

    The result takes the projection, (N, H) hidden states and (N,) targets with -100 for "no target", and returns
    the sum of the cross entropies, a scalar in fp32. It holds neither the logits nor their gradient whole.
    """
    if device_type() != "cuda":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    options = {}
    if "accum_dtype" in inspect.signature(LigerFusedLinearCrossEntropyLoss).parameters:
        options["accum_dtype"] = torch.float32  # chunks of a bf16 weight gradient lose bits when added up in bf16
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="sum", **options)
    return lambda head, hidden, targets: loss(head.weight, hidden, targets, head.bias)
