"""Say what is wrong with a config in the words of the file, not of the validator."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from mindspeed_mm.errors import did_you_mean

if TYPE_CHECKING:
    from mindspeed_mm.configs.base import Config

_TYPE_WORDS = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}


def describe_problems(cls: type[Config], error: ValidationError) -> list[str]:
    """Return a line for each problem: ``key.path: what is wrong; what was found``, and what to do where known.

    The members of a union fail one by one at the same key; they share a line: ``must be a whole number or must be
    'auto'``.
    """
    whats: dict[str, list[str]] = {}
    ends: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path, what, end = _describe(cls, item)
        whats.setdefault(path, []).append(what)
        ends[path] = end if len(end) >= len(ends.get(path, "")) else ends[path]
    lines = [(path, " or ".join(dict.fromkeys(parts)) + ends[path]) for path, parts in whats.items()]
    return [f"{path}: {line}" if path else line for path, line in lines]


def _describe(cls: type[Config], item: Any) -> tuple[str, str, str]:
    """Return the key path, what is wrong there, and what follows it: the value found, a suggestion."""
    kind, context, value = item["type"], item.get("ctx", {}), item["input"]
    if kind == "extra_forbidden":
        *parents, key = item["loc"]
        path, owner = _locate(cls, parents)
        return _join(path, key), *_unknown_key(owner[0], str(key))
    path, _ = _locate(cls, item["loc"])
    if kind == "missing":
        return path, "is required", "."
    if kind.startswith("union_tag"):  # the key that says which kind of object this is
        key = context["discriminator"].strip("'")
        if kind == "union_tag_not_found":
            return _join(path, key), "is required", "."
        choices, value = context["expected_tags"], context["tag"]
        return _join(path, key), f"must be one of {choices} in this version", f"; {_found(value, choices)}"
    if kind == "value_error":
        return path, str(context["error"]), ""
    what = _TYPE_WORDS.get(kind, item["msg"].replace("Input should be", "must be"))
    return path, what, f"; {_found(value, context.get('expected', ''))}"


def _unknown_key(owner: type[Config], key: str) -> tuple[str, str]:
    if key in owner.retired:
        return owner.retired[key], ""
    hint = did_you_mean(key, owner.model_fields)
    advice = hint or f" Remove it; the keys that exist are the fields of {owner.__module__}.{owner.__name__}."
    return "unknown key.", advice + owner.unknown_key_advice


def _found(value: Any, choices: str) -> str:
    """Say what was found, and which of the quoted ``choices`` was probably meant."""
    if isinstance(value, dict | list):
        return f"found {'an object' if isinstance(value, dict) else 'a list'}."
    shown = json.dumps(value, default=str)
    hint = did_you_mean(value, re.findall(r"'([^']*)'", choices)) if isinstance(value, str) else ""
    return f"found {shown}.{hint}"


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _locate(cls: type[Config], location: Any) -> tuple[str, list[type[Config]]]:
    """Follow a pydantic location through the fields of ``cls``.

    Pydantic also puts the member of a union into the location; the file has no such key, so it is left out.

    Returns:
        The path as a user writes it, and the classes that may sit there (one, once a union is told apart).
    """
    path, here = "", [cls]
    for part in location:
        holder = next((c for c in here if part in c.model_fields), None)
        if isinstance(part, int):
            path += f"[{part}]"
        elif holder is not None:
            path, here = _join(path, part), _configs_in(holder.model_fields[part].annotation)
        else:
            here = [c for c in here if _is_member(c, part)] or here
    return path, here


def _is_member(cls: type[Config], member: str) -> bool:
    """Tell whether pydantic calls ``cls`` by this name: its own, or the literal that selects it."""
    return member == cls.__name__ or any(member in get_args(field.annotation) for field in cls.model_fields.values())


def _configs_in(annotation: Any) -> list[type[Any]]:
    arguments = get_args(annotation)
    if arguments:
        return [cls for argument in arguments for cls in _configs_in(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
