"""Training without changing the weights: ``--precision-mode lr0``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.precision.recording.digest import SIZE, digest, unnoticed
from mindspeed_mm.precision.recording.placement import Part, Placed, place
from mindspeed_mm.precision.recording.view import ModelView
from mindspeed_mm.precision.records.record import Key, RankStep, RecordWriter
from mindspeed_mm.precision.records.sketch import Sketch


class FrozenWeights:
    """Lets the optimizer run and takes its update back, and adds the gradients of all steps up.

    Gradients are added with their signs, as sketches: over N steps a bias grows as N, rounding as the root of N. So two
    runs on the same data and weights whose sums are apart by far more than one step's gradients differ in how they
    compute, not in how they round.

    Args:
        view: of the model.
        writer: of this rank.
    """

    def __init__(self, view: ModelView, writer: RecordWriter) -> None:
        self._view = view
        self._trained = [held for held in view.held if held.value.requires_grad]
        self._writer = writer
        self._before: list[Tensor] = []
        self._sums: dict[tuple[str, Part | None], Tensor] = {}
        self._placed: dict[tuple[str, Part | None], tuple[Placed, str]] = {}
        self._losses: list[Tensor] = []
        self._factor: Tensor | float = 1.0
        self._loss_sum: Tensor | float = 0.0
        self._steps = 0

    def loss(self, loss: Tensor, num_tokens: Tensor | None = None) -> None:
        """Take a micro-batch's part of the loss."""
        self._losses.append(loss.detach().float().reshape(()))

    def gradients_reduced(self, factor: Tensor | float = 1.0) -> None:
        """Add this step's gradients and loss to the sums."""
        for held in self._trained:
            if held.value.grad is None:
                continue
            for name, placed in held.parts(held.value.grad):
                where = (name, placed.part)
                with unnoticed(placed.local.device):
                    one = digest(placed.local, None, placed.offset)
                    self._sums[where] = self._sums[where] + one if where in self._sums else one
                # What stays is where it lies, not the gradient.
                about = Placed(placed.local.new_empty(0), placed.shape, placed.part, placed.copy)
                self._placed[where] = (about, str(placed.local.dtype).removeprefix("torch."))
        if self._losses:
            self._loss_sum = self._loss_sum + torch.stack(self._losses).sum() * factor
        self._losses = []
        self._steps += 1

    def gradients_clipped(self, grad_norm: Any = None) -> None:
        """Keep the weights."""
        self._before = [place(held.value).local.detach().clone() for held in self._trained]

    @torch.no_grad()
    def updated(self) -> None:
        """Put the weights back."""
        for held, before in zip(self._trained, self._before, strict=True):
            place(held.value).local.copy_(before)
        self._before = []

    def write(self, step: int) -> None:
        """Write the sums of all steps so far under ``step``, the number of the last one. Waits for the device."""
        how = "sum" if self._view.speaks_for_loss else "copy"
        data = RankStep(scalars={"lr0_steps": (float(self._steps), "same"), "lr0_loss": (float(self._loss_sum), how)})
        for where, values in self._sums.items():
            key = Key("grad_reduced", where[0], "gradient_sum")
            found = _sketch(values, *self._placed[where])
            data.entries[key] = data.entries[key] + found if key in data.entries else found
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
