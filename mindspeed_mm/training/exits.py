"""What signals and clocks ask of a run: to stop, or to save now; decided by all ranks together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mindspeed_mm.distributed.state import RankInfo, host_group, print_line
from mindspeed_mm.training.prompt_signals import noticed_at_once


class ExitWatch:
    """Collects the reasons to stop or to save, and lets the ranks agree on them.

    A signal may reach one rank only, and clocks differ, so after every step the ranks take the maximum of what
    they know. That is a message between hosts: the device, which runs behind them, does not wait for it.

    Before :meth:`begin` there is nothing to save: SIGTERM ends this rank at once with exit code 0, though it may be
    in a call that connects it with ranks that are gone.

    Args:
        duration_minutes: stop after this time, None for no limit.
        exit_interval: stop at iterations divisible by it, None for never.
    """

    _STOP = (signal.SIGTERM, signal.SIGINT)
    _SAVE = signal.SIGUSR1

    def __init__(self, duration_minutes: float | None, exit_interval: int | None) -> None:
        self.exit_interval = exit_interval
        self.save_asked = False
        """Whether the ranks agreed, with the last :meth:`reason`, to save now."""
        self._duration_minutes = duration_minutes
        self._start = time.monotonic()
        self._received: int = 0
        self._save_received = False
        self._training = False
        self._process = os.getpid()
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None

    def begin(self) -> None:
        """Count the time from now, and take signals as a wish to save and stop. A collective."""
        # Its own gloo group: control messages never queue behind, or between, those of the training.
        self._group = host_group("exit") if dist.get_world_size() > 1 else None
        self._start = time.monotonic()
        self._training = True

    def end(self) -> None:
        """Take signals as before :meth:`begin`: all that there was to save is saved."""
        self._training = False

    def __enter__(self) -> ExitWatch:
        for number in (*self._STOP, self._SAVE):
            self._previous_handlers[number] = signal.signal(number, self._receive)
        self._noticed = noticed_at_once(self._notice)
        self._noticed.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._noticed.__exit__(None, None, None)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data-loader worker, which has inherited this; its parent ends it
            return
        if number == self._SAVE:
            self._save_received = True
            return
        if number == signal.SIGINT and (self._received == number or not self._training):
            raise KeyboardInterrupt  # a second Ctrl-C: do not wait for the end of the step
        self._received = number
        if not self._training:
            _leave(number)

    def _notice(self, number: int) -> None:
        if number == signal.SIGTERM and not self._training:
            _leave(number)

    def reason(self, iteration: int) -> str | None:
        """Return why the run ends after ``iteration``, the same on every rank, or None to go on."""
        number, save, timed_out = self._agree()
        self.save_asked = save
        if self.exit_interval and iteration % self.exit_interval == 0:
            return f"exiting program at iteration {iteration}"
        if number:
            return f"exiting program after receiving {signal.Signals(number).name}."
        if timed_out:
            return f"exiting program after {(time.monotonic() - self._start) / 60} minutes"
        return None

    def _agree(self) -> tuple[int, bool, bool]:
        elapsed = (time.monotonic() - self._start) / 60
        timed_out = self._duration_minutes is not None and elapsed > self._duration_minutes
        save, self._save_received = self._save_received, False
        if self._group is None:
            return self._received, save, timed_out
        known = torch.tensor([self._received, int(save), int(timed_out)])
        dist.all_reduce(known, op=dist.ReduceOp.MAX, group=self._group)
        number, any_save, any_timed_out = known.numpy()
        return int(number), bool(any_save), bool(any_timed_out)


def _leave(number: int) -> NoReturn:
    if RankInfo.from_environment().world_size == 1:  # of several ranks the launcher tells
        print_line(f"exiting program after receiving {signal.Signals(number).name}, with nothing left to save.")
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)  # interpreter shutdown would wait for process groups whose other ranks are gone
