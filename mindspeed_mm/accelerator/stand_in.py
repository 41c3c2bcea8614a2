"""A module that stands in for another in the namespace of code that is not ours."""

from __future__ import annotations

from types import ModuleType
from typing import Any


class StandIn(ModuleType):
    """Has some names of its own, and for the rest those of ``other``, whatever they are at that moment."""

    def __init__(self, other: ModuleType, **own: Any) -> None:
        super().__init__(other.__name__)
        self.__dict__.update(own, _other=other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_other"], name)
