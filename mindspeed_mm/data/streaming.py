"""Data that is read while it is trained on.

Every rank reads every row, in the training process, and hands those of its own share to its workers, which do the
work: decode, render, tokenize. So the order is the same for any number of ranks and workers. What is read more than
once is the text of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from mindspeed_mm.data.datasets import ConversationDataset
from mindspeed_mm.data.encoding import ConversationEncoder
from mindspeed_mm.data.quarantine import Quarantine
from mindspeed_mm.data.rows import RowFiles

WINDOW = 1000


class Rows(Protocol):
    """Rows of one epoch, with a position: as an ``IterableDataset`` of Hugging Face ``datasets``."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows, from the position on."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the running iteration, in plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start there."""


class FileRows:
    """The rows of several files. To get to a position, the rows before it in its file are read and passed over.

    Args:
        files: their numbers, in the order to read them.
        read: yields the rows of a file.
    """

    def __init__(self, files: list[int], read: Callable[[int], Iterable[Any]]) -> None:
        self.files = files
        self.read = read
        self._file, self._row = 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self._file < len(self.files):
            for row in islice(self.read(self.files[self._file]), self._row, None):
                self._row += 1
                yield row
            self._file, self._row = self._file + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"file": self._file, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the iteration go on there."""
        self._file, self._row = state["file"], state["row"]


class ConversationStream(ConversationDataset):
    """Conversations that are read while they are trained on. A sample is a row, not the number of one.

    Args:
        files: to read.
        read: yields the rows of files as ``iterate_conversations`` does.
        encoder: makes tensors of a row.
        quarantine: see ``ConversationDataset``.
    """

    def __init__(
        self,
        files: RowFiles,
        read: Callable[[RowFiles], Iterable[dict[str, Any]]],
        encoder: ConversationEncoder,
        quarantine: Quarantine | None = None,
    ) -> None:
        super().__init__(None, files, encoder, quarantine)
        self._read = read

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def __getitem__(self, row: Any) -> dict[str, torch.Tensor]:
        """Decode and encode one row; see ``ConversationDataset``."""
        return self._encode(row)

    def stream(self, epoch: int, seed: int | None) -> Rows:
        """Return the rows of an epoch; with a seed the files come in another order in every epoch."""
        files = np.arange(len(self.files.paths))
        if seed is not None:
            files = np.random.default_rng([seed, epoch]).permutation(files)
        return FileRows(files.tolist(), self._rows_of)

    def where(self, row: Any) -> str:
        """Return file and line (or number) of a row, for messages."""
        return self.files.where(row["file"], row["row"])

    def _rows_of(self, file: int) -> Iterator[dict[str, Any]]:
        return ({**row, "file": file} for row in self._read(RowFiles([self.files.paths[file]])))


class StreamedRows(Dataset[Any]):
    """An ``IterableDataset`` of Hugging Face ``datasets``, whose rows are the samples."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, row: Any) -> Any:
        return row

    def stream(self, epoch: int, seed: int | None) -> Rows:
        """Return the rows of an epoch, in the order that they have there by themselves."""
        rows = copy(self.rows)
        rows.set_epoch(epoch)
        return rows


def is_stream(dataset: Any) -> bool:
    """Return whether the data set is read row by row, and its samples are rows."""
    return hasattr(dataset, "stream")


def as_stream(dataset: Any) -> Any:
    """Return the data set itself, or in our form if it is a stream of Hugging Face ``datasets``."""
    theirs = hasattr(dataset, "set_epoch") and hasattr(dataset, "load_state_dict") and not hasattr(dataset, "__len__")
    return StreamedRows(dataset) if theirs and not is_stream(dataset) else dataset


class RowWindows:
    """The rows of a stream, window by window; each row is a unit.

    A shuffle permutes the files, and the rows of each window (1000) among themselves, by the seed, the epoch and the
    window's number. A window is read again from the ``state_dict`` of the rows at its beginning.

    Args:
        dataset: ``dataset.stream(epoch, seed)`` returns the rows of that epoch, see `Rows`; no seed is no shuffle.
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
        rows = self.dataset.stream(epoch, self.seed if self.shuffle else None)
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
        """Yield the rows in their own order."""
        iterator = iter(self.dataset.stream(0, None))
        while part := list(islice(iterator, self.window)):
            yield [[row] for row in part]

    def at_least(self) -> int | None:
        """Return None: a stream tells its end when it is there."""
        return None
