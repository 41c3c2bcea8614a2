"""Units of a stream: its rows one by one, or put together by their lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from mindspeed_mm.data.batching import Plan
from mindspeed_mm.data.measured_rows import LengthFinder, read_pieces
from mindspeed_mm.errors import UserError

WINDOW = 1000
_PIECES = 10


@dataclass(frozen=True)
class ByLength:
    """How rows are put together.

    Attributes:
        plan: of the rows of a window and their lengths.
        tokens: that a window has at least.
        about: what decides the units, in plain values.
        workers: processes that find the lengths.
    """

    plan: Callable[[list[Any], np.ndarray], Plan]
    tokens: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    workers: int = 0


class RowWindows:
    """The units of a stream, window by window.

    A window is 1000 rows; where lengths decide, as many more as it takes to have the tokens that ``by_length`` wants.
    It is planned for itself: it is read, and measured, again from the ``state_dict`` of the rows at its beginning. So
    the units of all ranks are the same, and a position needs nothing of the windows before it.

    A shuffle permutes the files, and the rows of each window among themselves, by the seed, the epoch and the
    window's number.

    Args:
        dataset: ``dataset.stream(epoch, seed)`` returns the rows of that epoch, see `Rows`; no seed is no shuffle.
            ``dataset.once()``, if there is one, those of a pass over every row once.
        shuffle: rows of a window come in random order.
        seed: decides it.
        by_length: how rows are put together; None: each row is a unit.
    """

    def __init__(self, dataset: Any, shuffle: bool, seed: int, by_length: ByLength | None = None) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.by_length = by_length
        self._finder = LengthFinder(dataset, by_length.workers, by_length.tokens) if by_length else None
        self.window = WINDOW
        self.counts: int | None = None
        about = {"units": "rows", "window": WINDOW, "seed": seed, "shuffle": shuffle}
        self.about = {**about, **getattr(dataset, "about", {}), **(by_length.about if by_length else {})}

    def windows(self, epoch: int, first: int = 0, state: Any = None) -> Iterator[tuple[list[list[Any]], Any]]:
        """Yield, from window ``first`` of ``epoch`` on, its units and the state that it can be read again from."""
        rows = self.dataset.stream(epoch, self.seed if self.shuffle else None)
        if state is not None:
            try:
                rows.load_state_dict(state)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"the position in the stream cannot be restored ({type(error).__name__}: {error}): it was saved "
                    "with other data; resume with the data.json that it was saved with"
                ) from error
        windows = islice(self._windows(rows), first if state is None else 0, None)
        for number, (part, lengths, begin) in enumerate(windows, first):
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch, number]).permutation(len(part))
                part, lengths = [part[index] for index in order], lengths[order]
            yield self._units(part, lengths), begin

    def one_pass(self) -> Iterator[list[list[Any]]]:
        """Yield the units of every window of the rows in their own order."""
        once = getattr(self.dataset, "once", None)
        for part, lengths, _ in self._windows(once() if once else self.dataset.stream(0, None)):
            yield self._units(part, lengths)

    def at_least(self) -> int | None:
        """Return None: a stream tells its end when it is there."""
        return None

    def _windows(self, rows: Any) -> Iterator[tuple[list[Any], np.ndarray, Any]]:
        """Yield the rows of each window, their lengths and the state at its beginning."""
        if self.by_length is None or self._finder is None:
            for part, state in read_pieces(rows, self.window):
                yield part, np.zeros(len(part)), state
            return
        least, pieces = self.by_length.tokens, read_pieces(rows, -(-self.window // _PIECES))
        window: list[Any] = []
        lengths: list[int] = []
        begin: Any = None
        for part, found, state in self._finder.measure(pieces):
            begin = begin if window else state
            window += part
            lengths += found
            if len(window) >= self.window and sum(lengths) >= least:
                yield window, np.array(lengths), begin
                window, lengths = [], []
        if window:
            yield window, np.array(lengths), begin

    def _units(self, rows: list[Any], lengths: np.ndarray) -> list[list[Any]]:
        if self.by_length is None:
            return [[row] for row in rows]
        plan = self.by_length.plan(rows, lengths)
        parts = np.split(np.arange(len(rows)), range(plan.window, len(rows), plan.window))
        return [[rows[index] for index in unit] for part in parts for unit in plan.units(part)]
