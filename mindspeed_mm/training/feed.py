"""What the loop learns about the data on its way to the callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from mindspeed_mm.distributed.phases import phase
from mindspeed_mm.errors import UserError

Check = Callable[[Any, Callable[[], list[str] | None]], None]
"""``check(batch, samples)`` raises if the batch is not usable; ``samples()`` names its samples, None if nobody can."""


class Feed:
    """Passes batches on, and counts the time spent waiting for them and the tokens in them.

    Tokens are counted where the batch still is, in host memory: non-padding positions of ``attention_mask``, else
    the elements of ``input_ids`` (shape ``(batch, sequence)`` both). Batches of another kind count as none.

    Args:
        source: the iterator behind it.
        name: what the iterator feeds, for the message when it ends too early.
        check: called with every batch.
    """

    def __init__(
        self,
        source: Iterator[Any],
        name: str,
        check: Check | None = None,
    ) -> None:
        self._source = source
        self._name = name
        self.check = check
        self._batches = 0
        self.wait_seconds = 0.0
        self.tokens = 0

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Any:
        batch = self._fetch()
        if self.check:
            place = self.place
            self.check(batch, lambda: self.samples_at(place))
        self.tokens += _count_tokens(batch)
        return batch

    @property
    def place(self) -> Any:
        """Where the batch that was taken last lies, for :meth:`samples_at`."""
        return getattr(self._source, "place", None)

    def samples_at(self, place: Any) -> list[str] | None:
        """Name the samples of the batch at ``place``, where the source can."""
        return self._source.samples_at(place) if hasattr(self._source, "samples_at") else None

    def take_counts(self) -> tuple[float, int]:
        """Return seconds waited and tokens seen since the last call."""
        counts = (self.wait_seconds, self.tokens)
        self.wait_seconds, self.tokens = 0.0, 0
        return counts

    def _fetch(self) -> Any:
        start = time.perf_counter()
        try:
            with phase("data"):
                batch = next(self._source)
        except StopIteration:
            raise UserError(
                f"The {self._name} iterator ended after {self._batches} batches, before the run did. Return a "
                "DataLoader or another iterable, which is started over, or an iterator with enough batches."
            ) from None
        self._batches += 1
        self.wait_seconds += time.perf_counter() - start
        return batch


def count_samples(batch: Any) -> int:
    """Return the samples of a packed row, else the first dimension of ``input_ids``, ``labels`` or a tensor; or 1."""
    if isinstance(batch, Mapping):
        if isinstance(ends := batch.get("cu_seqlens"), Tensor):
            return len(ends) - 1
        values = [batch.get("input_ids"), batch.get("labels"), *batch.values()]
    else:
        values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 1)


def _count_tokens(batch: Any) -> int:
    if not isinstance(batch, Mapping):
        return 0
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.is_cpu:
        return int(mask.sum())
    return ids.numel() if isinstance(ids, Tensor) else 0
