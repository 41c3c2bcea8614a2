"""Data that is read while it is trained on.

Every rank reads every row, in the training process, and hands those of its own share to its workers, which do the
work: decode, render, tokenize. So the order is the same for any number of ranks and workers. What is read more than
once is the text of the rows. Where lengths decide, every rank also finds the length of every row, see `measured_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from mindspeed_mm.data.datasets import ConversationDataset
from mindspeed_mm.data.encoding import ConversationEncoder
from mindspeed_mm.data.quarantine import BadSample, Quarantine
from mindspeed_mm.data.rows import RowFiles


class Rows(Protocol):
    """Rows of one epoch, with a position: as an ``IterableDataset`` of Hugging Face ``datasets``."""

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows, from the position on."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the running iteration, in plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration start there."""


class FileRows:
    """The rows of several files.

    Args:
        files: their numbers, in the order to read them.
        read: ``read(file, skip)`` yields the rows of a file without the first ``skip``.
    """

    def __init__(self, files: list[int], read: Callable[[int, int], Iterable[Any]]) -> None:
        self.files = files
        self.read = read
        self._file, self._row = 0, 0

    def __iter__(self) -> Iterator[Any]:
        while self._file < len(self.files):
            for row in self.read(self.files[self._file], self._row):
                self._row += 1
                yield row
            self._file, self._row = self._file + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"file": self._file, "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the iteration go on there."""
        self._file, self._row = state["file"], state["row"]


class ProportionalRows:
    """The rows of several streams in proportion to their weights, each of which begins anew where it ends.

    There is no end. After any number of rows each stream has given its share of them to within a few.

    Args:
        open_pass: ``open_pass(number, again)`` returns the rows of a stream, the ``again``-th time from 0.
        weights: of the streams.
    """

    def __init__(self, open_pass: Callable[[int, int], Rows], weights: Sequence[float]) -> None:
        self._open = open_pass
        self._weights = weights
        self._taken = [0] * len(weights)
        self._passes = [0] * len(weights)
        self._rows = [open_pass(number, 0) for number in range(len(weights))]

    def __iter__(self) -> Iterator[Any]:
        running = [iter(rows) for rows in self._rows]
        while True:
            # The one that waits longest for its next row, if each gave rows at even distances.
            number = min(range(len(running)), key=lambda n: (self._taken[n] + 1) / self._weights[n])
            row = next(running[number], None)
            if row is None:
                self._passes[number] += 1
                self._rows[number] = self._open(number, self._passes[number])
                running[number] = iter(self._rows[number])
                row = next(running[number])  # RowFiles refuses files without rows
            self._taken[number] += 1
            yield row

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        states = [rows.state_dict() for rows in self._rows]
        return {"taken": list(self._taken), "passes": list(self._passes), "rows": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the iteration go on there."""
        for number, its_state in zip(range(len(self._weights)), state["rows"], strict=True):
            self._rows[number] = self._open(number, state["passes"][number])
            self._rows[number].load_state_dict(its_state)
        self._taken, self._passes = list(state["taken"]), list(state["passes"])


@dataclass(frozen=True)
class Source:
    """The files of one stream, or of one part of a mixture.

    Attributes:
        files: to read.
        read: ``read(files, skip=0)`` yields their rows as ``iterate_conversations`` does.
        times: that they are read in an epoch.
        weight: of its rows, beside those of the others; None takes all rows of all sources in an epoch.
    """

    files: RowFiles
    read: Callable[..., Iterable[dict[str, Any]]]
    times: int = 1
    weight: float | None = None


class ConversationStream(ConversationDataset):
    """Conversations that are read while they are trained on. A sample is a row, not the number of one.

    Args:
        sources: where they are.
        encoder: makes tensors of a row.
        quarantine: see ``ConversationDataset``.
    """

    def __init__(
        self, sources: Sequence[Source], encoder: ConversationEncoder, quarantine: Quarantine | None = None
    ) -> None:
        files = RowFiles([path for source in sources for path in source.files.paths])
        super().__init__(None, files, encoder, quarantine)
        self.sources = list(sources)
        self._source_of = [source for source in sources for _ in source.files.paths]
        self._weights = [source.weight for source in sources if source.weight is not None]

    def __getstate__(self) -> dict[str, Any]:
        # Workers are given rows. What reads them may be a function of a plugin, which pickle cannot name.
        return {**self.__dict__, "sources": [], "_source_of": []}

    def __len__(self) -> int:
        raise TypeError("a stream has no length")

    def __getitem__(self, row: Any) -> dict[str, torch.Tensor]:
        """Decode and encode one row; see ``ConversationDataset``."""
        return self._encode(row)

    def tokens_of(self, row: Any) -> int:
        """Return the length of one row, or of its stand-in; see ``ConversationEncoder.count_tokens``."""
        try:
            return self._made_by(self.encoder.count_tokens, row)
        except BadSample:
            if self.quarantine is None:
                raise
            return len(self.stand_in()["input_ids"])

    def stream(self, epoch: int, seed: int | None) -> Rows:
        """Return the rows of an epoch; with a seed the files come in another order in every epoch.

        Sources with weights have one epoch, without an end.
        """
        parts = [[n for n, its in enumerate(self._source_of) if its is source] for source in self.sources]
        if self._weights:

            def one_pass(number: int, again: int) -> Rows:
                return self._in_order(parts[number], None if seed is None else [seed, number, again])

            return ProportionalRows(one_pass, self._weights)
        files = [file for source, part in zip(self.sources, parts, strict=True) for file in part * source.times]
        return self._in_order(files, None if seed is None else [seed, epoch])

    def once(self) -> Rows:
        """Return every row once."""
        return FileRows(list(range(len(self._source_of))), self._rows_of)

    @property
    def about(self) -> dict[str, Any]:
        """Files, times and weight of each source, which decide the order."""
        return {"sources": [[len(source.files.paths), source.times, source.weight] for source in self.sources]}

    def where(self, row: Any) -> str:
        """Return file and line (or number) of a row, for messages."""
        return self.files.where(row["file"], row["row"])

    def _in_order(self, files: list[int], seeds: list[int] | None) -> FileRows:
        if seeds is not None:
            files = np.random.default_rng(seeds).permutation(files).tolist()
        return FileRows(files, self._rows_of)

    def _rows_of(self, file: int, skip: int) -> Iterator[dict[str, Any]]:
        rows = self._source_of[file].read(RowFiles([self.files.paths[file]]), skip=skip)
        return ({**row, "file": file} for row in rows)


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
