"""One message for a job that fails, whichever rank it fails on.

The rank that fails first says so in the job's store and prints; the others keep quiet about the same mistake, or
about having lost that rank, and leave. So the last thing in the log before the launcher's own summary is the one
thing the user has to read.
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from mindspeed_mm.errors import UserError

_CLAIM, _MESSAGE = "failure/claim", "failure/message"
_GRACE_SECONDS = 5.0

# What a collective raises on a rank whose peer is gone (gloo, NCCL, HCCL and torch's store).
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed out|connectFullMesh|NCCL|HCCL|"
    r"socket|remote process exited|Application timeout",
    re.IGNORECASE,
)


@dataclass
class StoreSlot:
    """Holds the job's key-value store once there is one."""

    store: Any = None


@contextmanager
def report_failures() -> Iterator[StoreSlot]:
    """Print an escaping exception once for the whole job and end this rank with exit code 1."""
    slot = StoreSlot()
    try:
        yield slot
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - DCP raises BaseException; everything is printed, then we exit
        _fail(error, slot)


def _fail(error: BaseException, slot: StoreSlot) -> NoReturn:
    message = describe(error)
    if _world_size() == 1:
        print(message, file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    if _should_print(message, _is_lost_peer(error), slot):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: interpreter shutdown would wait for process groups whose other ranks are gone.
    os._exit(1)


def describe(error: BaseException) -> str:
    """Return what to print: the bare message of a user's mistake, the traceback of anything else."""
    where = f"rank {os.environ.get('RANK', '0')}" if _world_size() > 1 else ""
    if isinstance(error, UserError):
        return f"\nerror{f' ({where})' if where else ''}: {error}"
    if _is_lost_peer(error):
        return f"\nerror ({where}): lost contact with another rank, which was killed or hangs: {_first_line(error)}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return f"\nerror{f' ({where})' if where else ''}:\n{trace}"


def _should_print(message: str, lost_peer: bool, slot: StoreSlot) -> bool:
    store = slot.store or _connect()
    if store is None:  # no store yet and nobody to ask: every rank sees the same command line, rank 0 speaks
        if os.environ.get("RANK", "0") == "0":
            return True
        time.sleep(_GRACE_SECONDS)
        return False
    try:
        if lost_peer:  # the rank that caused it is speaking, or it was killed and cannot
            deadline = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < deadline:
                if store.check([_CLAIM]):
                    return False
                time.sleep(0.1)
        if store.add(_CLAIM, 1) == 1:
            store.set(_MESSAGE, _without_rank(message))
            return True
        if lost_peer:
            return False
        time.sleep(0.5)  # the first one may still be writing
        return not store.check([_MESSAGE]) or store.get(_MESSAGE).decode() != _without_rank(message)
    except RuntimeError:  # the store is gone with the rank or agent that hosted it: better said twice than never
        return True


def _connect() -> Any:
    """Return the store torchrun's agent hosts; it is there before and after any of our ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from mindspeed_mm.distributed.state import RankInfo, connect_store

    return connect_store(RankInfo.from_environment())


def _is_lost_peer(error: BaseException) -> bool:
    return (
        _world_size() > 1
        and isinstance(error, RuntimeError)
        and bool(_LOST_PEER.search(str(error)))
        and "torch" in sys.modules
    )


def _without_rank(message: str) -> str:
    return re.sub(r"\(rank \d+\)", "", message)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
