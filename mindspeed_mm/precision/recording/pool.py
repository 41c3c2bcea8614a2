"""The sketches of one step, kept on the device until the step is over."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mindspeed_mm.precision.recording.digest import digest, unnoticed
from mindspeed_mm.precision.recording.placement import Placed, place
from mindspeed_mm.precision.recording.rows import BatchRows, Rows
from mindspeed_mm.precision.records.record import Key
from mindspeed_mm.precision.records.sketch import SIZE, Sketch

SCALED = ("backward", "grad_local")
"""Phases whose values are those of a loss that is divided afterwards."""


@dataclass(frozen=True)
class _Made:
    """A digest on the device, and what the host knows of it."""

    values: Tensor
    about: dict[str, Any]


class StepPool:
    """Collects the sketches of one step, without a wait for the device.

    Args:
        speaks: no other rank computes with the same samples, or this one counts for them.
    """

    def __init__(self, speaks: bool = True) -> None:
        self._speaks = speaks
        self._made: dict[Key, list[_Made]] = defaultdict(list)
        self._seen: dict[tuple[Any, ...], tuple[StorageWeakRef, _Made, Any]] = {}

    def add(self, key: Key, value: Tensor | Placed, batch: BatchRows | None = None, rows: Rows | None = None) -> None:
        """Add an activation or a gradient of one, of one micro-batch.

        Args:
            key: what it is.
            value: plain or DTensor, or what this rank has of a tensor.
            batch: of the micro-batch.
            rows: from ``batch``, for the shape of the full tensor; None where only an index tells rows apart.
        """
        with unnoticed(_local(value).device):
            placed = value if isinstance(value, Placed) else place(value)
            made = self._of_activation(placed, batch, rows)
        about: dict[str, Any] = {"copy": self._is_copy(placed), "summed": True, "estimated": placed.partial}
        if not placed.first:
            about |= {"count": 0, "shape": (0, *made.about["shape"][1:])}
        self._append(key, made, **about)

    def add_whole(self, key: Key, value: Tensor | Placed, *, summed: bool = False) -> None:
        """Add a parameter, or what belongs to one; ``summed``: what ranks hold adds up."""
        with unnoticed(_local(value).device):
            placed = value if isinstance(value, Placed) else place(value)
            make = lambda: _of_parameter(placed)  # noqa: E731
            # Adding to a DTensor in place leaves the version of its local tensor as it was.
            made = make() if placed.on_mesh else self._remember(placed.local, (tuple(placed.offset or ()),), None, make)
        is_copy = self._is_copy(placed) if summed else placed.copy
        self._append(key, made, copy=is_copy, summed=summed or placed.partial, estimated=placed.partial)

    def alias(self, key: Key, other: Key) -> None:
        """Let ``key`` be what was added last under ``other``."""
        if other in self._made:
            self._made[key].append(self._made[other][-1])

    def drop(self, phase: str) -> None:
        """Forget what was added of a phase."""
        for key in [key for key in self._made if key.phase == phase]:
            del self._made[key]

    def read(self, factor: float = 1.0) -> dict[Key, Sketch]:
        """Return the sketches, in the order in which they came. Waits for the device.

        Args:
            factor: by which the gradients of activations, and local ones of parameters, are to be multiplied.
        """
        made = {id(item.values): item.values for items in self._made.values() for item in items}
        numbers: dict[int, np.ndarray] = {}
        for device in {values.device for values in made.values()}:
            here = [values for values in made.values() if values.device == device]
            table = torch.stack(here).cpu().double().numpy()
            numbers.update(zip(map(id, here), table, strict=True))
        return {
            key: _joined([_sketch(numbers[id(item.values)], item.about) for item in items]).scaled(
                factor if key.phase in SCALED else 1.0
            )
            for key, items in self._made.items()
        }

    def _is_copy(self, placed: Placed) -> bool:
        return placed.copy if placed.on_mesh else not self._speaks

    def _append(self, key: Key, made: _Made, **about: Any) -> None:
        self._made[key].append(_Made(made.values, {**made.about, **about}))

    def _of_activation(self, placed: Placed, batch: BatchRows | None, rows: Rows | None) -> _Made:
        if batch is None or rows is None:
            return self._remember(placed.local, ("index",), None, lambda: _of_index(placed))
        about = (id(rows.table), rows.axes, rows.spread, placed.part)
        return self._remember(placed.local, about, rows, lambda: _of_rows(placed, batch, rows))

    def _remember(self, value: Tensor, about: tuple[Any, ...], keep: Any, make: Any) -> _Made:
        """Make a digest, unless it is of what was digested before: an output is mostly the next module's input."""
        if value.data_ptr() == 0:  # a wrapper, of what a collective is still bringing, say: it is known by no address
            return make()
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value._version, *about)
        found = self._seen.get(key)
        if found is not None and not found[0].expired():
            return found[1]
        made: _Made = make()
        self._seen[key] = (StorageWeakRef(value.untyped_storage()), made, keep)
        return made


def _local(value: Tensor | Placed) -> Tensor:
    return value.local if isinstance(value, Placed) else value


def _of_parameter(placed: Placed) -> _Made:
    about = {"dtype": _name(placed.local.dtype), "shape": placed.shape, "rows": "", "part": placed.part}
    return _Made(digest(placed.local, None, placed.offset), {**about, "count": placed.local.numel()})


def _of_index(placed: Placed) -> _Made:
    about = {"dtype": _name(placed.local.dtype), "shape": placed.shape, "rows": "index", "part": placed.part}
    return _Made(digest(placed.local, None, placed.offset), {**about, "count": placed.local.numel()})


def _of_rows(placed: Placed, batch: BatchRows, rows: Rows) -> _Made:
    """Return the digest of what this rank holds of an activation."""
    value, table, axes = placed.local, rows.table, rows.axes
    if rows.spread is not None:
        sizes = list(value.shape)
        for axis, size in zip(axes, rows.spread, strict=True):
            sizes[axis] = size
        value = value.expand(sizes)
    others = [axis for axis in range(value.ndim) if axis not in axes]
    offset, first = [0] * len(others), True
    if placed.part is not None:
        offset = [placed.part[axis][0] for axis in others]
        first = not any(offset)
        box = [placed.part[axis] for axis in axes]
        full = [placed.shape[axis] for axis in axes]
        if any(size != whole for (_, size), whole in zip(box, full, strict=True)):
            table = table.within(full, box)
    signs, chosen = batch.on_device(table)
    flat = value.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
    if chosen is not None:
        flat = flat.index_select(0, chosen)
    shape = (len(table.chosen) if first else 0, *(placed.shape[axis] for axis in others))
    about = {"dtype": _name(value.dtype), "shape": shape, "rows": rows.kind, "part": placed.part, "count": flat.numel()}
    return _Made(digest(flat, signs, [0, *offset]), about)


def _sketch(numbers: np.ndarray, about: dict[str, Any]) -> Sketch:
    total, square_sum, maximum, minimum, nonfinite = numbers[SIZE:].tolist()
    return Sketch(
        vector=numbers[:SIZE],
        total=total,
        square_sum=square_sum,
        maximum=maximum,
        minimum=minimum,
        nonfinite=int(nonfinite),
        **about,
    )


def _joined(sketches: list[Sketch]) -> Sketch:
    """Return the sketch of all micro-batches, and of all boxes that a rank holds."""
    by_part: dict[Any, Sketch] = {}
    for sketch in sketches:
        by_part[sketch.part] = by_part[sketch.part] + sketch if sketch.part in by_part else sketch
    joined, *others = by_part.values()
    for sketch in others:
        joined = joined + sketch
    return joined


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
