"""Which samples form which batch, the same for every number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class DistributedBatchSampler(Sampler[list[int]]):
    """Cuts one global order of samples into micro batches for the ranks of a data-parallel group.

    The order is a function of ``(seed, epoch)`` alone. Global micro batch ``m`` is positions
    ``[m * B * R, (m + 1) * B * R)`` of it, for ``B`` samples per micro batch and ``R`` ranks; rank ``r`` takes the
    ``r``-th ``B`` of them. A step that accumulates ``A`` micro batches therefore trains on positions
    ``[k * A * B * R, (k + 1) * A * B * R)``: the same samples for every way to split a global batch.

    Args:
        num_samples: length of the data set.
        micro_batch_size: samples per rank and micro batch.
        rank: of this process in the group.
        num_ranks: of the group.
        shuffle: a new permutation in every epoch; otherwise the order of the data set.
        seed: decides the permutations.
        drop_last: leave out the samples at the end of an epoch that do not fill a global micro batch. Otherwise it is
            filled up with samples from the epoch's beginning.
        consumed_samples: samples that all ranks together have already trained on. The first iteration starts there
            unless ``set_epoch`` is called before it.
    """

    def __init__(
        self,
        num_samples: int,
        micro_batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        consumed_samples: int = 0,
    ) -> None:
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self._epoch, self._start = 0, 0
        if len(self):
            self._epoch, self._start = divmod(consumed_samples // self._global_micro_batch, len(self))

    @property
    def _global_micro_batch(self) -> int:
        return self.micro_batch_size * self.num_ranks

    def __len__(self) -> int:
        """Return the batches of this rank in one epoch."""
        whole, rest = divmod(self.num_samples, self._global_micro_batch)
        return whole + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of ``epoch``."""
        self._epoch, self._start = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of one micro batch after the other to the end of the epoch."""
        order = self._order(self._epoch)
        start, self._start = self._start, 0
        for number in range(start, len(self)):
            yield self._cut(order, number)

    def indices(self, epoch: int, number: int) -> list[int]:
        """Return the indices of batch ``number`` (from 0) of ``epoch``, wherever the iteration stands."""
        return self._cut(self._order(epoch), number)

    def _cut(self, order: np.ndarray, number: int) -> list[int]:
        begin = number * self._global_micro_batch + self.rank * self.micro_batch_size
        return order[np.arange(begin, begin + self.micro_batch_size) % self.num_samples].tolist()

    def one_pass(self) -> list[list[int]]:
        """Return this rank's batches of a pass over every sample once, in the order of the data set.

        The batches of all ranks together are the same for every number of ranks. The last may be short, and a rank
        may have one less than another.
        """
        starts = range(self.rank * self.micro_batch_size, self.num_samples, self._global_micro_batch)
        return [list(range(start, min(start + self.micro_batch_size, self.num_samples))) for start in starts]

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_samples)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
