"""An optimizer step that does nothing when the gradient is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether ``optimizer`` can leave a step out without the host knowing.

    torch's fused AdamW does, through the attribute ``found_inf`` that ``torch.amp.GradScaler`` uses: weights, moments
    and step count stay as they are. (Its fused SGD keeps an uninitialised momentum if that is its first step.) A
    subclass says so by an attribute ``skips_on_device``: what it adds to the step has to look at ``found_inf`` too.
    """
    fused_adamw = type(optimizer) is AdamW and bool(optimizer.defaults.get("fused"))
    return bool(getattr(optimizer, "skips_on_device", fused_adamw))


def step_if_finite(optimizer: Optimizer, grad_norm: Tensor) -> None:
    """Call ``optimizer.step()``, unless ``grad_norm`` (a scalar) is not finite: then nothing changes, bit for bit.

    Where the optimizer cannot do that by itself (:func:`skips_on_device`) the host waits for the device and looks.
    """
    bad = ~torch.isfinite(grad_norm)
    if not skips_on_device(optimizer):
        if not bad:
            optimizer.step()
        return
    torch_optimizer: Any = optimizer
    torch_optimizer.grad_scale, torch_optimizer.found_inf = None, bad.to(torch.float32)
    try:
        optimizer.step()
    finally:
        del torch_optimizer.grad_scale, torch_optimizer.found_inf
