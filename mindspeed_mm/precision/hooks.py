"""Hooks that hand on what every module takes and returns, and the gradients of both."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_map

from mindspeed_mm.precision.pool import StepPool
from mindspeed_mm.precision.record import Call, Key
from mindspeed_mm.precision.rows import BatchRows, Rows
from mindspeed_mm.precision.sites import Site, parameter_names, sites
from mindspeed_mm.precision.values import named_inputs, named_outputs

_PIXELS = ("pixel_values", "pixel_values_videos")


class ModuleHooks:
    """Watches the modules of a model for one step, and leaves nothing behind.

    Gradients are taken by hooks on tensors: on an alias of each input, so that it is the gradient of this module's use
    of it alone, and on each output. What a checkpointed module computes again in the backward pass is told by autograd
    being at work on this thread; it is not recorded a second time, while its gradients are, once.

    Args:
        root: see :func:`mindspeed_mm.precision.sites.innermost`.
        pool: takes the sketches.
        keep: patterns of sites whose calls are kept as they are.
    """

    def __init__(self, root: nn.Module, pool: StepPool, keep: tuple[str, ...] = ()) -> None:
        self._root = root
        self._pool = pool
        self._keep = keep
        self._handles: list[Any] = []
        self._names = parameter_names(root)
        self._hooked: set[int] = set()
        self._batch: BatchRows | None = None
        self._micro_batch = -1
        self._calls: Counter[str] = Counter()
        self._repeats: Counter[str] = Counter()
        self._index: dict[str, int] = {}
        self._open: dict[str, Call] = {}
        head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
        self._head = head if isinstance(head, nn.Module) else None
        self._has_logits = True
        self.kept: dict[str, list[Call]] = {}
        self.notes: list[str] = []

    def install(self) -> None:
        """Attach to every module."""
        for site in sites(self._root):
            self._handles += [
                # After FSDP and tensor parallelism have prepared the inputs, before they take the outputs.
                site.module.register_forward_pre_hook(partial(self._before, site), with_kwargs=True),
                site.module.register_forward_hook(partial(self._after, site), with_kwargs=True, prepend=True),
            ]

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin_micro_batch(self, batch: BatchRows) -> None:
        """Take what comes for activations of this micro-batch."""
        self._batch = batch
        self._micro_batch += 1
        self._calls.clear()
        self._repeats.clear()

    def _before(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._batch is None:
            return None
        if isinstance(module, FSDPModule) or module is self._root:
            self._watch_parameters(site)
        again = _in_backward()
        counter = self._repeats if again else self._calls
        index = counter[site.name]
        counter[site.name] += 1
        # Reentrant recompute makes the graph that the backward pass runs through, in a second round of calls.
        self._index[site.name] = index % self._calls[site.name] if again and self._calls[site.name] else index
        if torch.is_grad_enabled():
            args, kwargs = tree_map(_alias, (args, kwargs))
        call = None
        if not again and any(fnmatchcase(site.name, pattern) for pattern in self._keep):
            taken, named = tree_map(_copied, (args, kwargs))
            call = Call(taken, named, None, {}, micro_batch=self._micro_batch, index=self._index[site.name])
            self.kept.setdefault(site.name, []).append(call)
            self._open[site.name] = call
        for name, argument, value in named_inputs(site.arguments, args, kwargs):
            vision = site.vision or argument in _PIXELS
            self._see(site, f"input.{name}", value, vision, again, call)
        return args, kwargs

    def _after(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._batch is None:
            return
        again = _in_backward()
        if module is self._head and not self._are_logits(output):
            self._has_logits = False
            self._note(f"{site.name}: the logits were never in memory as a whole; the loss is computed in chunks")
            return
        call = None if again else self._open.pop(site.name, None)
        if call is not None:
            object.__setattr__(call, "output", tree_map(_copied, _plain(output)))
        for name, value in named_outputs(output):
            if name == "logits" and not self._has_logits:
                continue
            self._see(site, f"output.{name}", value, site.vision, again, call)
        if module is self._head and not again:
            self._pool.alias(Key("loss", site.name, "logits"), Key("forward", site.name, "output.0"))

    def _see(self, site: Site, what: str, value: Tensor, vision: bool, again: bool, call: Call | None) -> None:
        """Record a tensor, and its gradient once it comes."""
        batch, shape = self._batch, value.shape
        assert batch is not None
        if not value.ndim or batch.are_masks(shape):
            return  # a loss, which is recorded as one, or how attention is done
        if not value.is_floating_point() and what.startswith("input.") and what != "input.0":
            return  # positions and such: what is made of them is recorded, and not all batches hand them on
        rows = batch.of(shape, vision=vision)
        if rows is None and (vision or not value.is_floating_point()) and batch.knows_tokens:
            return  # a blank image, which belongs to no sample, or a table of numbers
        index = self._index[site.name]
        suffix = f"@{rows.label}" if rows and rows.label else f"@{index}" if index else ""
        if not again:
            self._pool.add(Key("forward", site.name, what + suffix), value, batch, rows)
            if call is not None:
                call.tensors[what] = value.detach().clone()
        if value.requires_grad and torch.is_grad_enabled():
            key = Key("backward", site.name, f"grad_{what}{suffix}")
            rows = rows if rows is None or rows.spread is None else None  # a sum over the samples
            value.register_hook(partial(self._see_gradient, key, batch, rows, call))

    def _see_gradient(self, key: Key, batch: BatchRows, rows: Rows | None, call: Call | None, gradient: Tensor) -> None:
        self._pool.add(key, gradient, batch, rows)
        if call is not None:
            call.tensors[key.what.partition("@")[0]] = gradient.detach().clone()

    def _watch_parameters(self, unit: Site) -> None:
        """Hook the parameters below ``unit`` as the forward sees them: those of FSDP are whole at this moment."""
        for path, module in unit.module.named_modules(prefix=unit.path):
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad or id(parameter) in self._hooked:
                    continue
                self._hooked.add(id(parameter))
                full = f"{path}.{name}" if path else name
                key = Key("grad_local", self._names.get(full, full), "gradient")
                self._handles.append(parameter.register_hook(partial(self._see_local_gradient, key)))

    def _see_local_gradient(self, key: Key, gradient: Tensor) -> None:
        self._pool.add_whole(key, gradient, summed=True)

    def _are_logits(self, output: Any) -> bool:
        weight = getattr(self._head, "weight", None)
        return not isinstance(output, Tensor) or weight is None or output.shape[-1:] == weight.shape[:1]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _in_backward() -> bool:
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
