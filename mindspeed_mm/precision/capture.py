"""Recording steps of a run: what to note at each moment of a step, until it is written down at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mindspeed_mm.precision.batch import DERIVED, Samples, read_batch
from mindspeed_mm.precision.effective import group_settings
from mindspeed_mm.precision.hooks import ModuleHooks
from mindspeed_mm.precision.placement import place
from mindspeed_mm.precision.plan import CapturePlan
from mindspeed_mm.precision.pool import StepPool
from mindspeed_mm.precision.record import Key, RankStep, RecordWriter, SampleFingerprint
from mindspeed_mm.precision.rows import BatchRows
from mindspeed_mm.precision.sites import class_name, innermost, parameter_names, sites


class Capture:
    """Records the steps of a plan. Between them nothing is attached to the model.

    Its methods are called at the moments their names say. All ranks call them alike.

    Args:
        model: plain, wrapped or sharded.
        optimizer: over its parameters.
        writer: of this rank.
        plan: what to record.
        device: of the activations.
        speaks: no other rank has the same samples, or this one counts for them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        writer: RecordWriter,
        plan: CapturePlan,
        *,
        device: torch.device,
        speaks: bool = True,
    ) -> None:
        self.root = innermost(model)
        self.optimizer = optimizer
        self.writer = writer
        self.plan = plan
        self.device = device
        self.speaks = speaks
        self._config = getattr(self.root, "config", None)
        self._step: _Step | None = None

    @property
    def is_recording(self) -> bool:
        """Whether the running step is recorded."""
        return self._step is not None

    def step_begins(self, step: int) -> None:
        """Attach to the model if ``step``, the iterations done before it, is to be recorded."""
        self.give_up()
        if step not in self.plan.steps:
            return
        self._step = taken = _Step(step, StepPool(self.speaks))
        taken.parameters = _parameters(self.root)
        for name, value in taken.parameters.items():
            taken.pool.add_whole(Key("weights", name, "parameter"), value)
            self._keep(Key("weights", name, "parameter"), value)
        for name, value in _buffers(self.root).items():
            taken.pool.add_whole(Key("weights", name, "buffer"), value)
        if self.plan.modules:
            taken.hooks = ModuleHooks(self.root, taken.pool, self.plan.tensors)
            taken.hooks.install()

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
        samples = read_batch(batch, self._config)
        count = len(samples.keys) if samples is not None else 0
        if first_position is not None:
            positions = range(first_position, first_position + count)
        if samples is not None and self.speaks:
            taken.samples += _named(samples, positions, names)
        host = BatchRows(samples, torch.device("cpu"))
        _add_fields(taken.pool, batch, host)
        labels = batch.get("labels") if hasattr(batch, "get") else None
        if isinstance(labels, Tensor):  # what a replay of the loss needs beside the logits
            self._keep(Key("data", "batch", f"labels@{taken.batches}.{self.writer.rank}"), labels)
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
        taken.before = {name: place(value).local.detach().clone() for name, value in taken.parameters.items()}
        taken.groups = self._groups()
        for name, value, what in self._state():
            self._keep(Key("optimizer", name, f"{what}.before"), value)

    def updated(self) -> None:
        """Take what the optimizer made."""
        taken = self._step
        if taken is None:
            return
        for name, value in taken.parameters.items():
            if not value.requires_grad:
                continue
            update = _like(value, place(value).local.detach() - taken.before[name])
            taken.pool.add_whole(Key("optimizer", name, "update"), update)
            self._keep(Key("optimizer", name, "update"), update)
        taken.before = {}
        for name, value, what in self._state():
            taken.pool.add_whole(Key("optimizer", name, what), value)
            self._keep(Key("optimizer", name, what), value)

    def step_ends(self, **scalars: Any) -> None:
        """Detach, wait for the device and write the step down; ``scalars`` are the same on all ranks."""
        taken, self._step = self._step, None
        if taken is None:
            return
        data = RankStep(samples=taken.samples, groups=taken.groups, tensors=taken.tensors)
        factor = float(taken.factor)
        if taken.hooks:
            taken.hooks.remove()
            data.notes, data.calls = taken.hooks.notes, taken.hooks.kept
            for calls in data.calls.values():
                for call in calls:
                    gradients = {what: value * factor for what, value in call.tensors.items() if "grad_" in what}
                    call.tensors.update(gradients)
                    object.__setattr__(call, "rank", self.writer.rank)
        data.entries = taken.pool.read(factor)
        data.tree = {site.name: class_name(site.module) for site in sites(self.root)}
        how = "sum" if self.speaks else "copy"
        if taken.losses:
            data.scalars["loss"] = (float(torch.stack(taken.losses).sum()) * factor, how)
        if taken.tokens:
            data.scalars["num_tokens"] = (float(torch.stack(taken.tokens).sum()), how)
        for name, value in {**taken.scalars, **scalars}.items():
            data.scalars[name] = (float(value), "same")
        self.writer.write(taken.step, data)

    def _add_gradients(self, phase: str) -> None:
        taken = self._step
        assert taken is not None
        for name, parameter in taken.parameters.items():
            if parameter.grad is not None:
                taken.pool.add_whole(Key(phase, name, "gradient"), parameter.grad)
                self._keep(Key(phase, name, "gradient"), parameter.grad)

    def _state(self) -> list[tuple[str, Tensor, str]]:
        assert self._step is not None
        found = []
        for name, parameter in self._step.parameters.items():
            for what, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found.append((name, value, what))
        return found

    def _groups(self) -> list[dict[str, Any]]:
        assert self._step is not None
        names = {id(parameter): name for name, parameter in self._step.parameters.items()}
        return [
            {
                "class": type(self.optimizer).__name__,
                "names": [names.get(id(parameter), "") for parameter in group["params"]],
                **group_settings(group),
            }
            for group in self.optimizer.param_groups
        ]

    def _keep(self, key: Key, value: Tensor) -> None:
        assert self._step is not None
        if any(fnmatchcase(key.site, pattern) for pattern in self.plan.tensors):
            placed = place(value)
            if not placed.copy:
                self._step.tensors[key] = (placed.local.detach().clone(), placed.part, placed.shape)


class _Step:
    """What has been taken of the running step."""

    def __init__(self, step: int, pool: StepPool) -> None:
        self.step = step
        self.pool = pool
        self.batches = 0
        self.hooks: ModuleHooks | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.before: dict[str, Tensor] = {}
        self.samples: list[SampleFingerprint] = []
        self.losses: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.groups: list[dict[str, Any]] = []
        self.scalars: dict[str, Any] = {}
        self.factor: Tensor | float = 1.0
        self.tensors: dict[Key, Any] = {}


def _parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    names = parameter_names(root)
    return {names[name]: parameter for name, parameter in root.named_parameters()}


def _buffers(root: nn.Module) -> dict[str, Tensor]:
    names = parameter_names(root)
    return {names[name]: value for name, value in root.named_buffers() if value.is_floating_point()}


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
