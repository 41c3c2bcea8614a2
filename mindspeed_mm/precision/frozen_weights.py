"""Training without changing the weights: ``--precision-mode lr0``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.precision.digest import SIZE, digest, unnoticed
from mindspeed_mm.precision.placement import Placed, place
from mindspeed_mm.precision.record import Key, RankStep, RecordWriter
from mindspeed_mm.precision.sites import innermost, parameter_names
from mindspeed_mm.precision.sketch import Sketch


class FrozenWeights:
    """Lets the optimizer run and takes its update back, and adds the gradients of all steps up.

    Gradients are added with their signs, as sketches: over N steps a bias grows as N, rounding as the root of N. So two
    runs on the same data and weights whose sums are apart by far more than one step's gradients differ in how they
    compute, not in how they round.

    Args:
        model: plain or sharded.
        writer: of this rank.
    """

    def __init__(self, model: nn.Module, writer: RecordWriter) -> None:
        root = innermost(model)
        names = parameter_names(root)
        trained = {names[name]: value for name, value in root.named_parameters() if value.requires_grad}
        self._parameters: dict[str, nn.Parameter] = trained
        self._writer = writer
        self._before: list[Tensor] = []
        self._sums: dict[str, Tensor] = {}
        self._placed: dict[str, tuple[Placed, str]] = {}
        self._losses: list[Tensor] = []
        self._factor: Tensor | float = 1.0
        self._loss_sum: Tensor | float = 0.0
        self._steps = 0

    def loss(self, loss: Tensor, num_tokens: Tensor | None = None) -> None:
        """Take a micro-batch's part of the loss."""
        self._losses.append(loss.detach().float().reshape(()))

    def gradients_reduced(self, factor: Tensor | float = 1.0) -> None:
        """Add this step's gradients and loss to the sums."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                with unnoticed(parameter.grad.device):
                    placed = place(parameter.grad)
                    one = digest(placed.local, None, placed.offset)
                    self._sums[name] = self._sums[name] + one if name in self._sums else one
                # What stays is where it lies, not the gradient.
                about = Placed(placed.local.new_empty(0), placed.shape, placed.part, placed.copy)
                self._placed[name] = (about, str(parameter.grad.dtype).removeprefix("torch."))
        if self._losses:
            self._loss_sum = self._loss_sum + torch.stack(self._losses).sum() * factor
        self._losses = []
        self._steps += 1

    def gradients_clipped(self, grad_norm: Any = None) -> None:
        """Keep the weights."""
        self._before = [place(parameter).local.detach().clone() for parameter in self._parameters.values()]

    @torch.no_grad()
    def updated(self) -> None:
        """Put the weights back."""
        for parameter, before in zip(self._parameters.values(), self._before, strict=True):
            place(parameter).local.copy_(before)
        self._before = []

    def write(self, step: int) -> None:
        """Write the sums of all steps so far under ``step``, the number of the last one. Waits for the device."""
        data = RankStep(scalars={"lr0_steps": (float(self._steps), "same"), "lr0_loss": (float(self._loss_sum), "sum")})
        for name, values in self._sums.items():
            data.entries[Key("grad_reduced", name, "gradient_sum")] = _sketch(values, *self._placed[name])
        self._writer.write(step, data)


def _sketch(values: Tensor, placed: Placed, dtype: str) -> Sketch:
    numbers = values.cpu().double().numpy()
    vector = numbers[:SIZE]
    total, _, maximum, minimum, nonfinite = numbers[SIZE:].tolist()
    count = 1
    for size in placed.shape if placed.part is None else (size for _, size in placed.part):
        count *= size
    # A sum of tensors: its norm is what the vector says of it, and the extremes are sums too.
    return Sketch(
        vector=vector,
        count=count,
        total=total,
        square_sum=float(vector @ vector) / SIZE,
        maximum=maximum,
        minimum=minimum,
        nonfinite=int(nonfinite),
        dtype=dtype,
        shape=placed.shape,
        part=placed.part,
        copy=placed.copy,
    )
