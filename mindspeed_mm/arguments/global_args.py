"""The parsed command line for user scripts. Inside the package nothing below ``training/`` reads it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from argparse import Namespace

from mindspeed_mm.errors import UserError

_args: Namespace | None = None


def get_args() -> Namespace:
    """Return the arguments of this run.

    Raises:
        UserError: Before ``pretrain`` has parsed the command line.
    """
    if _args is None:
        raise UserError(
            "get_args() was called before pretrain() parsed the command line; call it inside one of the callbacks"
        )
    return _args


def set_args(args: Namespace) -> None:
    """Make ``args`` what :func:`get_args` returns, here and in a ``megatron.training`` of the user's checkout."""
    global _args
    _args = args
    if _has_megatron_training():
        try:
            importlib.import_module("megatron.training.global_vars")._GLOBAL_ARGS = args  # type: ignore[attr-defined]
        except ImportError:
            return  # a checkout that cannot be imported has no get_args() to serve


def _has_megatron_training() -> bool:
    if "megatron.training" in sys.modules:
        return True
    try:
        return importlib.util.find_spec("megatron.training") is not None
    except (ImportError, ValueError):
        return False
