"""Importing megatron-core."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mindspeed_mm.accelerator.hardware import device_type, is_cpu


def load_megatron_core() -> None:
    """Import ``megatron.core``; call this before the first ``from megatron.core import ...``."""
    if "megatron.core" in sys.modules:
        return
    # It tells several times, 0.12 in modules imported later, that it falls back to torch, which is what we want
    # without its extras.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    with _without_compile():
        import megatron.core  # noqa: F401, RUF100


def prepare_megatron_layers() -> str:
    """Make megatron-core's layers run on this device; call this before a model of them is built.

    Returns:
        What is used, for the log.
    """
    load_megatron_core()
    # Its own words about what it falls back to, once for each config and each model.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # Newer releases of torch have other names for two collectives that it calls.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".torch\.distributed\.\w+. is deprecated")
    version = sys.modules["megatron.core"].__version__
    if is_cpu():
        with _without_compile():
            importlib.import_module("mindspeed_mm.accelerator.megatron_cpu").answer_for_cuda()
        return f"megatron-core {version} on the CPU: local layers"
    if device_type() == "npu" and importlib.util.find_spec("mindspeed") is not None:
        importlib.import_module("mindspeed.megatron_adaptor")
        return f"megatron-core {version} with MindSpeed: layers as MindSpeed patches them"
    layers = "TransformerEngine's" if has_transformer_engine() else "local"
    return f"megatron-core {version} on {device_type()}: {layers} layers"


def has_transformer_engine() -> bool:
    """Return whether TransformerEngine's layers can be used: it is installed, and made for this device."""
    return device_type() == "cuda" and importlib.util.find_spec("transformer_engine") is not None


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
