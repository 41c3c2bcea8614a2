"""Switches of the device that change numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mindspeed_mm.accelerator.hardware import _module, device_type, is_cpu

# What the libraries of a device read once, at their first use.
_VARIABLES: dict[str, dict[str, str]] = {
    "cpu": {},
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    "npu": {
        "HCCL_DETERMINISTIC": "true",
        "LCCL_DETERMINISTIC": "1",
        "CLOSE_MATMUL_K_SHIFT": "1",
        "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
    },
}
_STOPS = "an operator without a deterministic kernel stops the run, with its name, when it is used"
# What no switch makes repeatable, and what a repetition has to keep as it was.
_LIMITS: dict[str, list[str]] = {
    "cpu": ["matrix products depend on the number of threads: keep OMP_NUM_THREADS and the kind of CPU"],
    "cuda": [
        _STOPS,
        "NCCL's sums depend on topology, version and algorithm: keep the machines, NCCL and its NCCL_* variables",
    ],
    "npu": [_STOPS, "custom operators outside torch are not checked", "keep the CANN version and the machines"],
}


def use_deterministic_algorithms() -> None:
    """Choose deterministic kernels and collectives.

    Call this before the device and its libraries are first used: they read their variables once.
    """
    for name, value in _VARIABLES[device_type()].items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def determinism_limits() -> list[str]:
    """Return what :func:`use_deterministic_algorithms` cannot do here, a line each; call it before that function."""
    device = device_type()
    lines = list(_LIMITS[device])
    started = not is_cpu() and _module().is_initialized()
    for name, value in _VARIABLES[device].items():
        found = os.environ.get(name)
        if found is None and started:
            lines.append(f"the device was in use before {name} could be set: export {name}={value} before the start")
        elif found is not None and found.lower() != value:
            lines.append(f"{name}={found} in the environment stays as it is; {value} is the deterministic value")
    if sys.flags.hash_randomization and os.environ.get("PYTHONHASHSEED", "random") == "random":
        lines.append(
            "the order of Python sets of strings, in code of your own, changes from run to run: "
            "export PYTHONHASHSEED=0 before the start, it cannot be set later"
        )
    return lines


def allow_tf32() -> None:
    """Let float32 matrix products round their inputs to 10 bits of mantissa where that is faster."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 matrix products in float32, whatever :func:`allow_tf32` has allowed."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
