"""Packages that only some users need: imported when asked for, and named when missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from mindspeed_mm.errors import UserError


def import_extra(module: str, extra: str, asked_by: str) -> ModuleType:
    """Import ``module``, which installing ``mindspeed-mm[<extra>]`` brings.

    Args:
        module: dotted name.
        extra: name of the optional dependencies in pyproject.toml.
        asked_by: the flag or setting that needs the package, for the message.

    Raises:
        UserError: the package is missing or does not import.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"{asked_by} needs a package that cannot be imported ({error}); "
            f"run: pip install 'mindspeed-mm[{extra}]', or leave {asked_by} out."
        ) from error
