"""When to stop early: signals, time and iterations, decided by all ranks together."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


class ExitWatch:
    """Collects the reasons to stop and lets the ranks agree on them.

    A signal may reach one rank only, and clocks differ, so after every step the ranks take the maximum of what
    they know. That is a message between hosts: the device, which runs behind them, does not wait for it.

    Args:
        duration_minutes: stop after this time, None for no limit.
        exit_interval: stop at iterations divisible by it, None for never.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, duration_minutes: float | None, exit_interval: int | None) -> None:
        self.exit_interval = exit_interval
        self._duration_minutes = duration_minutes
        self._start = time.monotonic()
        self._received: int = 0
        self._previous_handlers: dict[signal.Signals, Any] = {}
        # Its own gloo group: control messages never queue behind, or between, those of the training.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def __enter__(self) -> ExitWatch:
        for number in self._SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == number:
            raise KeyboardInterrupt  # a second Ctrl-C: do not wait for the end of the step
        self._received = number

    def reason(self, iteration: int) -> str | None:
        """Return why the run ends after ``iteration``, the same on every rank, or None to go on."""
        if self.exit_interval and iteration % self.exit_interval == 0:
            return f"exiting program at iteration {iteration}"
        number, timed_out = self._agree()
        if number:
            return f"exiting program after receiving {signal.Signals(number).name}."
        if timed_out:
            return f"exiting program after {(time.monotonic() - self._start) / 60} minutes"
        return None

    def _agree(self) -> tuple[int, bool]:
        elapsed = (time.monotonic() - self._start) / 60
        timed_out = self._duration_minutes is not None and elapsed > self._duration_minutes
        if self._group is None:
            return self._received, timed_out
        known = torch.tensor([self._received, int(timed_out)])
        dist.all_reduce(known, op=dist.ReduceOp.MAX, group=self._group)
        number, any_timed_out = known.numpy()
        return int(number), bool(any_timed_out)
