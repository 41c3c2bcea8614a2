"""Recording steps of a run: what to note at each moment of a step, until it is written down at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mindspeed_mm.precision.recording.batch import DERIVED, Samples, read_batch
from mindspeed_mm.precision.recording.effective import group_settings
from mindspeed_mm.precision.recording.placement import Part, Placed, place
from mindspeed_mm.precision.recording.plan import CapturePlan
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.rows import BatchRows
from mindspeed_mm.precision.recording.view import Held, Hooks, ModelView
from mindspeed_mm.precision.records.record import Key, RankStep, RecordWriter, SampleFingerprint


class Capture:
    """Records the steps of a plan. Between them nothing is attached to the model.

    Its methods are called at the moments their names say. All ranks call them alike.

    Args:
        view: of the model.
        optimizer: over what it holds.
        writer: of this rank.
        plan: what to record.
        device: of the activations.
    """

    def __init__(
        self,
        view: ModelView,
        optimizer: Optimizer,
        writer: RecordWriter,
        plan: CapturePlan,
        *,
        device: torch.device,
    ) -> None:
        self.view = view
        self.optimizer = optimizer
        self.writer = writer
        self.plan = plan
        self.device = device
        self._step: _Step | None = None
        self._written: int | None = None

    @property
    def is_recording(self) -> bool:
        """Whether the running step is recorded."""
        return self._step is not None

    def step_begins(self, step: int, weights: bool = True) -> None:
        """Attach to the model if ``step``, the iterations done before it, is to be recorded.

        ``weights``: take them now; otherwise :meth:`weights` is called before the forward pass.
        """
        self.give_up()
        if step not in self.plan.steps:
            return
        self._step = taken = _Step(step, StepPool(self.view.speaks))
        taken.held = self.view.held
        if weights:
            self.weights()
        if self.plan.modules:
            taken.hooks = self.view.hooks(taken.pool, self.plan.tensors)
            taken.hooks.install()

    def weights(self) -> None:
        """Take the parameters and buffers, as the step finds them."""
        taken = self._step
        if taken is None:
            return
        for held in taken.held:
            self._add("weights", "parameter", held, held.value)
        for name, value in self.view.buffers().items():
            taken.pool.add_whole(Key("weights", name, "buffer"), value)

    def give_up(self) -> None:
        """Detach and forget the step that is recorded, if there is one."""
        if self._step and self._step.hooks:
            self._step.hooks.remove()
        self._step = None

    def micro_batch(
        self,
        batch: Any,
        positions: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        first_position: int | None = None,
    ) -> int:
        """Take a micro-batch, best while it is in host memory; return how many samples it has.

        Args:
            batch: what the data set gave.
            positions: of its samples, or of its rows, in the order of all samples.
            names: of its samples.
            first_position: of its first sample, where the others follow.
        """
        taken = self._step
        if taken is None:
            return 0
        samples = read_batch(batch, self.view.config)
        count = len(samples.keys) if samples is not None else 0
        if first_position is not None:
            positions = range(first_position, first_position + count)
        if samples is not None and self.view.speaks:
            taken.samples += _named(samples, positions, names)
        host = BatchRows(samples, torch.device("cpu"))
        _add_fields(taken.pool, batch, host)
        labels = batch.get("labels") if hasattr(batch, "get") else None
        if isinstance(labels, Tensor):  # what a replay of the loss needs beside the logits
            self._keep(Key("data", "batch", f"labels@{taken.batches}.{self.writer.rank}"), place(labels))
        taken.batches += 1
        if taken.hooks:
            taken.hooks.begin_micro_batch(BatchRows(samples, self.device))
        return count

    def loss(self, loss: Tensor, num_tokens: Tensor | None = None) -> None:
        """Take what the backward pass of a micro-batch starts from, and the number of target tokens behind it."""
        if self._step:
            self._step.losses.append(loss.detach().float().reshape(()))
            if num_tokens is not None:
                self._step.tokens.append(num_tokens.detach().float().reshape(()))

    def gradients_reduced(self, factor: Tensor | float = 1.0) -> None:
        """Take the gradients of the global batch; ``factor`` is what they were multiplied with after the backward."""
        if self._step:
            self._step.factor = factor
            self._step.pool.drop("grad_reduced")  # who cannot tell the last micro-batch calls this after each
            self._add_gradients("grad_reduced")

    def gradients_clipped(self, grad_norm: Tensor | float | None = None) -> None:
        """Take the gradients, and all else that the optimizer is about to use."""
        taken = self._step
        if taken is None:
            return
        if grad_norm is not None:
            taken.scalars["grad_norm"] = grad_norm
        self._add_gradients("grad_clipped")
        taken.before = [place(held.value).local.detach().clone() for held in taken.held]
        taken.groups = self._groups()
        follows = self._written == taken.step - 1  # then it is what that step has left, whose digest is there
        for held, what, value in self._state():
            for name, placed in held.parts(value):
                self._keep(Key("optimizer", name, f"{what}.before"), placed)
                if not follows:
                    taken.pool.add_whole(Key("optimizer", name, f"{what}.before"), placed)

    def updated(self) -> None:
        """Take what the optimizer made."""
        taken = self._step
        if taken is None:
            return
        for held, before in zip(taken.held, taken.before, strict=True):
            if held.value.requires_grad:
                update = _like(held.value, place(held.value).local.detach() - before)
                self._add("optimizer", "update", held, update)
        taken.before = []
        for held, what, value in self._state():
            self._add("optimizer", what, held, value)

    def step_ends(self, **scalars: Any) -> None:
        """Detach, wait for the device and write the step down; ``scalars`` are the same on all ranks."""
        taken, self._step = self._step, None
        if taken is None:
            return
        data = RankStep(samples=taken.samples, groups=taken.groups, tensors=taken.tensors)
        factor = float(taken.factor)
        if taken.hooks:
            taken.hooks.remove()
            data.notes, data.calls, data.stages = taken.hooks.notes, taken.hooks.kept, taken.hooks.stages
            for calls in data.calls.values():
                for call in calls:
                    gradients = {what: value * factor for what, value in call.tensors.items() if "grad_" in what}
                    call.tensors.update(gradients)
                    object.__setattr__(call, "rank", self.writer.rank)
        data.entries = taken.pool.read(factor)
        data.tree = self.view.tree()
        how = "sum" if self.view.speaks_for_loss else "copy"
        if taken.losses:
            data.scalars["loss"] = (float(torch.stack(taken.losses).sum()) * factor, how)
        if taken.tokens:
            data.scalars["num_tokens"] = (float(torch.stack(taken.tokens).sum()), how)
        for name, value in {**taken.scalars, **scalars}.items():
            data.scalars[name] = (float(value), "same")
        self.writer.write(taken.step, data)
        self._written = taken.step

    def _add_gradients(self, phase: str) -> None:
        taken = self._step
        assert taken is not None
        for held in taken.held:
            if held.value.grad is not None:
                self._add(phase, "gradient", held, held.value.grad)

    def _add(self, phase: str, what: str, held: Held, value: Tensor) -> None:
        assert self._step is not None
        for name, placed in held.parts(value):
            self._step.pool.add_whole(Key(phase, name, what), placed)
            self._keep(Key(phase, name, what), placed)

    def _state(self) -> list[tuple[Held, str, Tensor]]:
        assert self._step is not None
        return [
            (held, what, value)
            for held in self._step.held
            for what, value in self.optimizer.state.get(held.value, {}).items()
            if isinstance(value, Tensor)
        ]

    def _groups(self) -> list[dict[str, Any]]:
        names = self.view.group_names(self.optimizer)
        return [
            {"class": type(self.optimizer).__name__, "names": own, **group_settings(group)}
            for own, group in zip(names, self.optimizer.param_groups, strict=True)
        ]

    def _keep(self, key: Key, placed: Placed) -> None:
        assert self._step is not None
        if not placed.copy and any(fnmatchcase(key.site, pattern) for pattern in self.plan.tensors):
            self._step.tensors.append((key, placed.local.detach().clone(), placed.part, placed.shape))


class _Step:
    """What has been taken of the running step."""

    def __init__(self, step: int, pool: StepPool) -> None:
        self.step = step
        self.pool = pool
        self.batches = 0
        self.hooks: Hooks | None = None
        self.held: list[Held] = []
        self.before: list[Tensor] = []
        self.samples: list[SampleFingerprint] = []
        self.losses: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.groups: list[dict[str, Any]] = []
        self.scalars: dict[str, Any] = {}
        self.factor: Tensor | float = 1.0
        self.tensors: list[tuple[Key, Tensor, Part | None, tuple[int, ...]]] = []


def _add_fields(pool: StepPool, batch: Any, rows: BatchRows) -> None:
    """Add the tensors of a batch, those whose rows are known."""
    items = (
        batch.items() if hasattr(batch, "items") else enumerate(batch if isinstance(batch, (tuple, list)) else [batch])
    )
    for name, value in items:
        if isinstance(value, Tensor) and value.ndim and value.is_cpu and name not in DERIVED:
            found = rows.of(value.shape, vision=str(name).startswith("pixel_values"))
            if found is not None:
                pool.add(Key("data", "batch", str(name)), value, rows, found)


def _named(samples: Samples, positions: Sequence[int] | None, names: Sequence[str] | None) -> list[SampleFingerprint]:
    """Return the fingerprints with positions and names, where there is one for each sample or for all of a row."""
    prints = samples.fingerprints
    if positions and len(positions) != len(prints):
        positions = [positions[0]] * len(prints) if len(positions) == 1 else None
    if names is not None and len(names) != len(prints):
        names = None
    return [
        replace(found, position=positions[i] if positions else None, name=names[i] if names else None)
        for i, found in enumerate(prints)
    ]


def _like(value: Tensor, local: Tensor) -> Tensor:
    """Return ``local`` as a tensor that is laid out over the ranks as ``value`` is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return local
    return DTensor.from_local(
        local, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )
