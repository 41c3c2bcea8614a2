"""A resumable loader whose workers report a user's mistakes as such."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from mindspeed_mm.errors import UserError


class MultiModalDataLoader(StatefulDataLoader):
    """A ``StatefulDataLoader`` over a ``DistributedBatchSampler``.

    torch re-raises an exception of a worker process with the worker's traceback as its message. A ``UserError`` is a
    message and nothing else, so workers hand it over in place of the batch and it is raised here as it was.

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
        return map(_raise_mistake, super().__iter__())

    def one_pass(self) -> MultiModalDataLoader:
        """Return a loader of the batches that ``DistributedBatchSampler.one_pass`` gives, with workers of its own."""
        if self._once is None:
            dataset, collate_fn, options = self._made_of
            self._once = MultiModalDataLoader(dataset, self.batch_sampler.one_pass(), collate_fn, **options)
        return self._once

    def stand_in(self) -> Any:
        """Return a batch of the first sample, for a rank to which a pass gives none."""
        return _raise_mistake(self.collate_fn([self.dataset[0]]))


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
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
        return self.collate_fn(list(samples)) if mistake is None else mistake


def _raise_mistake(batch: Any) -> Any:
    if isinstance(batch, UserError):
        # A new one: raised itself, it would hold this frame, which holds it, and workers end late as cyclic garbage.
        raise UserError(*batch.args)
    return batch
