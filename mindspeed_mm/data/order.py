"""In which order the samples of a data set come, epoch by epoch: a function of the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Order = Callable[[int], np.ndarray]
"""``order(epoch)`` returns the indices of the samples of an epoch, (n,) int64."""

_WINDOW_BATCHES = 50


@dataclass(frozen=True)
class Share:
    """What one data set gives to an epoch of a mixture.

    Attributes:
        rows: of the data set.
        entries: its rows with repetitions: entry ``i`` is row ``i % rows``.
        per_epoch: entries that an epoch takes. The next epoch goes on behind them, and no entry comes a second time
            before every other has come.
    """

    rows: int
    entries: int
    per_epoch: int


def shares_of(
    rows: Sequence[int], repeat_times: Sequence[float], weights: Sequence[float] | None = None
) -> list[Share]:
    """Return what each data set gives to an epoch.

    ``repeat_time`` decides its entries: below 1 the first rows only, above 1 rows more than once. Without weights an
    epoch takes all entries of all sets. With weights it is as long, and takes from each set in their proportion.
    """
    entries = [max(1, round(n * times)) for n, times in zip(rows, repeat_times, strict=True)]
    parts = entries if weights is None else _split(sum(entries), weights)
    return [Share(*share) for share in zip(rows, entries, parts, strict=True)]


class SampleOrder:
    """The order of one data set or of a mixture.

    Args:
        shares: of the data sets, whose rows are numbered one set after the other. One number stands for the rows of a
            data set that is not mixed.
        shuffle: a new permutation in every epoch; otherwise the sets follow one another in their own order.
        seed: decides the permutations.
    """

    def __init__(self, shares: int | Sequence[Share], shuffle: bool = True, seed: int = 0) -> None:
        self.shares = [Share(shares, shares, shares)] if isinstance(shares, int) else list(shares)
        self.shuffle = shuffle
        self.seed = seed

    def __len__(self) -> int:
        """Return the samples of an epoch."""
        return sum(share.per_epoch for share in self.shares)

    def __call__(self, epoch: int) -> np.ndarray:
        """Return the indices of the samples of ``epoch``."""
        if len(self.shares) == 1 and self.shares[0].per_epoch == self.shares[0].rows == self.shares[0].entries:
            taken = np.arange(len(self))
        else:
            firsts = np.cumsum([0, *(share.rows for share in self.shares)])
            taken = np.concatenate([first + self._taken(n, epoch) for n, first in enumerate(firsts[:-1])])
        return np.random.default_rng([self.seed, epoch]).permutation(taken) if self.shuffle else taken

    def _taken(self, number: int, epoch: int) -> np.ndarray:
        """Return the rows of set ``number``: ``per_epoch`` entries of one permutation of them after the other."""
        share = self.shares[number]
        at = np.arange(epoch * share.per_epoch, (epoch + 1) * share.per_epoch)
        if not self.shuffle:
            return at % share.entries % share.rows
        rounds = range(at[0] // share.entries, at[-1] // share.entries + 1) if len(at) else range(0)
        orders = [np.random.default_rng([self.seed, number, each, 1]).permutation(share.entries) for each in rounds]
        return np.concatenate([np.arange(0), *orders])[at - rounds.start * share.entries] % share.rows


class LengthGroups:
    """Brings samples of like length together, in an order that is otherwise still random.

    The order is cut into windows of 50 batches, each is sorted by length and cut into batches, and the batches are
    shuffled: the lengths within a batch are alike, those of one batch after the other are not.

    Args:
        order: what to regroup.
        lengths: of every sample, (N,).
        batch: samples that are to be alike: of a global batch.
        seed: decides the order of the batches.
    """

    def __init__(self, order: SampleOrder, lengths: np.ndarray, batch: int, seed: int = 0) -> None:
        self.order = order
        self.lengths = lengths
        self.batch = batch
        self.seed = seed

    def __len__(self) -> int:
        return len(self.order)

    def __call__(self, epoch: int) -> np.ndarray:
        """Return the indices of the samples of ``epoch``."""
        order = self.order(epoch)
        window = _WINDOW_BATCHES * self.batch
        parts = [order[first : first + window] for first in range(0, len(order), window)]
        order = np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])
        whole = len(order) // self.batch
        batches = order[: whole * self.batch].reshape(whole, self.batch)
        shuffled = np.random.default_rng([self.seed, epoch, 2]).permutation(batches)
        return np.concatenate([shuffled.reshape(-1), order[whole * self.batch :]])


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """Split ``total`` in proportion to ``weights``, the largest remainders rounded up."""
    exact = np.asarray(weights, dtype=float) / sum(weights) * total
    parts = np.floor(exact).astype(int)
    for index in np.argsort(parts - exact, kind="stable")[: total - parts.sum()]:
        parts[index] += 1
    return [int(part) for part in parts]
