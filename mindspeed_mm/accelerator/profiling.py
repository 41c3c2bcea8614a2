"""What the device can tell a profiler."""

from __future__ import annotations

from torch.profiler import ProfilerActivity

from mindspeed_mm.accelerator.hardware import _module, device_type


def profiler_activities(with_cpu: bool = True) -> list[ProfilerActivity]:
    """Return the activities ``torch.profiler`` records on this device."""
    activities = [ProfilerActivity.CPU] if with_cpu or device_type() == "cpu" else []
    own = {"cuda": "CUDA", "npu": "PrivateUse1"}.get(device_type())
    return activities + ([getattr(ProfilerActivity, own)] if own else [])


def memory_history(enable: bool, max_entries: int | None = None, stacks: str = "all") -> bool:
    """Start or stop recording allocations. Return False when the device keeps no such history (CPU)."""
    memory = getattr(_module(), "memory", None)
    record = getattr(memory, "_record_memory_history", None)
    if record is None:
        return False
    if enable:
        record(stacks=stacks, **({} if max_entries is None else {"max_entries": max_entries}))
    else:
        record(enabled=None)
    return True


def memory_snapshot(path: str) -> None:
    """Write the recorded allocations to ``path``, for pytorch.org/memory_viz."""
    _module().memory._dump_snapshot(path)
