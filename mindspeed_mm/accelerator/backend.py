"""The collective library that goes with the device."""

from __future__ import annotations

import torch.distributed as dist

from mindspeed_mm.accelerator.hardware import device_type

_OWN_BACKEND = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def default_backend() -> str:
    """Return the backend string for ``init_process_group`` on this device.

    With an accelerator there are two: its own library for device tensors and gloo for CPU tensors, which
    carries control messages and offloaded parameters.
    """
    kind = device_type()
    own = _OWN_BACKEND[kind]
    return own if kind == "cpu" else f"cpu:gloo,{kind}:{own}"


def resolve_backend(requested: str | None) -> tuple[str, str | None]:
    """Choose the backend for a ``--distributed-backend`` value.

    Args:
        requested: what the user passed, None when the flag was left out.

    Returns:
        The backend string, and a warning when the machine lacks what was asked for and something else is used.
    """
    if requested is None:
        return default_backend(), None
    kind = device_type()
    usable = {"gloo"} if kind == "cpu" else {"gloo", _OWN_BACKEND[kind]}
    if kind == "npu":
        usable.add("nccl")  # published NPU scripts say nccl and mean the library of the device
    if dist.is_mpi_available():
        usable.add("mpi")
    names = {part.split(":")[-1] for part in requested.split(",")}
    if names <= usable:
        plain = requested if names <= {"gloo", "mpi"} and ":" not in requested else default_backend()
        return plain, None
    return default_backend(), (
        f"--distributed-backend {requested}: this machine has no {', '.join(sorted(names - usable))}; "
        f"using {default_backend()} for device type {kind}."
    )
