"""A resumable loader whose workers report a user's mistakes as such, and go on without bad samples if told to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from mindspeed_mm.data.parcel import Parcel
from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.errors import UserError


class Batch(dict[str, Any]):
    """A batch in which short samples without a target stand in for bad ones.

    Attributes:
        bad: the bad samples.
    """

    def __init__(self, values: Mapping[str, Any], bad: list[BadSample]) -> None:
        super().__init__(values)
        self.bad = bad

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch, (dict(self), self.bad)


class MultiModalDataLoader(StatefulDataLoader):
    """A ``StatefulDataLoader`` over a ``DistributedBatchSampler``.

    torch re-raises an exception of a worker process with the worker's traceback as its message. A ``UserError`` is a
    message and nothing else, so workers hand it over in place of the batch and it is raised here as it was.

    Where the data set has a ``quarantine``, a bad sample is replaced by the data set's ``stand_in()``; it is put on
    the list when the batch is taken, not when a worker fetches it ahead.

    Args:
        dataset: map-style.
        batch_sampler: decides the batches of this rank.
        collate_fn: makes a batch of a list of samples.
        options: anything else that ``DataLoader`` takes.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: Iterable[list[int]],
        collate_fn: Callable[[list[Any]], Any],
        **options: Any,
    ) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's own call of torch
            super().__init__(
                _Guarded(dataset), batch_sampler=batch_sampler, collate_fn=_GuardedCollate(collate_fn), **options
            )
        self._made_of = (dataset, collate_fn, options)
        self._once: MultiModalDataLoader | None = None

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch; workers start fetching at once."""
        return map(self._receive, super().__iter__())

    def one_pass(self) -> MultiModalDataLoader:
        """Return a loader of the batches that ``DistributedBatchSampler.one_pass`` gives, with workers of its own."""
        if self._once is None:
            dataset, collate_fn, options = self._made_of
            self._once = MultiModalDataLoader(dataset, self.batch_sampler.one_pass(), collate_fn, **options)
        return self._once

    def stand_in(self) -> Any:
        """Return a batch of the first sample, for a rank to which a pass gives none."""
        return self._receive(self.collate_fn([self.dataset[sample] for sample in self.batch_sampler.stand_in()]))

    def _receive(self, batch: Any) -> Any:
        if isinstance(batch, UserError):
            # A new one: raised itself, it would hold this frame, which holds it, and workers end late as cyclic
            # garbage.
            raise type(batch)(*batch.args)
        if isinstance(batch, Parcel):
            return batch.unpack()
        if isinstance(batch, Batch):
            self.dataset.quarantine.add(batch.bad)
        return batch


@dataclass(frozen=True)
class _StandIn:
    values: dict[str, Any]
    error: BadSample


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except BadSample as error:
            if getattr(self.dataset, "quarantine", None) is None:
                return error
            return _StandIn(self.dataset.stand_in(), error)
        except UserError as error:
            return error

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _GuardedCollate:
    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Sequence[Any]) -> Any:
        mistake = next((sample for sample in samples if isinstance(sample, UserError)), None)
        if mistake is not None:
            return mistake
        bad = [sample.error for sample in samples if isinstance(sample, _StandIn)]
        try:
            batch = self.collate_fn([sample.values if isinstance(sample, _StandIn) else sample for sample in samples])
        except UserError as error:
            return error
        if bad:
            return Batch(batch, bad)
        return Parcel(batch) if type(batch) is dict and get_worker_info() is not None else batch
