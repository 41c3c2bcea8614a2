"""Ends a job that stands still, and says which rank holds it up, and where.

Every rank tells the job's store, every few seconds, where it stands (:mod:`mindspeed_mm.distributed.phases`). A rank
that has made no progress for longer than its limit reads what the others told: those that do not answer, and those
that are not waiting for somebody, are the ones that hold the job up. It names them and ends the job.

Three things make this work however a rank hangs. Threads do it, so that the one that trains may be anywhere. They use
their own connection to the store. And where they cannot run, because a call keeps Python from running, a timer of
:mod:`faulthandler`, which needs no Python, prints the stack and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from types import FrameType

import torch.distributed as dist

from mindspeed_mm.distributed import phases

_WAITING_CODE = os.path.join("torch", "distributed", "")
_BACKWARD = "_engine_run_backward"  # its hooks, where FSDP reduces, run in threads of their own
_SHOWN_FRAMES = 6


@dataclass(frozen=True)
class Report:
    """What a rank tells about itself."""

    rank: int
    beat: int
    host: str
    pid: int
    board: int | None
    """See :func:`~mindspeed_mm.distributed.phases.share`."""
    phase: str
    iteration: int | None
    ticks: int
    stalled: float
    """Seconds without progress."""
    limit: float
    """Seconds it may take."""
    waits: bool = False
    """Whether it waits for other ranks."""
    stack: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Return ``forward of iteration 3``."""
        return self.phase if self.iteration is None else f"{self.phase} of iteration {self.iteration}"

    @property
    def name(self) -> str:
        """Return ``rank 3 (host, pid 17)``."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Limits:
    """Seconds without progress that end the job: while it trains, and while it prepares or saves."""

    training: float
    preparing: float

    def of(self, stand: phases.Stand) -> float:
        """Return the limit there. A step may always take three times as long as the slowest one so far."""
        return self.preparing if stand.patient else max(self.training, 3 * phases.longest_step())


class Watch:
    """Watches over this rank, and with the other ranks' watches over the job.

    Args:
        store: a connection of its own, with a short timeout.
        rank: of this process.
        world_size: ranks of the job.
        peers: ranks that may be on this host.
        limits: when to end it.
        end: ``end(message, store)`` prints the message and ends this process; a store makes it speak once for the job.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        peers: Iterable[int],
        limits: Limits,
        end: Callable[[str, dist.Store | None], None],
    ) -> None:
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.limits = limits
        self.interval = min(5.0, 0.5 + world_size / 200)
        self._end = end
        self._trains = threading.get_ident()
        self._host = socket.gethostname()
        self._board = phases.share()
        self._boards: dict[int, int | None] = {}
        self._peers = [other for other in peers if other != rank]
        self._beats = 0
        self._last_talk = time.monotonic()
        self._over = threading.Event()

    def start(self) -> None:
        """Begin; this thread is the one that trains."""
        self.tell()
        for work in (self._talk, self._guard):
            threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def tell(self) -> None:
        """Tell the store where this rank stands."""
        self._beats += 1
        self.store.set(f"watch/{self.rank}", json.dumps(asdict(self._report())))
        self._last_talk = time.monotonic()

    def ask(self) -> tuple[list[Report], set[int]]:
        """Return what the ranks told last, and which of them tell nothing any more; takes a few beats."""
        before = {report.rank: report.beat for report in self._read(range(self.world_size))}
        until = time.monotonic() + 2.5 * self.interval
        while time.monotonic() < until:
            self._over.wait(self.interval / 2)
            self.tell()
        reports = self._read(range(self.world_size))
        silent = {report.rank for report in reports if report.beat == before.get(report.rank)}
        return [self._look_up(r) if r.rank in silent else r for r in reports], silent

    def _look_up(self, report: Report) -> Report:
        """Return where a silent rank of this host stands now, or stood last."""
        opened = self._boards.get(report.rank)
        if opened is None:
            return report
        phase, iteration, ticks = phases.read_shared(opened)
        return replace(report, phase=phase, iteration=iteration, ticks=ticks)

    def _open_boards(self) -> None:
        for report in self._read(self._peers):
            self._peers.remove(report.rank)
            if report.host == self._host and report.board is not None:
                self._boards[report.rank] = phases.open_shared(report.pid, report.board)

    def lost(self) -> str:
        """Name the ranks that do not answer, to a rank that has lost its connection to one."""
        reports, silent = self.ask()
        gone = [f"{r.name}, last seen in {r.place}" for r in reports if r.rank in silent]
        return "; ".join(gone) or "another rank"

    def _report(self) -> Report:
        stand = phases.now()
        stalled = time.monotonic() - stand.since
        waits, stack = False, list[str]()
        if stalled > 2 * self.interval:
            waits, stack = self._look_at_stack()
        limit = self.limits.of(stand)
        here = (stand.phase, stand.iteration, stand.ticks)
        return Report(self.rank, self._beats, self._host, os.getpid(), self._board, *here, stalled, limit, waits, stack)

    def _look_at_stack(self) -> tuple[bool, list[str]]:
        frames = sys._current_frames()
        frame = frames.pop(self._trains, None)
        if frame is None:
            return False, []
        waits = _waits(frame)
        if frame.f_code.co_name == _BACKWARD:
            frames.pop(threading.get_ident(), None)
            waits = any(map(_waits, frames.values()))
        stack: list[str] = []
        while frame is not None and len(stack) < _SHOWN_FRAMES:
            stack.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
            frame = frame.f_back
        return waits, stack

    def _read(self, ranks: Iterable[int]) -> list[Report]:
        keys = [f"watch/{rank}" for rank in ranks]
        return [Report(**json.loads(self.store.get(key))) for key in keys if self.store.check([key])]

    def _talk(self) -> None:
        while not self._over.wait(self.interval):
            try:
                self.tell()
                self._open_boards()
                message = self._judge()
            except RuntimeError:  # the store is out of reach: _guard is there for that
                continue
            if message and not self._over.is_set():
                self._end(message, self.store)

    def _judge(self) -> str | None:
        """Return why the job has to end, if this rank has stood still for too long and no other has a right to."""
        # Two ranks are enough to judge; the others do so if both are gone.
        if -self._left() < (0 if self.rank < 2 else 30):
            return None
        return verdict(*self.ask(), stalled=time.monotonic() - phases.now().since) if self._left() < 0 else None

    def _left(self) -> float:
        stand = phases.now()
        return self.limits.of(stand) - (time.monotonic() - stand.since)

    def _guard(self) -> None:
        """End this rank when the store is out of reach, and when Python does not run for too long."""
        patience, awake = min(60.0, self.limits.training), time.monotonic()
        while not self._over.wait(min(1.0, patience / 4)):
            now, before = time.monotonic(), awake
            awake = now
            if now - before > patience / 2:  # this whole process stood still: the store has had no chance to answer
                self._last_talk = now
            left, silence = self._left(), now - self._last_talk
            faulthandler.dump_traceback_later(max(left, 0) + patience + 30, exit=True, file=2)
            if left < 0 and silence > patience:
                report = self._report()
                self._end(
                    f"lost contact with the other hosts: no answer from the job's store at "
                    f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} for {silence:.0f} s, and no "
                    f"progress in {report.place} for {report.stalled:.0f} s. Check the network, and whether the first "
                    "host is up.",
                    None,
                )


def verdict(reports: list[Report], silent: set[int], stalled: float) -> str | None:
    """Return who holds the job up, or None if it is to go on.

    Args:
        reports: of all ranks.
        silent: ranks that do not answer; what they told is old.
        stalled: seconds since the rank that asks has made progress, which was more than it may take there. Phases are
            the same on all ranks, so a silent one, whose report is old, may not take longer either.
    """
    held_up_by = [report for report in reports if report.rank in silent or not report.waits]
    if any(report.limit > report.stalled for report in held_up_by if report.rank not in silent):
        return None
    behind = min((r.ticks for r in held_up_by if r.rank not in silent), default=0)
    culprits = [r for r in held_up_by if r.rank in silent or (not silent and r.ticks == behind)]
    lines = [f"no progress for {stalled / 60:.1f} minutes, so the job ends:"]
    if culprits:
        lines += [line for culprit in culprits[:8] for line in _accuse(culprit, culprit.rank in silent)]
        waiting = sorted({r.place for r in reports if r not in culprits})
        if waiting:
            lines.append(f"  {_count(len(reports) - len(culprits))} for that, in {', '.join(waiting[:4])}")
    else:
        lines.append("  all ranks wait for each other, in different calls or for their devices:")
        lines += [f"  {r.name} in {r.place}, at {r.stack[0] if r.stack else '?'}" for r in _one_of_each(reports)[:8]]
    lines.append(
        "If it was only slow, raise --distributed-timeout-minutes; before the end of the first step and while saving, "
        "--preparation-timeout-minutes."
    )
    return "\n".join(lines)


def _accuse(report: Report, silent: bool) -> Iterable[str]:
    if silent:
        yield (
            f"  {report.name} does not answer: stopped, cut off, or in a call that keeps Python from running; last "
            f"known to be in {report.place}"
        )
        return
    yield f"  {report.name} hangs in {report.place}, for {report.stalled:.0f} s, at"
    yield from (f"    {line}" for line in report.stack)


def _count(number: int) -> str:
    return "1 rank waits" if number == 1 else f"{number} ranks wait"


def _one_of_each(reports: list[Report]) -> list[Report]:
    return list({(r.place, *r.stack[:1]): r for r in reversed(reports)}.values())[::-1]


def _waits(frame: FrameType) -> bool:
    return _WAITING_CODE in frame.f_code.co_filename
