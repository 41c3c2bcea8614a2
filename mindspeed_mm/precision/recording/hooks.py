"""Watching the modules of a Hugging Face model: what each takes and returns, by its own names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.rows import BatchRows
from mindspeed_mm.precision.recording.sites import Site, parameter_names, sites
from mindspeed_mm.precision.recording.values import named_inputs, named_outputs
from mindspeed_mm.precision.recording.watching import MicroBatch, Seen, Watch, in_backward
from mindspeed_mm.precision.records.record import Key

_PIXELS = ("pixel_values", "pixel_values_videos")


class ModuleHooks(Watch):
    """Watches all modules of a model, and the gradients of its parameters before they are reduced.

    Args:
        root: see :func:`mindspeed_mm.precision.recording.sites.innermost`.
        pool: takes the sketches.
        keep: patterns of sites whose calls are kept as they are.
    """

    def __init__(self, root: nn.Module, pool: StepPool, keep: tuple[str, ...] = ()) -> None:
        super().__init__(pool)
        self._root = root
        self._keep = keep
        self._names = parameter_names(root)
        self._hooked: set[int] = set()
        self._now: MicroBatch | None = None
        head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
        self._head = head if isinstance(head, nn.Module) else None
        self._has_logits = True

    def begin_micro_batch(self, batch: BatchRows) -> None:
        """Take what comes for activations of this micro-batch."""
        self._now = MicroBatch(self._now.number + 1 if self._now else 0, batch)

    def _sites(self) -> Iterable[Site]:
        return sites(self._root)

    def _micro_batch(self, again: bool) -> MicroBatch | None:
        return self._now

    def _keeps(self, site: Site) -> bool:
        return any(fnmatchcase(site.name, pattern) for pattern in self._keep)

    def _inputs(self, site: Site, batch: MicroBatch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Seen]:
        if isinstance(site.module, FSDPModule) or site.module is self._root:
            self._watch_parameters(site)
        return seen_inputs(site, batch.rows, args, kwargs)

    def _outputs(self, site: Site, batch: MicroBatch, output: Any) -> Iterable[Seen]:
        if site.module is self._head and not self._are_logits(output):
            self._has_logits = False
            self._note(f"{site.name}: the logits were never in memory as a whole; the loss is computed in chunks")
            return
        for seen in seen_outputs(site, batch.rows, output):
            if seen.what != "output.logits" or self._has_logits:
                yield seen

    def _after(self, site: Site, module: nn.Module, args: Any, output: Any) -> None:
        super()._after(site, module, args, output)
        if module is self._head and self._has_logits and self._now and not in_backward():
            self._pool.alias(Key("loss", site.name, "logits"), Key("forward", site.name, "output.0"))

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


def seen_inputs(site: Site, batch: BatchRows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Seen]:
    """Yield what a Hugging Face module is given."""
    for name, argument, value in named_inputs(site.arguments, args, kwargs):
        if (found := _seen(site, f"input.{name}", value, batch, site.vision or argument in _PIXELS)) is not None:
            yield found


def seen_outputs(site: Site, batch: BatchRows, output: Any) -> Iterable[Seen]:
    """Yield what a Hugging Face module returns."""
    for name, value in named_outputs(output):
        if (found := _seen(site, f"output.{name}", value, batch, site.vision)) is not None:
            yield found


def _seen(site: Site, what: str, value: Tensor, batch: BatchRows, vision: bool) -> Seen | None:
    shape = value.shape
    if not value.ndim or batch.are_masks(shape):
        return None  # a loss, which is recorded as one, or how attention is done
    rows = batch.of(shape, vision=vision)
    if rows is None and (vision or not value.is_floating_point()) and batch.knows_tokens:
        return None  # a blank image, which belongs to no sample, or a table of numbers
    return Seen(site.name, what, value, batch, rows)
