"""Importing megatron-core."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mindspeed_mm.accelerator.hardware import is_cpu


def load_megatron_core() -> None:
    """Import ``megatron.core``; call this before the first ``from megatron.core import ...``."""
    if "megatron.core" in sys.modules:
        return
    # It tells several times, 0.12 in modules imported later, that it falls back to torch, which is what we want
    # without its extras.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    with _without_compile():
        import megatron.core  # noqa: F401, RUF100


@contextmanager
def _without_compile() -> Iterator[None]:
    """Make ``torch.compile`` the identity on a CPU.

    ``megatron/core/jit.py`` compiles a dozen small functions while it is imported. That loads Dynamo and
    Inductor, about two seconds, for kernels that would then need a C++ compiler at run time.
    """
    if not is_cpu():
        yield
        return

    def identity(model: Callable[..., Any] | None = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    original, torch.compile = torch.compile, identity
    try:
        yield
    finally:
        torch.compile = original
