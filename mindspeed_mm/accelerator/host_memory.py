"""How the C library deals with memory that a step frees and the next one needs again."""

from __future__ import annotations

import ctypes
import os

_VARIABLES = frozenset({"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"})
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc's, on 64 bits
_LARGEST_TRIM_THRESHOLD = (1 << 31) - 1  # the type is int


def keep_freed_memory() -> None:
    """Let this process keep what tensors of up to 32 MiB occupied for the tensors of the next step, up to 2 GiB of it.

    glibc gives the end of its heap back to the kernel once 64 MiB there are free, and gets it back page by page; how
    often that happens in a step depends on the order of its allocations. Nothing changes where the environment says
    how it is to be, and in C libraries without such a setting.
    """
    if not _VARIABLES.isdisjoint(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)
