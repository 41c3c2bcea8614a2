"""Worker processes that the signals of a whole process group leave alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_for_this_process_only() -> Iterator[None]:
    """Start worker processes that never see SIGTERM and SIGINT.

    torchrun and terminals signal whole process groups. Workers would die of it, and with them the step after which
    the run was going to be saved. They end with this process, or when it is done with them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
