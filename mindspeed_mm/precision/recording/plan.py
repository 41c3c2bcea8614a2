"""What ``--precision-capture`` asks for."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_mm.errors import UserError, did_you_mean

_KEYS = ("steps", "level", "tensors")
_LEVELS = ("module", "parameter")


@dataclass(frozen=True)
class CapturePlan:
    """Which steps to record, and what of them.

    Attributes:
        steps: iterations done before each, 0 is the first of a run.
        modules: record what modules take and return; otherwise only parameters, their gradients and the optimizer.
        tensors: patterns of modules and parameters whose tensors are kept as they are.
    """

    steps: frozenset[int]
    modules: bool = True
    tensors: tuple[str, ...] = ()


def read_plan(text: str) -> CapturePlan:
    """Read ``steps=0-1,5,level=module,tensors=*.layers.0.*``: keys with one or more values each.

    Raises:
        UserError: names the flag and what is wrong with it.
    """
    values: dict[str, list[str]] = {}
    key = ""
    for item in text.split(","):
        name, equals, value = item.partition("=")
        if equals:
            key = name.strip()
            if key not in _KEYS:
                raise _wrong(text, f"'{key}' is not known.{did_you_mean(key, _KEYS)} Use {', '.join(_KEYS)}")
            values[key] = []
        elif not key:
            raise _wrong(text, f"'{item}' has no key; write steps=0-1")
        values[key].append((value if equals else item).strip())
    levels = values.get("level", ["module"])
    if len(levels) != 1 or levels[0] not in _LEVELS:
        raise _wrong(text, f"level={','.join(levels)} is not one of {', '.join(_LEVELS)}")
    steps = [step for part in values.get("steps", ["0-1"]) for step in _range(text, part)]
    return CapturePlan(frozenset(steps), levels[0] == "module", tuple(filter(None, values.get("tensors", []))))


def _range(text: str, part: str) -> range:
    first, dash, last = part.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
        raise _wrong(text, f"steps={part} is no number or range of steps; the first step is 0: steps=0-1")
    return range(int(first), int(last or first) + 1)


def _wrong(text: str, why: str) -> UserError:
    return UserError(f"command line: --precision-capture {text}: {why}.")
