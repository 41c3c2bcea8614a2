"""The device of this process: its type, its index and its memory."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import sys
from functools import cache
from types import ModuleType

import torch

from mindspeed_mm.accelerator.host_memory import keep_freed_memory
from mindspeed_mm.errors import UserError, did_you_mean

DEVICE_TYPES = ("cpu", "cuda", "npu")

# Dense peak of one device, FLOP/s, from the vendors' data sheets: {name fragment: {dtype: peak}}. A device that
# is not listed has no peak, and the model FLOPs utilisation is then reported as not available, never guessed.
_PEAK_FLOPS: dict[str, dict[torch.dtype, float]] = {
    "H200": {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float16: 756e12, torch.float32: 51e12},
    "H100": {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
    "A100": {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12},
}


@cache
def device_type() -> str:
    """Return ``"npu"``, ``"cuda"`` or ``"cpu"``: the accelerator of this machine, or the CPU when it has none.

    ``MINDSPEED_MM_DEVICE`` overrides the choice, for example to run on the CPU of a machine with GPUs.

    Raises:
        UserError: the variable names a device type that is not known or that this machine lacks.
    """
    if importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")  # registers the npu device type with torch
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator.type if accelerator is not None else "cpu"
    wanted = os.environ.get("MINDSPEED_MM_DEVICE", found)
    if wanted not in DEVICE_TYPES:
        raise UserError(
            f"MINDSPEED_MM_DEVICE: '{wanted}' is not a device type.{did_you_mean(wanted, DEVICE_TYPES)} "
            f"Use one of {', '.join(DEVICE_TYPES)}."
        )
    if wanted not in ("cpu", found):
        raise UserError(f"MINDSPEED_MM_DEVICE: '{wanted}' was asked for, but this machine has '{found}'.")
    return wanted


def is_cpu() -> bool:
    """Return whether this process trains on the CPU."""
    return device_type() == "cpu"


def _module() -> ModuleType:
    """Return ``torch.cuda``, ``torch.npu`` or ``torch.cpu``, which share the functions used here."""
    return torch.get_device_module(device_type())


def device_count() -> int:
    """Return the number of accelerators of this host, 0 on a CPU-only host."""
    return 0 if is_cpu() else int(_module().device_count())


def device_name() -> str:
    """Return what the device calls itself, and the processor's kind on a CPU-only host."""
    return platform.processor() or platform.machine() if is_cpu() else str(_module().get_device_name())


def has_float64() -> bool:
    """Return whether the device computes in float64; the NPU does not."""
    return device_type() != "npu"


def set_device(local_rank: int) -> None:
    """Bind this process to the accelerator with index ``local_rank``; on a CPU let it keep memory between steps.

    Raises:
        UserError: the host has fewer accelerators than that.
    """
    if is_cpu():
        keep_freed_memory()
        return
    if local_rank >= device_count():
        raise UserError(
            f"--nproc_per_node: local rank {local_rank} has no device, this host has {device_count()} "
            f"of type {device_type()}. Start at most {device_count()} processes on it."
        )
    _module().set_device(local_rank)


def device() -> torch.device:
    """Return the device this process was bound to by :func:`set_device`."""
    return torch.device("cpu") if is_cpu() else torch.device(device_type(), _module().current_device())


def synchronize() -> None:
    """Wait until the device has finished what was queued."""
    if not is_cpu():
        _module().synchronize()


def empty_cache() -> None:
    """Return cached, unused device memory to the driver."""
    if not is_cpu():
        _module().empty_cache()


def memory_stats() -> dict[str, int]:
    """Return ``allocated``, ``max_allocated``, ``reserved`` and ``max_reserved`` in bytes.

    On a CPU there is no allocator to ask: the resident set of the process stands for all four.
    """
    if is_cpu():
        # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        now = _resident_bytes() or peak
        return {"allocated": now, "max_allocated": peak, "reserved": now, "max_reserved": peak}
    module = _module()
    return {
        "allocated": module.memory_allocated(),
        "max_allocated": module.max_memory_allocated(),
        "reserved": module.memory_reserved(),
        "max_reserved": module.max_memory_reserved(),
    }


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return None


def peak_flops(dtype: torch.dtype) -> float | None:
    """Return the dense peak of this device in FLOP/s for ``dtype``, None when it is not known."""
    if is_cpu():
        return None
    name = _module().get_device_name()
    return next((peaks.get(dtype) for fragment, peaks in _PEAK_FLOPS.items() if fragment in name), None)


def has_fused_optimizers() -> bool:
    """Return whether torch has optimizer steps for this device that are one kernel."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices  # what AdamW(fused=True) asks

    return device_type() in _get_fused_kernels_supported_devices()


def wants_pinned_memory() -> bool:
    """Return whether copies to this device are faster from page-locked host memory."""
    return not is_cpu()
