"""Values of settings as they are meant: ``1e-4`` is ``0.0001``, ``bf16`` is ``torch.bfloat16``."""

from __future__ import annotations

import math
from typing import Any

from mindspeed_mm.precision.settings.config_keys import Key

_NONE = ("none", "null", "nil", "")
_TRUE = ("true", "yes", "on", "1", "infnan_mode")
_FALSE = ("false", "no", "off", "0")
_DTYPES = {
    "float32": ("fp32", "float", "single"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "half"),
    "float64": ("fp64", "double"),
}
_ROUNDING = 1e-7  # relative; what a number loses when it goes through float32


def read_value(key: Key, raw: Any) -> Any:
    """Return what ``raw`` means for a setting: a number, a truth value, a word, a tuple; None for "none".

    Text that is not of the key's kind stays text: it equals only itself.
    """
    word = str(raw).strip().strip("\"'")
    if raw is None or word.lower() in _NONE or any(_number(raw) == unset for unset in key.unset):
        return None
    if key.kind in ("list", "set"):
        return _several(raw, ordered=key.kind == "list")
    lower = word.lower()
    if key.kind == "bool":
        return True if lower in _TRUE else False if lower in _FALSE else word
    if key.kind in ("number", "integer"):
        number = _number(raw)
        return word if number is None else number
    if key.kind == "dtype":
        lower = lower.rpartition(".")[2]
        return next((name for name, others in _DTYPES.items() if lower == name or lower in others), lower)
    if key.kind == "choice":
        lower = lower.rpartition(".")[2] if not _number(lower) else lower  # names of enumerations
        chosen = key.synonyms.get(lower) or key.synonyms.get(lower.replace("-", "_")) or lower.replace("-", "_")
        return None if chosen in _NONE else chosen
    if key.kind == "path":
        return word.rstrip("/").rpartition("/")[2]
    return word


def equal(key: Key, a: Any, b: Any) -> bool:
    """Return whether two read values mean the same."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=key.tolerance)
    if a is None or b is None:
        off = a if b is None else b
        return off is None or off is False or off == () or (off == 0 and key.kind in ("number", "integer"))
    return bool(a == b)


def shown(value: Any) -> str:
    """Return a read value for people."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"
    if isinstance(value, tuple):
        return " ".join(shown(part) for part in value) or "none"
    return {None: "none", True: "true", False: "false"}.get(value, str(value))


def _number(raw: Any) -> float | None:
    if isinstance(raw, bool):
        return None
    try:
        return float(raw)
    except (TypeError, ValueError):
        return None


def _several(raw: Any, ordered: bool) -> tuple[Any, ...]:
    parts = raw if isinstance(raw, (list, tuple, set, frozenset)) else str(raw).strip("[]()").replace(",", " ").split()
    values = [number if (number := _number(part)) is not None else str(part).strip("\"'") for part in parts]
    if not ordered:
        return tuple(sorted(set(values), key=str))
    return tuple(values[:1]) if len({str(value) for value in values}) == 1 else tuple(values)
