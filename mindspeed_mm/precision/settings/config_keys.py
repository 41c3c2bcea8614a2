"""The settings that matter to numbers, with what each system calls them: the tables ``keys/*.yaml`` as objects.

A line of a table is a canonical key and what is known about it. After the name of a system come its names for the
setting: ``name``, ``name = default``, ``not name`` where the system says the opposite, ``= value`` where the system has
no choice. ``none`` is a value: "switched off". Systems:

* ``ours``, and ``megatron`` whose names ours are: flags without dashes. ``ours`` also has ``model.``, ``data.`` and
  ``fsdp2.`` for our config files.
* ``hf``: ``TrainingArguments``; ``config``: a model's ``config.json``; ``deepspeed``, ``mindspore``, ``torchtitan``:
  paths into their files (``model_config`` is MindSpore Transformers' ``model.model_config``).
* ``environment``: variables of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLES = ("model", "training", "execution")
SYSTEMS = ("ours", "megatron", "hf", "config", "deepspeed", "mindspore", "torchtitan", "environment")
_FOLDER = Path(__file__).parent / "keys"


@dataclass(frozen=True)
class Name:
    """What a system calls a setting.

    Attributes:
        text: the name, empty where the system has no choice.
        inverted: the system says the opposite.
        default: what holds when the name is not there, as text; None where that is not known.
    """

    text: str
    inverted: bool = False
    default: str | None = None


@dataclass(frozen=True)
class Key:
    """A setting.

    Attributes:
        name: ours for it.
        kind: ``number``, ``integer``, ``bool``, ``dtype``, ``choice``, ``text``, ``path``, ``list`` or ``set``.
        check: the sentence of the checklist that it belongs to.
        severity: of a difference: ``error`` changes what is computed, ``warning`` how it is rounded or drawn,
            ``note`` neither.
        names: by system.
        synonyms: values that mean the same, by the word that stands for them.
        unset: values that mean "not given".
        tolerance: up to which numbers are equal, absolute.
        only_derives: not compared itself: others follow from it.
        instead_of: compared only where that key is not known on both sides.
    """

    name: str
    kind: str
    check: str
    severity: str
    names: dict[str, tuple[Name, ...]]
    synonyms: dict[str, str]
    unset: tuple[Any, ...]
    tolerance: float
    only_derives: bool
    instead_of: str | None


@cache
def keys() -> dict[str, Key]:
    """Return all settings by name, in the order of the tables."""
    sentences = _read("checklist")
    return {name: _key(name, line, sentences) for table in TABLES for name, line in _read(table).items()}


@cache
def names_of(system: str) -> dict[str, list[tuple[Key, Name]]]:
    """Return the settings that each name of a system stands for."""
    found: dict[str, list[tuple[Key, Name]]] = {}
    for key in keys().values():
        for name in key.names.get(system, ()):
            if name.text:
                found.setdefault(name.text, []).append((key, name))
    return found


def _read(table: str) -> dict[str, Any]:
    return dict(yaml.safe_load((_FOLDER / f"{table}.yaml").read_text(encoding="utf-8")))


def _key(name: str, line: dict[str, Any], sentences: dict[str, str]) -> Key:
    synonyms = {str(word).lower(): main for main, words in line.get("synonyms", {}).items() for word in words}
    return Key(
        name=name,
        kind=line["kind"],
        check=sentences[line["check"]],
        severity=line.get("severity", "error"),
        names={system: tuple(_names(line[system])) for system in SYSTEMS if system in line},
        synonyms=synonyms,
        unset=tuple(line.get("unset", ())),
        tolerance=float(line.get("tolerance", 0.0)),
        only_derives=line.get("only_derives", False),
        instead_of=line.get("instead_of"),
    )


def _names(said: str | list[str]) -> Iterator[Name]:
    for text in [said] if isinstance(said, str) else said:
        name, equals, default = text.partition("=")
        name = name.strip()
        yield Name(name.removeprefix("not "), name.startswith("not "), default.strip() if equals else None)
