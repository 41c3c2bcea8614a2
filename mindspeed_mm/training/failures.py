"""One message for a job that fails, whichever rank it fails on.

Every rank that fails reports itself in the job's store. The first to do so speaks: it waits a moment for the others,
so that what they still had to print comes before, then prints, and only then do all of them leave. The others keep
quiet about the same mistake, and about having lost that rank. So the last thing in the log before the launcher's own
summary is the one thing the user has to read.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from mindspeed_mm.errors import UserError

_CLAIM, _ARRIVED, _SAID = "failure/claim", "failure/arrived", "failure/said"
_GRACE_SECONDS = 3.0  # how long the ranks wait for each other's output
_SPEECH_SECONDS = 20.0  # how long they wait for the one that speaks, which may have to find out who is gone
_CLAIM_SECONDS = 2.0  # how long a rank that lost a peer waits for that peer's own account of it

# What a collective or the store raises on a rank whose peer is gone: first who says it, then what.
_LIBRARY = re.compile(r"gloo|NCCL|HCCL|TCPStore|DataStore|c10d", re.IGNORECASE)
_LOST = re.compile(
    r"closed by peer|connection (was )?(closed|reset|refused)|broken pipe|time(d )?out|connectFullMesh|"
    r"failed to (send|recv)|socket|remote (process|error)|was aborted",
    re.IGNORECASE,
)
_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker .*\.(UserError|BadSample): ", re.DOTALL)


@dataclass
class StoreSlot:
    """Holds the job's key-value store once there is one, and who can name the ranks that are gone."""

    store: Any = None
    lost_ranks: Callable[[], str] | None = None


@contextmanager
def report_failures() -> Iterator[StoreSlot]:
    """Print an escaping exception once for the whole job and end this rank with exit code 1 (130 for Ctrl-C)."""
    slot = StoreSlot()
    try:
        yield slot
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - DCP raises BaseException; everything is printed, then we exit
        _fail(error, slot)


def end_hanging_job(message: str, store: Any) -> NoReturn:
    """Print ``message`` and end this process, from any thread; for all ranks once, if there is a ``store`` to ask."""
    say = lambda: print(f"\n{_heading()} {message}", file=sys.stderr, flush=True)  # noqa: E731
    if store is None:
        say()
    else:
        _say_once(say, False, StoreSlot(store))
    _leave(1)


def describe(error: BaseException, lost_ranks: Callable[[], str] | None = None) -> str:
    """Return what to print: the bare message of a user's mistake, the traceback of anything else."""
    where = _heading()
    if isinstance(error, UserError):
        return f"\n{where} {_FROM_WORKER.sub('', str(error)).rstrip()}"
    if isinstance(error, KeyboardInterrupt):
        return f"\n{where} interrupted by Ctrl-C; checkpoints already saved are complete."
    if _is_lost_peer(error):
        return f"\n{where} lost contact with {_name(lost_ranks)}, which was killed or hangs: {_first_line(error)}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return f"\n{where}\n{trace.rstrip()}"


def _fail(error: BaseException, slot: StoreSlot) -> NoReturn:
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    if _world_size() == 1:
        sys.stdout.flush()
        print(describe(error), file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    for number in (signal.SIGTERM, signal.SIGINT):  # the launcher's, because another rank has left before
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    say = lambda: print(describe(error, slot.lost_ranks), file=sys.stderr, flush=True)  # noqa: E731
    _say_once(say, _is_lost_peer(error), slot)
    _leave(code)


def _leave(code: int) -> NoReturn:
    # Data-loader workers hold copies of this rank's sockets, by which the others learn that it is gone.
    for child in multiprocessing.active_children():
        child.kill()
    # Not sys.exit: interpreter shutdown would wait for process groups whose other ranks are gone.
    os._exit(code)


def _say_once(say: Callable[[], None], lost_peer: bool, slot: StoreSlot) -> None:
    """Call ``say`` if this rank is the one to speak; return when the one that is has spoken."""
    try:
        store = slot.store or _connect()
        if store is None:  # nobody to ask: a rank that outlives rank 0's report was alone with its mistake
            if os.environ.get("RANK", "0") != "0":
                time.sleep(_GRACE_SECONDS)
            say()
            return
        if lost_peer:  # the rank that caused it has claimed already, unless it was killed
            _wait(_CLAIM_SECONDS, lambda: store.check([_CLAIM]))
        store.add(_ARRIVED, 1)
        if store.add(_CLAIM, 1) > 1:
            _wait(_SPEECH_SECONDS, lambda: store.check([_SAID]))
            return
        _wait(_GRACE_SECONDS, lambda: store.add(_ARRIVED, 0) == _world_size())
    except RuntimeError:  # the store is gone with the rank or agent that hosted it: better said twice than never
        say()
        return
    say()
    store.set(_SAID, "1")


def _wait(seconds: float, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


def _connect() -> Any:
    """Return the store that torchrun's agent hosts; it is there before and after any of our ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    import torch.distributed as dist

    from mindspeed_mm.distributed.state import RankInfo, open_store

    store = open_store(RankInfo.from_environment(), timedelta(seconds=_GRACE_SECONDS))
    return dist.PrefixStore(f"early_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _is_lost_peer(error: BaseException) -> bool:
    if _world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    said_by = f"{type(error).__name__}: {error}"
    return bool(_LIBRARY.search(said_by) or said_by.startswith("Dist")) and bool(_LOST.search(str(error)))


def _heading() -> str:
    return f"error (rank {os.environ.get('RANK', '0')}):" if _world_size() > 1 else "error:"


def _name(lost_ranks: Callable[[], str] | None) -> str:
    try:
        return lost_ranks() if lost_ranks else "another rank"
    except RuntimeError:  # the store is gone as well
        return "another rank"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "").strip()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
