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


def measure_pieces(
    pieces: Iterator[tuple[list[Any], Any]], dataset: Any, workers: int, least_tokens: int
) -> Iterator[tuple[list[Any], list[int], Any]]:
    """Yield the pieces with the tokens of each row.

    Args:
        pieces: of `read_pieces`.
        dataset: ``dataset.tokens_of(row)`` is the length of a row.
        workers: processes that measure ahead; 0: this one, when a piece is asked for.
        least_tokens: that are needed at a time; the workers are as many ahead.

    Raises:
        UserError: a row has no length.
    """
    lengths_of = _Lengths(dataset)
    ahead = _AHEAD
    for rows, state in islice(pieces, 1):
        pieces = chain([(rows, state)], pieces)
        if workers:
            tried = rows[:_TRIED]
            per_piece = sum(_received(lengths_of[tried])) * len(rows) / len(tried)
            ahead = max(ahead, math.ceil(least_tokens / max(1, per_piece)))

    read: deque[tuple[list[Any], Any]] = deque()

    def parts() -> Iterator[list[Any]]:
        for piece in pieces:
            read.append(piece)
            yield piece[0]

    loader = DataLoader(
        lengths_of,
        batch_size=None,
        sampler=parts(),
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=math.ceil(ahead / workers) if workers else None,
        generator=torch.Generator(),  # of its own, so that it draws nothing that a resumed run would not draw
    )
    with signals_for_this_process_only():
        measured = iter(loader)
    for lengths in measured:
        rows, state = read.popleft()
        yield rows, _received(lengths), state


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
