"""The rows of a stream with their lengths, which worker processes find before they are needed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mindspeed_mm.data.worker_signals import signals_for_this_process_only
from mindspeed_mm.errors import UserError

_AHEAD = 20  # pieces, at least
_TRIED = 10  # rows that tell how long the others may be


def read_pieces(rows: Any, size: int) -> Iterator[tuple[list[Any], Any]]:
    """Yield ``size`` rows at a time, and the state that they can be read again from.

    Args:
        rows: see `mindspeed_mm.data.streaming.Rows`.
        size: of a piece; the last may be smaller.
    """
    iterator = iter(rows)
    while True:
        state = rows.state_dict()
        if not (piece := list(islice(iterator, size))):
            return
        yield piece, state


class LengthFinder:
    """Finds the lengths of rows in worker processes, which stay from one epoch to the next.

    Args:
        dataset: ``dataset.tokens_of(row)`` is the length of a row.
        workers: processes that measure ahead; 0: this one, when a piece is asked for.
        least_tokens: that are needed at a time; the workers are as many ahead.
    """

    def __init__(self, dataset: Any, workers: int, least_tokens: int) -> None:
        self._lengths_of = _Lengths(dataset)
        self._workers = workers
        self._least_tokens = least_tokens
        self._free: tuple[DataLoader[Any], _Parts] | None = None

    def measure(self, pieces: Iterator[tuple[list[Any], Any]]) -> Iterator[tuple[list[Any], list[int], Any]]:
        """Yield the pieces of `read_pieces` with the tokens of each row.

        Raises:
            UserError: a row has no length.
        """
        for first in islice(pieces, 1):
            pieces = chain([first], pieces)
            # Another iteration may be running: it keeps its loader.
            loader, parts = taken = self._free or self._new_loader(first[0])
            self._free = None
            parts.pieces, parts.read = pieces, deque()
            read = parts.read
            try:
                with signals_for_this_process_only():
                    found = iter(loader)
                for lengths in found:
                    rows, state = read.popleft()
                    yield rows, _received(lengths), state
            except GeneratorExit:  # nobody wants the rest
                self._free = taken
                raise
            self._free = taken

    def _new_loader(self, rows: list[Any]) -> tuple[DataLoader[Any], _Parts]:
        """Return a loader whose workers are ahead by so many pieces like this one as are needed at a time."""
        ahead = _AHEAD
        if self._workers:
            tried = rows[:_TRIED]
            per_piece = sum(_received(self._lengths_of[tried])) * len(rows) / len(tried)
            ahead = max(ahead, math.ceil(self._least_tokens / max(1, per_piece)))
        parts = _Parts()
        loader: DataLoader[Any] = DataLoader(
            self._lengths_of,
            batch_size=None,
            sampler=parts,
            collate_fn=_unchanged,
            num_workers=self._workers,
            prefetch_factor=math.ceil(ahead / self._workers) if self._workers else None,
            persistent_workers=self._workers > 0,
            generator=torch.Generator(),  # of its own, so that it draws nothing that a resumed run would not draw
        )
        return loader, parts


class _Parts:
    """The rows that a loader measures when it is iterated over next, a piece at a time."""

    def __init__(self) -> None:
        self.pieces: Iterator[tuple[list[Any], Any]] = iter(())
        self.read: deque[tuple[list[Any], Any]] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        pieces, read = self.pieces, self.read
        for piece in pieces:
            read.append(piece)
            yield piece[0]


class _Lengths(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: list[Any]) -> list[int] | UserError:
        try:
            return [self.dataset.tokens_of(row) for row in rows]
        except UserError as error:
            return error


def _received(lengths: list[int] | UserError) -> list[int]:
    if isinstance(lengths, UserError):
        raise type(lengths)(*lengths.args)
    return lengths


def _unchanged(found: Any) -> Any:
    return found
