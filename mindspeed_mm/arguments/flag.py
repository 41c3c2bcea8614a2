"""How one command-line flag is declared: name, kind, default, help, and what it does on each road.

A flag is declared in one place, in ``groups/``. Everything else is derived from the declaration: the parser, the
grouped ``--help``, the refusals of :func:`validate_args`, the start-up lines about flags without effect, and the
reference table of the documentation. So no flag can be accepted silently.

There are two roads: ``"fsdp2"`` (``--use-torch-fsdp2``) and ``"megatron"``. On each of them a flag is effective,
:class:`Inert` (accepted and reported; only for flags that change speed or describe what the model configuration
already says) or :class:`Refused` (an error, because the run would not compute what the flag asks for).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.errors import did_you_mean

ROADS = ("fsdp2", "megatron")


@dataclass(frozen=True)
class Inert:
    """The flag is accepted but nothing reads it on this road, for this reason."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """Any value other than the default (or one of ``allowed``) is an error; ``fix`` says why and what to do."""

    fix: str
    allowed: tuple[Any, ...] = ()


Kind = dict[str, Any]
"""The keyword arguments of ``add_argument`` that say how the flag's text becomes a value."""

SWITCH: Kind = {"action": "store_true"}
SWITCH_OFF: Kind = {"action": "store_false"}
ON_OFF: Kind = {"action": argparse.BooleanOptionalAction}


def parse_bool(text: str) -> bool:
    """Read ``true/false``, ``1/0``, ``yes/no`` or ``on/off``; ``bool("false")`` would be True."""
    word = text.lower()
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false; write one of the two")


BOOLEAN: Kind = {"type": parse_bool, "metavar": "{true,false}"}
TEXT: Kind = {"metavar": "TEXT"}
PATH: Kind = {"metavar": "PATH"}
TEXTS: Kind = {"nargs": "+", "metavar": "TEXT"}
REPEATED: Kind = {"action": "append", "metavar": "TEXT"}


def integer(minimum: int | None = None) -> Kind:
    """A whole number, at least ``minimum``."""
    return {"type": _number(int, "a whole number", minimum, None), "metavar": "N"}


def real(minimum: float | None = None, maximum: float | None = None, below: float | None = None) -> Kind:
    """A finite number within the given bounds; ``minimum`` and ``maximum`` are included, ``below`` is not."""
    return {"type": _number(float, "a number", minimum, maximum, below), "metavar": "X"}


def one_of(*names: str) -> Kind:
    """One of the given words."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"'{text}' is not a choice; use one of {', '.join(names)}.{did_you_mean(text, names)}"
            )
        return text

    return {"type": parse, "metavar": "{" + ",".join(names) + "}"}


def _number(
    convert: Callable[[str], Any], noun: str, minimum: Any, maximum: Any, below: Any = None
) -> Callable[[str], Any]:
    limits = (("at least", minimum), ("at most", maximum), ("below", below))
    bounds = [f"{word} {bound}" for word, bound in limits if bound is not None]
    wanted = f"{noun} {' and '.join(bounds)}".strip()

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {noun}; give {wanted}") from None
        too_low = minimum is not None and value < minimum
        too_high = (maximum is not None and value > maximum) or (below is not None and value >= below)
        if too_low or too_high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range; give {wanted}")
        return value

    return parse


@dataclass(frozen=True)
class Flag:
    """One flag of the command line.

    Attributes:
        name: The documented spelling, with its dashes. Every flag also accepts ``_`` for ``-`` and back.
        kind: How its text becomes a value: ``SWITCH``, ``integer(1)``, ``one_of(...)``, ...
        default: The value when it is not passed.
        help: One sentence for ``--help``; the default is appended.
        fsdp2: ``None`` if the FSDP2 road uses it, else why not.
        megatron: The same for the Megatron road.
        needs: Another flag, or a flag and its value, without which this one is not read: ``"--optimizer muon"``;
            ``" or "`` joins alternatives.
        dest: Attribute name in the namespace if it is not the name with underscores.
        aliases: Further spellings.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    fsdp2: Inert | Refused | None = None
    megatron: Inert | Refused | None = None
    needs: str | None = None
    dest: str = ""
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.dest:
            object.__setattr__(self, "dest", self.name.removeprefix("--").replace("-", "_"))

    @property
    def has_plain_default(self) -> bool:
        """Whether leaving the flag out means "off" or "not given", which needs no words."""
        return self.default in (None, "", []) or self.default is False or self.kind is SWITCH_OFF

    def status(self, road: str) -> Inert | Refused | None:
        """Return what the flag does on ``road``; ``None`` means that it takes effect."""
        return {"fsdp2": self.fsdp2, "megatron": self.megatron}[road]

    def shown(self, value: Any) -> str:
        """Return the flag as the user would have typed it, for messages."""
        if isinstance(value, bool) or value is None:
            return self.name
        return f"{self.name} {' '.join(map(str, value)) if isinstance(value, list) else value}"

    def add_to(self, group: argparse._ActionsContainer) -> None:
        """Declare the flag to argparse."""
        default = list(self.default) if isinstance(self.default, list) else self.default
        action = group.add_argument(self.name, *self.aliases, dest=self.dest, default=default, **self.kind)
        parts = [self.help]
        if not self.has_plain_default:
            parts.append(f"(default: {self.default})")
        if isinstance(self.fsdp2, Inert):
            parts.append(f"[no effect with FSDP2: {self.fsdp2.reason}]")
        elif isinstance(self.fsdp2, Refused):
            left = [str(value) for value in (self.default, *self.fsdp2.allowed) if value]
            parts.append(f"[with FSDP2 only {' or '.join(left)}]" if left else "[not with FSDP2]")
        action.help = " ".join(parts).replace("%", "%%")


@dataclass(frozen=True)
class Group:
    """Flags that belong together, under one heading of ``--help``."""

    title: str
    flags: tuple[Flag, ...]
