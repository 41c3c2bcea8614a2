"""The interface between the training loop and a road."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

Report = dict[str, Any]
"""What a ``loss_func`` reports of a micro-batch: scalars, or ``(numerator, denominator)`` pairs, by name."""

ForwardStep = Callable[[Iterator[Any] | None, nn.Module], tuple[Any, Callable[[Any], Any]]]


@dataclass(frozen=True)
class StepResult:
    """What became of an optimizer step.

    Attributes:
        grad_norm: L2 norm of all gradients before clipping, a scalar tensor on the device (not yet read by the host).
            Where it is not finite, on all ranks then, weights and optimizer state were left as they were.
    """

    grad_norm: Tensor


class Listener(Protocol):
    """Who is told what happens within a training step. Nothing that it is given may be changed, or kept as it is."""

    def loss(self, loss: Tensor, num_tokens: Tensor | None) -> None:
        """The backward pass of a micro-batch is about to start from ``loss``, of so many target tokens if known."""

    def gradients_reduced(self, factor: Tensor | float) -> None:
        """All gradients are those of the global batch; they were multiplied by ``factor`` after the backward passes."""

    def gradients_clipped(self, grad_norm: Tensor) -> None:
        """The optimizer is about to use the gradients, whose norm before clipping this was."""

    def updated(self) -> None:
        """The optimizer has made its step, or left it out."""


class Engine(Protocol):
    """A model with its optimizer, ready to train."""

    module: nn.Module
    optimizer: Optimizer
    listeners: list[Listener]

    @property
    def parameter_count(self) -> int:
        """The parameters of the whole model, on all ranks together, each counted once."""

    def seed(self, seed: int) -> None:
        """Start the random streams of training (dropout); the seed is this data-parallel rank's."""

    def forward_backward(
        self,
        forward_step: ForwardStep,
        data_iterator: Iterator[Any] | None,
        num_microbatches: int,
        forward_only: bool = False,
    ) -> list[Report]:
        """Run the micro-batches of one step and return the report of each.

        A loss that is not finite on any rank makes the gradient, and with it its norm, not finite.
        """

    def optimizer_step(self) -> StepResult:
        """Clip, update the weights unless the gradient is not finite, and clear the gradients."""
