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
    """Holds the job's key-value store once there is one."""

    store: Any = None


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


def describe(error: BaseException) -> str:
    """Return what to print: the bare message of a user's mistake, the traceback of anything else."""
    where = f"error (rank {os.environ.get('RANK', '0')}):" if _world_size() > 1 else "error:"
    if isinstance(error, UserError):
        return f"\n{where} {_FROM_WORKER.sub('', str(error)).rstrip()}"
    if isinstance(error, KeyboardInterrupt):
        return f"\n{where} interrupted by Ctrl-C; checkpoints already saved are complete."
    if _is_lost_peer(error):
        return f"\n{where} lost contact with another rank, which was killed or hangs: {_first_line(error)}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return f"\n{where}\n{trace.rstrip()}"


def _fail(error: BaseException, slot: StoreSlot) -> NoReturn:
    message = describe(error)
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush()
    if _world_size() == 1:
        print(message, file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    for number in (signal.SIGTERM, signal.SIGINT):  # the launcher's, because another rank has left before
        signal.signal(number, signal.SIG_IGN)
    _say_once(lambda: print(message, file=sys.stderr, flush=True), _is_lost_peer(error), slot)
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
            _wait(2 * _GRACE_SECONDS, lambda: store.check([_SAID]))
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
    from mindspeed_mm.distributed.state import RankInfo, connect_store

    return connect_store(RankInfo.from_environment(), timedelta(seconds=_GRACE_SECONDS))


def _is_lost_peer(error: BaseException) -> bool:
    if _world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    said_by = f"{type(error).__name__}: {error}"
    return bool(_LIBRARY.search(said_by) or said_by.startswith("Dist")) and bool(_LOST.search(str(error)))


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "").strip()


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
