"""Watching modules for one step: hooks that hand on tensors and their gradients, however they are read and placed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mindspeed_mm.precision.recording.placement import Placed
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.rows import BatchRows, Rows
from mindspeed_mm.precision.records.record import Call, Key


class Named(Protocol):
    """A module with a name of its own among those that are watched."""

    @property
    def name(self) -> str:
        """The name."""

    @property
    def module(self) -> nn.Module:
        """The module."""


@dataclass
class MicroBatch:
    """What is known of one micro-batch, and of the modules that have computed with it.

    Attributes:
        number: of it in the step.
        rows: its samples.
        calls: of each module in the forward pass.
        repeats: of each module when it is computed again.
        index: of the newest call of each module.
        open: calls that are kept and have not returned.
    """

    number: int
    rows: BatchRows
    calls: Counter[str] = field(default_factory=Counter)
    repeats: Counter[str] = field(default_factory=Counter)
    index: dict[str, int] = field(default_factory=dict)
    open: dict[str, Call] = field(default_factory=dict)

    def count(self, name: str, again: bool) -> None:
        """Note that a module is called, or computed again."""
        counter = self.repeats if again else self.calls
        index = counter[name]
        counter[name] += 1
        # Reentrant recompute makes the graph that the backward pass runs through, in a second round of calls.
        self.index[name] = index % self.calls[name] if again and self.calls[name] else index


def _as_it_is(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Seen:
    """A tensor that goes into a module, or comes out of it, and how it is recorded.

    Attributes:
        site: of the module in the record.
        what: it is called there.
        value: the tensor.
        batch, rows: what tells its rows apart.
        part: makes of the tensor what this rank has of the whole one.
        part_of_gradient: the same of its gradient; None leaves that out.
    """

    site: str
    what: str
    value: Tensor
    batch: BatchRows
    rows: Rows | None
    part: Callable[[Tensor], Tensor | Placed] = _as_it_is
    part_of_gradient: Callable[[Tensor], Tensor | Placed] | None = _as_it_is


class Watch(ABC):
    """Watches modules, and leaves nothing behind.

    Gradients are taken by hooks on tensors: on an alias of each input, so that it is the gradient of this module's use
    of it alone, and on each output. What a checkpointed module computes again in the backward pass is told by autograd
    being at work on this thread; it is not recorded a second time, while its gradients are, once.

    Args:
        pool: takes the sketches.
        stage: number of the part of a pipeline that these modules are.
    """

    def __init__(self, pool: StepPool, stage: int = 0) -> None:
        self.kept: dict[str, list[Call]] = {}
        self.notes: list[str] = []
        self.stages: dict[Key, int] = {}
        self._pool = pool
        self._stage = stage
        self._handles: list[Any] = []

    @abstractmethod
    def _sites(self) -> Iterable[Any]:
        """Return the modules to watch."""

    @abstractmethod
    def _micro_batch(self, again: bool) -> MicroBatch | None:
        """Return what is computed with now; ``again``: for a second time, in the backward pass."""

    @abstractmethod
    def _inputs(self, site: Any, batch: MicroBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Seen]:
        """Return what goes into a module."""

    @abstractmethod
    def _outputs(self, site: Any, batch: MicroBatch, output: Any) -> Iterable[Seen]:
        """Return what comes out of a module."""

    def _keeps(self, site: Any) -> bool:
        """Return whether the calls of a module are kept."""
        return False

    def _is_first(self, site: Any) -> bool:
        """Return whether a module's output is taken as it is, before other hooks make something else of it."""
        return True

    def install(self) -> None:
        """Attach to every module."""
        for site in self._sites():
            self._handles += [
                # After FSDP and tensor parallelism have prepared the inputs, before they take the outputs.
                site.module.register_forward_pre_hook(partial(self._before, site), with_kwargs=True),
                site.module.register_forward_hook(partial(self._after, site), prepend=self._is_first(site)),
            ]

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, site: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        again = in_backward()
        batch = self._micro_batch(again)
        if batch is None:
            return None
        batch.count(site.name, again)
        if torch.is_grad_enabled():
            args, kwargs = tree_map(_alias, (args, kwargs))
        call = None
        if not again and self._keeps(site):
            taken, named = tree_map(_copied, (args, kwargs))
            call = Call(taken, named, None, {}, micro_batch=batch.number, index=batch.index[site.name])
            self.kept.setdefault(site.name, []).append(call)
            batch.open[site.name] = call
        for seen in self._inputs(site, batch, args, kwargs):
            self._see(seen, batch.index[site.name], again, call)
        return args, kwargs

    def _after(self, site: Any, module: nn.Module, args: Any, output: Any) -> None:
        again = in_backward()
        batch = self._micro_batch(again)
        if batch is None:
            return
        call = None if again else batch.open.pop(site.name, None)
        if call is not None:
            object.__setattr__(call, "output", tree_map(_copied, _plain(output)))
        for seen in self._outputs(site, batch, output):
            self._see(seen, batch.index[site.name], again, call)

    def _see(self, seen: Seen, index: int, again: bool, call: Call | None) -> None:
        """Record a tensor, and its gradient once it comes."""
        rows, value = seen.rows, seen.value
        suffix = f"@{rows.label}" if rows and rows.label else f"@{index}" if index else ""
        if not again:
            self._add(Key("forward", seen.site, seen.what + suffix), seen.part(value), seen.batch, rows)
            if call is not None:
                call.tensors[seen.what] = value.detach().clone()
        if value.requires_grad and torch.is_grad_enabled() and seen.part_of_gradient is not None:
            key = Key("backward", seen.site, f"grad_{seen.what}{suffix}")
            rows = rows if rows is None or rows.spread is None else None  # a sum over the samples
            # Not ``seen``: a hook that holds its own tensor keeps it for ever.
            value.register_hook(partial(self._see_gradient, key, seen.part_of_gradient, seen.batch, rows, call))

    def _see_gradient(
        self,
        key: Key,
        part: Callable[[Tensor], Tensor | Placed],
        batch: BatchRows,
        rows: Rows | None,
        call: Call | None,
        gradient: Tensor,
    ) -> None:
        self._add(key, part(gradient), batch, rows)
        if call is not None:
            call.tensors[key.what.partition("@")[0]] = gradient.detach().clone()

    def _add(self, key: Key, value: Tensor | Placed, batch: BatchRows, rows: Rows | None) -> None:
        self._pool.add(key, value, batch, rows)
        if self._stage:
            self.stages[key] = self._stage

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def in_backward() -> bool:
    """Return whether autograd is at work on this thread."""
    return torch._C._current_graph_task_id() != -1


def _alias(value: Any) -> Any:
    if isinstance(value, Tensor) and value.requires_grad:
        return value.view_as(value)
    return value


def _copied(value: Any) -> Any:
    """Return a value that does not change any more and can be read back without running code."""
    if isinstance(value, Tensor):
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        return value.detach().clone()
    return value if isinstance(value, (bool, int, float, str, bytes, torch.dtype, type(None))) else None


def _plain(output: Any) -> Any:
    return dict(output) if isinstance(output, dict) else output
