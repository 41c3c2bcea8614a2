"""The gradient norm of every parameter, at every step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mindspeed_mm.precision.recording.view import ModelView


class LocalNorms:
    """Takes the L2 norm of each parameter's gradient, of the global batch, all ranks together, before clipping.

    Attributes:
        names: of the parameters, in the order of the norms.
        norms: of the newest step, (N,) on the device.
    """

    def __init__(self, view: ModelView) -> None:
        self.names = view.gradient_names()
        self._view = view
        self.norms: Tensor | None = None

    def gradients_reduced(self, factor: Tensor | float = 1.0) -> None:
        """Compute the norms. A collective."""
        self.norms = self._view.gradient_norms()

    def loss(self, *_: Any) -> None:
        """Nothing to do."""

    def gradients_clipped(self, *_: Any) -> None:
        """Nothing to do."""

    def updated(self) -> None:
        """Nothing to do."""
