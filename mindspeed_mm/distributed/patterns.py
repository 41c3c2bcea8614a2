"""Module path patterns: the syntax of every ``*_modules`` list in ``fsdp2_config.yaml``.

A pattern is a dotted module path in which any component may hold one brace group::

    model.layers.{*}             every child of model.layers
    model.layers.{0-23}          children 0 to 23, both included
    model.layers.{1,3,5}         these three
    model.layers.{0-20,25}.mlp   a mix, with text after the brace
    stages.{*}.blocks.{0,1}      several groups in one path
    encoder.layer{1-4}           text around the group
    ""                           the model itself
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from mindspeed_mm.errors import UserError

_COMPONENT = re.compile(r"^(?P<before>[^{}]*)(?:\{(?P<body>[^{}]*)\}(?P<after>[^{}]*))?$")
_RANGE = re.compile(r"^(\d+)-(\d+)$")
_SYNTAX = "write {*}, {0-23}, {1,3,5} or a mix such as {0-20,25}"


def resolve(model: nn.Module, pattern: str, *, parameters: bool = False) -> list[tuple[str, Any]]:
    """Return the ``(path, module)`` pairs that ``pattern`` names, in the order of the pattern.

    A number written out in braces must exist in its container. Text after the braces may be absent from some of
    the children (``layers.{*}.mlp.experts`` in a model whose first layers are dense), but not from all of them.
    With ``parameters`` the last component may also name parameters.

    Raises:
        UserError: malformed braces, a number that is out of range, or no module at all. The message lists the
            nearest paths that do exist.
    """
    if pattern == "":
        return [("", model)]
    found: list[tuple[str, Any]] = [("", model)]
    components = pattern.split(".")
    for i, component in enumerate(components, 1):
        names = _parse(pattern, component)
        found = [
            (f"{path}.{name}" if path else name, child)
            for path, module in found
            for name, child in _children(pattern, path, module, names, parameters and i == len(components))
        ]
    if not found:
        what = "module and no parameter" if parameters else "module"
        raise UserError(f"'{pattern}' matches no {what}. {_nearest(model, pattern, parameters)}")
    return found


def resolve_all(model: nn.Module, patterns: Iterable[str] | None, key: str) -> dict[str, nn.Module]:
    """Resolve a whole list and return ``{path: module}`` without repeats, in the order of the list.

    Args:
        model: the module that the paths start from.
        patterns: the value of the yaml key, ``None`` counts as empty.
        key: name of that key, for the message.

    Raises:
        UserError: as ``resolve``, with the key in front.
    """
    found: dict[str, nn.Module] = {}
    for pattern in patterns or ():
        try:
            matches = resolve(model, pattern)
        except UserError as error:
            raise UserError(f"fsdp2 config, {key}: {error}") from None
        for path, module in matches:
            if not any(module is known for known in found.values()):
                found[path] = module
    return found


def summarise(paths: Iterable[str]) -> dict[str, list[str]]:
    """Group paths that differ only in numbers: ``{"model.layers.{0-27}": [28 paths]}``.

    A group with several numbers in the path is written with ``{*}`` for each of them.
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        template = ".".join("{*}" if part.isdigit() else part for part in path.split("."))
        groups.setdefault(template, []).append(path)
    return {_compress(template, members): members for template, members in groups.items()}


def parse_numbers(pattern: str, body: str) -> Iterator[int]:
    """Yield the numbers that ``body``, the text between the braces of ``pattern``, stands for."""
    for item in (part.strip() for part in body.split(",")):
        span = _RANGE.match(item)
        if span and int(span[1]) <= int(span[2]):
            yield from range(int(span[1]), int(span[2]) + 1)
        elif item.isdigit():
            yield int(item)
        else:
            raise UserError(f"'{pattern}': '{item}' in '{{{body}}}' is no number and no range; {_SYNTAX}.")


def _parse(pattern: str, component: str) -> re.Pattern[str] | list[str]:
    """Return the wanted child names, or an expression for them when the component holds ``{*}``."""
    match = _COMPONENT.match(component)
    if match is None or component == "":
        raise UserError(f"'{pattern}' is not a module path: '{component}' is malformed; {_SYNTAX}.")
    before, body, after = match["before"], match["body"], match["after"]
    if body is None:
        return [before]
    if body.strip() == "*":
        return re.compile(rf"{re.escape(before)}.+{re.escape(after)}")
    return [f"{before}{number}{after}" for number in parse_numbers(pattern, body)]


def _children(
    pattern: str, path: str, module: nn.Module, names: re.Pattern[str] | list[str], parameters: bool
) -> Iterator[tuple[str, Any]]:
    # `named_children` would drop a module registered twice, and with it a path that the user sees.
    everything: dict[str, Any] = {**module._modules, **(module._parameters if parameters else {})}
    children = {name: child for name, child in everything.items() if child is not None}
    if isinstance(names, re.Pattern):
        yield from ((name, child) for name, child in children.items() if names.fullmatch(name))
        return
    missing = [name for name in names if name not in children]
    if missing and len(missing) < len(names):
        raise UserError(
            f"'{pattern}': '{path}' has no {', '.join(missing)}; it has {len(children)} children, "
            f"{next(iter(children))} to {next(reversed(children))}."
        )
    yield from ((name, children[name]) for name in names if name in children)


def _nearest(model: nn.Module, pattern: str, parameters: bool) -> str:
    names = [name for name, _ in model.named_modules() if name]
    if parameters:
        names += [name for name, _ in model.named_parameters()]
    real = summarise(names)
    close = difflib.get_close_matches(re.sub(r"\{[^}]*\}", "{*}", pattern), real, n=4, cutoff=0.5)
    if not close:
        close = [path for path in real if "." not in path][:12]
    return f"Nearest paths in {type(model).__name__}: {', '.join(close) or '(it has no submodules)'}."


def _compress(template: str, paths: list[str]) -> str:
    if template.count("{*}") != 1 or len(paths) < 2:
        return template if len(paths) > 1 else paths[0]
    position = template.split(".").index("{*}")
    numbers = sorted(int(path.split(".")[position]) for path in paths)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    body = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return template.replace("{*}", f"{{{body}}}")
