"""Precision alignment: what a run computes is written down, so that two runs can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mindspeed_mm.precision.recording.recorder import Recorder as Recorder


def __getattr__(name: str) -> Any:
    if name == "Recorder":
        from mindspeed_mm.precision.recording.recorder import Recorder

        return Recorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
