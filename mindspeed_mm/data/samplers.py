"""Which samples form which global batch, the same for every number of ranks, and which of them a rank takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from mindspeed_mm.data.balance import balance
from mindspeed_mm.data.batching import IndexWindows, Singles
from mindspeed_mm.data.order import SampleOrder
from mindspeed_mm.errors import UserError


@dataclass(frozen=True)
class Position:
    """A place in the endless order of units (see `batching`), on all ranks together: the next one.

    Attributes:
        epoch: from 0.
        window: number within the epoch.
        unit: number within the window.
        state: where a stream has to be taken up to read that window; None for data that can be indexed.
    """

    epoch: int = 0
    window: int = 0
    unit: int = 0
    state: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return asdict(self)


class Windows(Protocol):
    """Where units come from.

    Attributes:
        window: samples that are read at a time.
        counts: units of every epoch; None if that takes planning them.
        about: plain values that decide the order.
    """

    window: int
    counts: int | None
    about: dict[str, Any]

    def windows(self, epoch: int, first: int = 0, state: Any = None) -> Iterator[tuple[list[list[Any]], Any]]:
        """Yield, from window ``first`` of ``epoch`` on, its units and the state that it can be read again from."""

    def one_pass(self) -> Iterator[list[list[Any]]]:
        """Yield the units of a pass over every sample once."""

    def at_least(self) -> int | None:
        """Return a lower bound of the units of an epoch, None if nobody knows."""


class DistributedBatchSampler(Sampler[list[Any]]):
    """Cuts one global order of samples into micro batches for the ranks of a data-parallel group.

    The order is a function of ``(seed, epoch)`` alone, and global batch ``k`` is the same for every way to split it:
    units ``[k * G, (k + 1) * G)`` of an epoch. Global micro batch ``m`` of it is the ``m``-th ``B * R`` of them, for
    ``B`` units per micro batch and ``R`` ranks, of which rank ``r`` takes the ``r``-th ``B``, unless they are balanced.

    Args:
        source: where units come from; the length of a data set stands for its samples one by one.
        micro_batch_size: units per rank and micro batch.
        rank: of this process in the group.
        num_ranks: of the group.
        shuffle: a new permutation in every epoch; otherwise the order of the data set. For a ``source`` that is a
            number, as is the seed.
        seed: decides the permutations.
        drop_last: leave out the end of an epoch that does not fill a global batch. Otherwise, or where a whole epoch
            does not fill one, a batch goes on with the next epoch: no sample is left out and none comes twice.
        consumed_samples: units that all ranks together have already trained on. The first iteration starts there
            unless ``set_epoch`` is called before it.
        global_batch_size: units of one optimizer step; by default one micro batch of every rank.
        work: of each sample, (N, K): global batches are spread over the ranks by it, see `balance`.
    """

    def __init__(
        self,
        source: int | Windows,
        micro_batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        consumed_samples: int = 0,
        *,
        global_batch_size: int | None = None,
        work: np.ndarray | None = None,
    ) -> None:
        if isinstance(source, int):
            about = {"seed": seed, "shuffle": shuffle}
            source = IndexWindows(SampleOrder(source, shuffle, seed), source, Singles(), about)
        self.source: Windows = source
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.global_batch_size = global_batch_size or micro_batch_size * num_ranks
        self.num_microbatches = self.global_batch_size // (micro_batch_size * num_ranks)
        if self.num_microbatches * micro_batch_size * num_ranks != self.global_batch_size:
            raise UserError(
                f"a global batch of {self.global_batch_size} cannot be split into micro batches of {micro_batch_size} "
                f"on {num_ranks} data-parallel ranks; --global-batch-size must be a multiple of "
                f"{micro_batch_size * num_ranks}"
            )
        self.work = work
        units = source.at_least()
        self.drops = drop_last and (units is None or units >= self.global_batch_size)
        self._consumed = consumed_samples
        self._epoch = 0
        self._next: tuple[Position, int, bool] | None = None
        self.begun: deque[Position] = deque()
        """Where the global batches began that this iteration has given out; who follows it takes old ones away."""

    def __len__(self) -> int:
        """Return the batches of this rank in one epoch.

        Raises:
            TypeError: nobody knows.
        """
        if self.source.at_least() is None:
            raise TypeError("a stream has no length")
        units = self.source.counts
        if units is None:
            units = sum(len(part) for part, _ in self.source.windows(0))
        whole, rest = divmod(units, self.global_batch_size)
        return (whole + (rest > 0 and not self.drops)) * self.num_microbatches

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of ``epoch``."""
        self._epoch, self._consumed, self._next = epoch, 0, None

    def start_at(self, position: Position, taken: int = 0, endless: bool = True) -> None:
        """Let the next iteration start with micro batch ``taken`` of the global batch that begins at ``position``.

        Args:
            position: where a global batch begins.
            taken: its micro batches that this rank has already had.
            endless: go on with the next epoch at the end of one.
        """
        self._next = position, taken, endless

    @property
    def first(self) -> Position:
        """Where the next iteration starts by itself."""
        return self.after(self._consumed) if self._consumed else Position(self._epoch)

    def after(self, units: int) -> Position:
        """Return the position after that many units from the beginning; samples are not fetched for it."""
        if per_epoch := self.source.counts:
            if self.drops:
                per_epoch -= per_epoch % self.global_batch_size
            epoch, unit = divmod(units, per_epoch)
            return Position(epoch, *divmod(unit, self.source.window))
        batches = self._global_batches(Position(), endless=True)
        ends = [end for _, end in islice(batches, units // self.global_batch_size)]
        return ends[-1] if ends else Position()

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield one micro batch after the other to the end of the epoch."""
        if self._next is None:
            self._next = self.first, 0, False
        (start, taken, endless), self._next, self._consumed = self._next, None, 0
        self._epoch = start.epoch
        self.begun = begun = deque([start])
        for batch, end in self._global_batches(start, endless):
            begun.append(end)
            yield from self._share(batch)[taken:]
            taken = 0

    def samples_at(self, position: Position, micro_batch: int) -> list[Any]:
        """Return the samples of a micro batch of this rank, of the global batch that begins at ``position``."""
        batch, _ = next(self._global_batches(position, endless=True))
        return self._share(batch)[micro_batch]

    def one_pass(self) -> OnePass:
        """Return this rank's batches of a pass over every sample once, in the order of the data set."""
        return OnePass(self)

    def stand_in(self) -> list[Any]:
        """Return a micro batch of the first unit."""
        return next(self.source.one_pass())[0]

    def _units(self, start: Position) -> Iterator[tuple[list[Any], Position]]:
        """Yield the units from ``start`` on, and the position of each, without end."""
        while True:
            start_of_epoch, found = start.window == start.unit == 0, False
            windows = self.source.windows(start.epoch, start.window, start.state)
            for number, (units, state) in enumerate(windows, start.window):
                for unit in range(start.unit, len(units)):
                    found = True
                    yield units[unit], Position(start.epoch, number, unit, state)
                start = replace(start, unit=0)
            if start_of_epoch and not found:
                raise UserError(f"epoch {start.epoch} of the data is empty: there is no sample in it")
            start = Position(start.epoch + 1)

    def _global_batches(self, start: Position, endless: bool) -> Iterator[tuple[list[list[Any]], Position]]:
        """Yield the global batches from ``start`` on, and where each ends."""
        batch: list[list[Any]] = []
        epoch, begin = start.epoch, start
        for unit, position in self._units(start):
            if position.epoch != epoch:
                epoch = position.epoch
                if batch and self.drops and (begin.window, begin.unit) == (0, 0):
                    raise UserError(
                        f"epoch {begin.epoch} of the data gave {len(batch)} {self.source.about['units']}, fewer than "
                        f"a global batch of {self.global_batch_size}; lower --global-batch-size or set "
                        "dataloader_param.drop_last to false"
                    )
                if self.drops:
                    batch = []
                if not endless and not batch:
                    return
            if not batch:
                begin = position
            batch.append(unit)
            if len(batch) == self.global_batch_size:
                yield batch, replace(position, unit=position.unit + 1)
                batch = []
                if not endless and epoch != start.epoch:
                    return

    def _share(self, batch: list[list[Any]]) -> list[list[Any]]:
        """Return the micro batches of this rank, lists of samples."""
        if self.work is None:
            order = np.arange(len(batch)).reshape(self.num_microbatches, self.num_ranks, -1)
        else:
            work = np.stack([self.work[unit].sum(axis=0) for unit in batch])
            order = balance(work, self.num_microbatches, self.num_ranks)
        return [[sample for unit in part for sample in batch[unit]] for part in order[:, self.rank].tolist()]


class OnePass:
    """A rank's share of a pass over every sample once, which can be iterated over again and again.

    The batches of all ranks together are the same for every number of ranks. The last may be short, and a rank
    may have one less than another.
    """

    def __init__(self, sampler: DistributedBatchSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[Any]]:
        sampler = self._sampler
        units = chain.from_iterable(sampler.source.one_pass())
        number = 0
        while part := list(islice(units, sampler.micro_batch_size)):
            if number % sampler.num_ranks == sampler.rank:
                yield list(chain.from_iterable(part))
            number += 1


def as_position(values: dict[str, Any]) -> Position:
    """Return the position that ``to_dict`` gave; further values are left alone."""
    return Position(**{key: values[key] for key in Position.__dataclass_fields__})


def what_differs(before: dict[str, Any], now: dict[str, Any]) -> Sequence[str]:
    """Return what decides the order and is not as it was: ``"seed 1 was 2"``."""
    return [
        f"{key} {now.get(key)} was {before.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)
    ]
