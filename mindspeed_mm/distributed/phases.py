"""What this rank is doing right now, for whoever has to tell why a job stands still.

The marks are plain host-side notes, microseconds each: nothing is sent, and no device is asked. They are kept in memory
that other processes of this host can read, because a rank that is stopped cannot tell where.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Stand(NamedTuple):
    """Where a rank stands. Other threads read it whole, because it is replaced and never changed."""

    phase: str
    iteration: int | None
    patient: bool
    """Whether it may take long: preparation, the first step, a save."""
    since: float
    """By ``time.monotonic``."""
    ticks: int
    """Phases entered and left so far. In a step they are the same on all ranks, so the lowest count is behind."""


_stack: list[tuple[str, bool]] = [("preparation", True)]
_now = Stand("preparation", None, True, time.monotonic(), 0)
_longest_step = 0.0
_BOARD_BYTES = 256
_board: mmap.mmap | None = None


def now() -> Stand:
    """Return where this rank stands."""
    return _now


def longest_step() -> float:
    """Return the seconds of the longest step so far, which no limit may fall below."""
    return _longest_step


@contextmanager
def phase(name: str, *, patient: bool = False) -> Iterator[None]:
    """Be in phase ``name`` inside; phases nest, and what is inside of a patient one is patient too."""
    _stack.append((name, patient or _stack[-1][1]))
    _tick(_now.iteration)
    try:
        yield
    finally:
        _stack.pop()
        _tick(_now.iteration)


def begin_step(iteration: int) -> None:
    """Note that the step that leads to ``iteration`` begins."""
    _tick(iteration)


def finish_step(seconds: float) -> None:
    """Note that a step is over, after ``seconds``: with the first one the time of preparation ends."""
    global _longest_step
    _longest_step = max(_longest_step, seconds)
    _stack[0] = ("the loop", False)
    _tick(_now.iteration)


def share() -> int | None:
    """Keep the marks readable for other processes from now on; return what `open_shared` needs, None if not."""
    global _board
    if not hasattr(os, "memfd_create"):  # Linux only
        return None
    file = os.memfd_create("phases")
    os.ftruncate(file, _BOARD_BYTES)
    _board = mmap.mmap(file, _BOARD_BYTES)
    _tick(_now.iteration)
    return file


def open_shared(pid: int, file: int) -> int | None:
    """Open the marks of a process of this host, which stay readable when it is gone; None if that is not allowed."""
    try:
        return os.open(f"/proc/{pid}/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def read_shared(opened: int) -> tuple[str, int | None, int]:
    """Return phase, iteration and ticks of the process whose marks were opened."""
    phase, iteration, ticks = json.loads(os.pread(opened, _BOARD_BYTES, 0))
    return phase, iteration, ticks


def prepare() -> None:
    """Note that a run begins: everything is preparation until its first step is over."""
    global _longest_step
    _longest_step = 0.0
    _stack[:] = [("preparation", True)]
    _tick(None)


def _tick(iteration: int | None) -> None:
    global _now
    name, patient = _stack[-1]
    _now = Stand(name, iteration, patient, time.monotonic(), _now.ticks + 1)
    if _board is not None:
        _board[:] = json.dumps([name, iteration, _now.ticks]).encode().ljust(_BOARD_BYTES)[:_BOARD_BYTES]
