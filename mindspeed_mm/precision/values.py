"""The tensors in what a module takes and returns, under names that do not depend on how it was called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def named_values(value: Any) -> dict[str, Tensor]:
    """Return the tensors in nested tuples, lists, mappings and dataclasses by dotted names: ``0``, ``1.0``, ``logits``.

    A lone tensor is ``0``. A mapping's tensors are named by their keys; that of :class:`torch.nn.Module` keyword
    arguments at the end of a tuple therefore as well.
    """
    if isinstance(value, Tensor):
        return {"0": value}
    return dict(_walk(value, ""))


def _walk(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
        return
    items: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    for name, item in items:
        yield from _walk(item, f"{prefix}.{name}" if prefix else name)
