"""An optimizer step that does nothing when the gradient is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether ``optimizer`` can leave a step out without the host knowing.

    torch's fused optimizers do, through the attribute ``found_inf`` that ``torch.amp.GradScaler`` uses: weights, state
    and step count stay as they are. An optimizer says so by ``_step_supports_amp_scaling``, as torch's own do; what a
    subclass adds to the step has to look at ``found_inf`` too. Not so SGD: torch's keeps an uninitialised momentum
    when it is the first step that is left out.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or isinstance(optimizer, SGD):
        return False
    return all(group.get("fused") is not False for group in optimizer.param_groups)  # may have been set after building


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
