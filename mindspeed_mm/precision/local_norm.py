"""The gradient norm of every parameter, at every step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mindspeed_mm.distributed.grad_norm import parameter_norms
from mindspeed_mm.precision.sites import innermost, parameter_names


class LocalNorms:
    """Takes the L2 norm of each parameter's gradient, of the global batch, all ranks together, before clipping.

    Attributes:
        names: of the parameters, in the order of the norms.
        norms: of the newest step, (N,) on the device.
    """

    def __init__(self, model: nn.Module) -> None:
        root = innermost(model)
        names = parameter_names(root)
        trained = [(names[name], parameter) for name, parameter in root.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in trained]
        self._parameters = [parameter for _, parameter in trained]
        self.norms: Tensor | None = None

    def gradients_reduced(self, factor: Tensor | float = 1.0) -> None:
        """Compute the norms. A collective."""
        self.norms = parameter_norms(self._parameters)

    def loss(self, *_: Any) -> None:
        """Nothing to do."""

    def gradients_clipped(self, *_: Any) -> None:
        """Nothing to do."""

    def updated(self) -> None:
        """Nothing to do."""
