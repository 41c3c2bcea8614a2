"""Reading device values late, so that the host does not wait for work queued after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.accelerator.hardware import _module, is_cpu


class HostRead:
    """A device tensor on its way to the host.

    ``.item()`` on a device waits for everything that was queued until then. Here the copy is queued behind the work
    that makes the value, and reading it waits for that copy only: a step later it has long arrived.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Queue the copy of ``tensor``, of any shape and dtype."""
        self._event: Any = None
        self._values = tensor.detach()
        if not is_cpu() and not tensor.is_cpu:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor.detach(), non_blocking=True)
            self._event = _module().Event()
            self._event.record()

    def read(self) -> list[float]:
        """Return the values, flattened, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return [float(value) for value in self._values.numpy().reshape(-1)]
