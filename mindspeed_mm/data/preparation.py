"""Look at every sample before training: how long it is, and whether it can be trained on. What is found stays on disk.

The samples are cut into chunks, and each chunk becomes a file of its own, by a rename. Whoever needs the result, be
it ``mindspeed-mm data prepare`` or the ranks of a run on any number of nodes, takes chunks that nobody else has taken
until all are there. There is no leader and no message, so nobody waits in a collective, a process that is killed costs
the chunk it had, and what it had done is taken over. Locks only save doing a chunk twice; the files do not depend on
them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.multiprocessing
from safetensors import SafetensorError

from mindspeed_mm.data.sample_store import SampleReader, append_sample, write_whole
from mindspeed_mm.errors import UserError

_DONE, _PARTS, _SAMPLES = "done.json", "parts", "samples"
_POLL, _LOOK = 0.2, 1.0  # seconds between attempts to do something, and between listings for the progress
# All who share the work must cut it alike, so these are no options. A small set too is shared between processes.
_LARGEST_CHUNK, _MIN_CHUNKS = 256, 32

COLUMNS = ("tokens", "patches", "targets", "uncut", "stamp")
Report = Callable[[int, int], None]
"""``report(done, total)`` is called often while samples are being prepared, by this process or by others."""


class Source(Protocol):
    """What is prepared. Samples must be the same in every process."""

    def __len__(self) -> int: ...

    def measure(self, index: int) -> Measured:
        """Encode a sample. Raises UserError where it cannot be trained on."""


@dataclass(frozen=True)
class Measured:
    """A sample, and what is always kept of it.

    Attributes:
        sample: its tensors.
        tokens: its length.
        patches: that the vision tower sees.
        targets: tokens that the model learns to write.
        uncut: its length before ``--seq-length`` cut its end off.
        stamp: changes when one of its media files does.
    """

    sample: Mapping[str, torch.Tensor]
    tokens: int
    patches: int
    targets: int
    uncut: int
    stamp: int

    @property
    def numbers(self) -> list[int]:
        """All of it but the sample, in the order of the columns of `Prepared.table`."""
        return [getattr(self, name) for name in COLUMNS]


class Prepared:
    """What is known of the samples of a data set; arrays and samples stay on disk until they are read.

    Args:
        folder: that `prepare` has finished.

    Attributes:
        table: int32 array (N, 5) of `COLUMNS`, see `Measured`; zeros for a bad sample.
        bad: the reason, by the index of the sample.
        places: int64 array (N, 2), offset and length of the tensors in the file of their chunk; None if not kept.
        chunk: samples in such a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with readable(folder):
            done = json.loads((folder / _DONE).read_text(encoding="utf-8"))
            self.table = np.load(folder / "table.npy", mmap_mode="r")
            self.bad: dict[int, str] = {int(index): reason for index, reason in done["bad"].items()}
            self.chunk: int = done["chunk"]
            self.places = np.load(folder / "places.npy", mmap_mode="r") if done["kept"] else None
        self._reader = SampleReader()

    def column(self, name: str) -> np.ndarray:
        """Return one of `COLUMNS` of the table."""
        return self.table[:, COLUMNS.index(name)]

    def sample(self, index: int) -> dict[str, torch.Tensor] | None:
        """Return the tensors of a sample as its processor made them; None if they are not kept."""
        if self.places is None or index in self.bad:
            return None
        offset, length = self.places[index].tolist()
        with readable(self.folder):
            return self._reader.read(self.folder / _SAMPLES / f"{index // self.chunk:06d}", offset, length)


def is_prepared(folder: Path) -> bool:
    """Return whether `prepare` has finished ``folder``."""
    return (folder / _DONE).exists()


def prepare(
    source: Source,
    folder: Path,
    *,
    keep_samples: bool = False,
    processes: int = 1,
    report: Report = lambda done, total: None,
) -> Prepared:
    """Return what is known of the samples of ``source``, finding it out first where ``folder`` does not have it.

    Any number of processes on any number of nodes may call this for the same folder at the same time. They share the
    work, and all return when it is done.

    Args:
        source: the samples.
        folder: of these samples and no others.
        keep_samples: keep the tensors too. They take much more room than pictures do.
        processes: how many work for this call; 1: this one.
        report: see `Report`.

    Raises:
        UserError: the folder cannot be written to.
    """
    if not is_prepared(folder):
        work = _Work(source, folder, keep_samples)
        with writable(folder):
            (folder / _PARTS).mkdir(exist_ok=True)
            (folder / _SAMPLES).mkdir(exist_ok=True)
            report(work.done(0), len(source))
            if processes > 1:
                _share(work, processes, report)
            else:
                work.join_in(lambda mine: report(work.done(mine), len(source)))
            report(len(source), len(source))
    return Prepared(folder)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Make ``folder``; what then keeps it from being written to is a UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: the cache of prepared samples cannot be written: {error}; make room, or set "
            "basic_parameters.cache_dir in data.json to another folder"
        ) from error


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Make what keeps a finished folder from being read a UserError: its files are whole unless the disk lost them."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the cache of prepared samples is damaged: {error}; delete the folder, it will be prepared again"
        ) from error


def forget_changed(folder: Path, stamps: np.ndarray) -> bool:
    """Let the next `prepare` look again at bad samples, and at those whose media files have changed.

    Chunks without any stay as they are.

    Args:
        folder: of the samples.
        stamps: of all samples, as they are now.

    Returns:
        Whether there were any.
    """
    if not is_prepared(folder):
        return False
    old = Prepared(folder)
    spoilt = {int(index) // old.chunk for index in (*old.bad, *np.flatnonzero(old.column("stamp") != stamps))}
    if not spoilt:
        return False
    (folder / _PARTS).mkdir(exist_ok=True)
    for number in set(range(-(-len(old.table) // old.chunk))) - spoilt:
        rows = slice(number * old.chunk, (number + 1) * old.chunk)
        places = [] if old.places is None else old.places[rows].tolist()
        _save_json(_part(folder, number), {"table": old.table[rows].tolist(), "places": places, "bad": {}})
    (folder / _DONE).unlink(missing_ok=True)
    return True


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Yield whether this process got the lock; it is free again when the process dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):  # the folder of the parts is gone when all is done
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class _Work:
    """The chunks of one folder."""

    def __init__(self, source: Source, folder: Path, keep_samples: bool) -> None:
        self.source, self.folder, self.keep_samples = source, folder, keep_samples
        self.chunk = max(1, min(_LARGEST_CHUNK, -(-len(source) // _MIN_CHUNKS)))
        self.chunks = -(-len(source) // self.chunk)
        self._parts = folder / _PARTS
        self._measured = 0
        self._found: int | None = None  # samples that were prepared when this call began
        self._finished, self._looked = 0, -_LOOK

    def join_in(self, tick: Callable[[int], None]) -> None:
        """Take chunks until all are there.

        Args:
            tick: is given the number of samples that this process has measured, after each and while waiting.
        """
        while not is_prepared(self.folder):
            missing = self._missing()
            if not missing:
                self._finish()
            random.Random(os.getpid()).shuffle(missing)  # who come at the same time begin at different chunks
            busy = False
            for number in missing:
                if _part(self.folder, number).exists():
                    continue
                with try_lock(self._parts / f"{number:06d}.lock") as mine:
                    if mine and not _part(self.folder, number).exists() and not is_prepared(self.folder):
                        self._make(number, tick)
                        busy = True
            tick(self._measured)
            if not busy:
                time.sleep(_POLL)

    def done(self, mine: int) -> int:
        """Return about how many samples are prepared, if processes of this call have measured ``mine``."""
        if time.monotonic() - self._looked >= _LOOK:
            self._looked = time.monotonic()
            finished = self.chunk * (self.chunks - len(self._missing()))
            self._finished = max(self._finished, finished)
            self._found = finished if self._found is None else self._found
        return min(len(self.source), max(self._finished, (self._found or 0) + mine))

    def _missing(self) -> list[int]:
        # A listing, because a network file system may remember for seconds that a name was not there.
        try:
            there = {name for name in os.listdir(self._parts) if name.endswith(".json")}
        except FileNotFoundError:
            there = set()
        return [number for number in range(self.chunks) if _part(self.folder, number).name not in there]

    def _make(self, number: int, tick: Callable[[int], None]) -> None:
        first = number * self.chunk
        table: list[list[int]] = []
        places: list[tuple[int, int]] = []
        bad: dict[int, str] = {}
        with write_whole(self.folder / _SAMPLES / f"{number:06d}") if self.keep_samples else nullcontext() as file:
            for index in range(first, min(first + self.chunk, len(self.source))):
                numbers, place = [0] * len(COLUMNS), (0, 0)
                try:
                    measured = self.source.measure(index)
                    numbers = measured.numbers
                    if file is not None:
                        place = append_sample(file, measured.sample)
                except UserError as error:
                    bad[index] = str(error)
                table.append(numbers)
                places.append(place)
                self._measured += 1
                tick(self._measured)
        _save_json(_part(self.folder, number), {"table": table, "places": places, "bad": bad})

    def _finish(self) -> None:
        with try_lock(self.folder / "finish.lock") as mine:
            if not mine or is_prepared(self.folder):
                return
            parts = [
                json.loads(_part(self.folder, number).read_text(encoding="utf-8")) for number in range(self.chunks)
            ]
            for name, dtype in (("table", np.int32), ("places", np.int64)):
                with write_whole(self.folder / f"{name}.npy") as file:
                    np.save(file, np.array([value for part in parts for value in part[name]], dtype))
            bad = {index: reason for part in parts for index, reason in part["bad"].items()}
            _save_json(self.folder / _DONE, {"chunk": self.chunk, "kept": self.keep_samples, "bad": bad})
            shutil.rmtree(self._parts, ignore_errors=True)
            # Of killed processes. Elsewhere such a file may be one that somebody who came late is writing.
            for left_over in (self.folder / _SAMPLES).glob("*.tmp"):
                left_over.unlink(missing_ok=True)


def _share(work: _Work, processes: int, report: Report) -> None:
    """Let ``processes`` others do the work and report how far they are."""
    # As the loader does: tokenizers that ran before a fork switch their threads off with a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = torch.multiprocessing.get_context()
    counts = context.Array("q", processes, lock=False)
    with ProcessPoolExecutor(processes, context, _remember, (work, counts)) as pool:
        futures = [pool.submit(_join_in, slot) for slot in range(processes)]
        while not all(future.done() for future in futures):
            report(work.done(sum(counts)), len(work.source))
            time.sleep(_POLL)
        try:
            for future in futures:
                future.result()
        except BrokenProcessPool:
            raise UserError(
                f"a process that prepared samples was killed, perhaps for want of memory; run it again with less than "
                f"{processes} processes: what is done is kept in {work.folder}"
            ) from None


_shared: tuple[_Work, Any]


def _remember(work: _Work, counts: Any) -> None:
    global _shared
    _shared = (work, counts)
    torch.set_num_threads(1)


def _join_in(slot: int) -> None:
    work, counts = _shared
    parent = os.getppid()

    def tick(mine: int) -> None:
        counts[slot] = mine
        if os.getppid() != parent:  # it was killed; nobody waits for this process any more
            os._exit(1)

    work.join_in(tick)


def _part(folder: Path, number: int) -> Path:
    return folder / _PARTS / f"{number:06d}.json"


def _save_json(path: Path, values: Any) -> None:
    with write_whole(path) as file:
        file.write(json.dumps(values).encode())
