"""Data that is read while it is trained on: the rows of an ``IterableDataset`` of Hugging Face ``datasets``.

Every rank reads every row, in the training process, and hands those of its own share to its workers, which do the
work: decode, render, tokenize. So the order is the same for any number of ranks and workers. What is read twice is the
text of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

WINDOW = 1000


def is_stream(dataset: Any) -> bool:
    """Return whether the data set has no length and is read row by row: a stream of rows, see `RowWindows`."""
    return hasattr(dataset, "stream")


class RowWindows:
    """The rows of a stream, window by window; each row is a unit.

    A shuffle permutes the rows of a window (1000) among themselves, by the seed, the epoch and the window's number. The
    state at the beginning of the window is that of ``IterableDataset.state_dict``; ``datasets`` opens the file it was
    in and passes over the rows before it without handing them out.

    Args:
        dataset: ``dataset.stream(epoch)`` returns the ``IterableDataset`` of that epoch.
        shuffle: rows of a window come in random order.
        seed: decides it.
    """

    def __init__(self, dataset: Any, shuffle: bool, seed: int) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.window = WINDOW
        self.counts: int | None = None
        self.about = {"units": "rows", "window": WINDOW, "seed": seed, "shuffle": shuffle}

    def windows(self, epoch: int, first: int = 0, state: Any = None) -> Iterator[tuple[list[list[Any]], Any]]:
        """Yield, from window ``first`` of ``epoch`` on, its rows and the state that it can be read again from."""
        rows = self.dataset.stream(epoch)
        if state is not None:
            rows.load_state_dict(state)
        iterator, number = iter(rows), first
        if state is None and first:
            next(islice(iterator, first * self.window - 1, None), None)
        while True:
            state = rows.state_dict()
            if not (part := list(islice(iterator, self.window))):
                return
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch, number]).permutation(len(part))
                part = [part[index] for index in order]
            yield [[row] for row in part], state
            number += 1

    def one_pass(self) -> Iterator[list[list[Any]]]:
        """Yield the rows of the first epoch, in their own order."""
        iterator = iter(self.dataset.stream(0))
        while part := list(islice(iterator, self.window)):
            yield [[row] for row in part]

    def at_least(self) -> int | None:
        """Return None: a stream tells its end when it is there."""
        return None
