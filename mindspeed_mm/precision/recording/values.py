"""The tensors in what a module takes and returns, under names that do not depend on how it was called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

# How attention and caches are done, which differs between implementations that compute the same.
_MEANS = re.compile(r"mask|past|cache|cu_seq|cu_window|max_seq|max_length|grid_thw|cu_len|interp_")


def named_inputs(
    arguments: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield name, argument and value of each tensor that a ``forward`` was called with, nested ones too.

    An argument's name is its number in the signature, by whichever way it came, or its keyword where it has no number.
    Masks, caches and boundaries of packed samples are left out.

    Args:
        arguments: names in the signature.
        args: given by position.
        kwargs: given by keyword.
    """
    numbers = {name: str(number) for number, name in enumerate(arguments)}
    given = [(str(number), arguments[number] if number < len(arguments) else "") for number in range(len(args))]
    given += [(numbers.get(name, name), name) for name in kwargs]
    for (number, argument), value in zip(given, [*args, *kwargs.values()], strict=True):
        if not _MEANS.search(argument):
            for name, tensor in _walk(value, number):
                yield name, argument, tensor


def named_outputs(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of each tensor in what a ``forward`` returned: ``0`` for a lone one, ``1.0``, ``logits``."""
    yield from (item for item in _walk(output, "0" if isinstance(output, Tensor) else "") if not _MEANS.search(item[0]))


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
