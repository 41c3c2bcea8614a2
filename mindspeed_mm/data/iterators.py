"""Endless iteration over a loader, with a position that can be saved and restored exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from mindspeed_mm import accelerator
from mindspeed_mm.data.samplers import DistributedBatchSampler, Position, as_position, what_differs
from mindspeed_mm.data.worker_signals import signals_for_this_process_only
from mindspeed_mm.distributed.state import warn_rank_0
from mindspeed_mm.errors import UserError


class CyclicIterator:
    """Iterates over ``loader`` epoch after epoch.

    The position is (epoch, batches taken in it) and the random state at the epoch's start, from which a loader
    draws its permutation. Restoring it draws the same permutation again and advances the loader's sampler, so no
    sample is fetched twice and the batches that follow are the ones an uninterrupted run would have had. What
    cannot be advanced (an iterable data set, a plain iterable) is replayed up to the position.

    Random numbers drawn in ``__getitem__`` are reproduced without worker processes. With workers they are not:
    derive them from the sample's index.

    Args:
        loader: a ``DataLoader`` or any iterable. It must be possible to iterate over it more than once unless it
            holds enough batches for the whole run.
        cyclic: start over at the end; otherwise end with ``StopIteration``.
    """

    def __init__(self, loader: Iterable[Any], cyclic: bool = True) -> None:
        self.loader = loader
        self.cyclic = cyclic
        self._epoch = 0
        self._batch = 0
        self._start_state: dict[str, Any] | None = None  # random state when the current epoch was started
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> CyclicIterator:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._open_epoch()
        try:
            batch = next(self._batches)
        except StopIteration:
            if not self.cyclic:
                raise
            if self._batch == 0:
                raise UserError(
                    f"The data loader ({type(self.loader).__name__}) gave no batch in epoch {self._epoch}: it is "
                    "empty, drops its only incomplete batch, or cannot be iterated over a second time."
                ) from None
            self._epoch, self._batch, self._batches = self._epoch + 1, 0, None
            return next(self)
        self._batch += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in types that ``torch.load(weights_only=True)`` accepts."""
        # After a restore that nothing followed, the loader was not opened yet: its start state still counts.
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "start_state": self._start_state if self._batch else None,
            "own": self._own_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position; takes effect with the next batch."""
        self._epoch, self._batch, self._start_state = state["epoch"], state["batch"], state["start_state"]
        self._batches = None
        self._set_own_states(state.get("own", {}))  # matters when this process has drawn from them in the meantime
        if getattr(self.loader, "_iterator", None) is not None:
            self.loader._iterator = None  # type: ignore[attr-defined]  # its workers have fetched ahead elsewhere

    def seek(self, batches: int) -> None:
        """Continue after ``batches`` batches from the very start, for a position saved at another world size.

        Exact when the loader's order depends on (seed, epoch) only, as our samplers' does.
        """
        length = _length(self.loader)
        epoch, batch = divmod(batches, length) if length else (0, batches)
        self.load_state_dict({"epoch": epoch, "batch": batch, "start_state": None})

    def one_pass(self) -> Iterator[Any]:
        """Return one pass over the loader's data from its beginning, which leaves the position as it is.

        Our own loader gives every sample once then, over all ranks together; another is iterated over as it is.
        """
        once = getattr(self.loader, "one_pass", None)
        with signals_for_this_process_only():
            return iter(self.loader if once is None else once())

    def stand_in(self) -> Any:
        """Return a batch for a rank to which `one_pass` gives none, or None where the loader has no such thing."""
        stand_in = getattr(self.loader, "stand_in", None)
        return stand_in and stand_in()

    def _open_epoch(self) -> Iterator[Any]:
        for target in (self.loader, *(getattr(self.loader, name, None) for name in ("batch_sampler", "sampler"))):
            if callable(set_epoch := getattr(target, "set_epoch", None)):
                set_epoch(self._epoch)
        if self._batch == 0:
            self._start_state = self._random_state()
            with signals_for_this_process_only():
                return iter(self.loader)
        now = self._random_state()
        if self._start_state is not None:
            self._set_random_state(self._start_state)
        with signals_for_this_process_only():
            batches = _open_at(self.loader, self._batch)
        if self._start_state is None:
            self._start_state = now
        else:
            accelerator.set_rng_state(now["global"])
        return batches

    def _random_state(self) -> dict[str, Any]:
        return {"global": accelerator.rng_state(), "own": self._own_states()}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        accelerator.set_rng_state(state["global"])
        self._set_own_states(state["own"])

    def _own_states(self) -> dict[str, Any]:
        return {name: generator.get_state() for name, generator in _generators(self.loader).items()}

    def _set_own_states(self, states: dict[str, Any]) -> None:
        for name, generator in _generators(self.loader).items():
            if name in states:
                generator.set_state(states[name])


class CursorIterator(CyclicIterator):
    """Iterates over a loader whose batches are cut from a global order by a `DistributedBatchSampler`.

    The position is a place in that order, where a global batch begins, and what was taken of it. It is the same on
    all ranks and for any number of ranks, nothing is fetched to get there, and no random number is drawn.
    """

    shared_position = True
    """The state of one rank is that of all."""

    def __init__(self, loader: Any, cyclic: bool = True) -> None:
        super().__init__(loader, cyclic)
        self.sampler: DistributedBatchSampler = loader.batch_sampler
        self._position: Position | None = None  # None: where the loader starts by itself
        self._taken = 0  # micro batches of the global batch that begins there

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._open()
        batch = next(self._batches)
        if self._taken == self.sampler.num_microbatches:
            self.sampler.begun.popleft()
            self._position, self._taken = self.sampler.begun[0], 0
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, in types that ``torch.load(weights_only=True)`` accepts.

        ``taken`` counts units of the global batch, on all ranks together: 0 after every step.
        """
        position, taken = self._position or self.sampler.first, self._taken
        if taken == self.sampler.num_microbatches:
            position, taken = self.sampler.begun[1], 0
        return {**position.to_dict(), "taken": taken * self._stride, "order": dict(self.sampler.source.about)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position; takes effect with the next batch.

        Raises:
            UserError: it lies within a global batch, at a place where no micro batch of this split begins.
        """
        for difference in what_differs(state["order"], self.sampler.source.about):
            warn_rank_0(f"the order of the samples is not the one that was saved: {difference}. It goes on from there.")
        taken, rest = divmod(state["taken"], self._stride)
        if rest or taken >= self.sampler.num_microbatches:
            raise UserError(
                f"the position was saved after {state['taken']} samples of a global batch, which micro batches of "
                f"{self._stride} samples on all ranks do not reach; use the --micro-batch-size it was saved with"
            )
        self._position, self._taken = as_position(state), taken
        self._close()

    def seek(self, batches: int) -> None:
        """Continue after ``batches`` batches of this rank from the very start."""
        self._position, self._taken = self.sampler.after(batches * self._stride), 0
        self._close()

    @property
    def place(self) -> tuple[Position | None, int]:
        """Where the global batch began of which a batch was returned last, and the number of that batch in it."""
        return self._position, self._taken - 1

    def samples_at(self, place: tuple[Position, int]) -> list[str]:
        """Name the samples of the batch at ``place``."""
        where = getattr(self.loader.dataset, "where", "sample {}".format)  # type: ignore[attr-defined]
        return [where(sample) for sample in self.sampler.samples_at(*place)]

    @property
    def _stride(self) -> int:
        return self.sampler.micro_batch_size * self.sampler.num_ranks

    def _open(self) -> Iterator[Any]:
        self._position = self._position or self.sampler.first
        self.sampler.start_at(self._position, self._taken, endless=self.cyclic)
        before = accelerator.rng_state()  # torch draws a seed for the workers; a resumed run would draw another
        with signals_for_this_process_only():
            batches = iter(self.loader)
        accelerator.set_rng_state(before)
        return batches

    def _close(self) -> None:
        self._batches = None
        if getattr(self.loader, "_iterator", None) is not None:
            self.loader._iterator = None  # type: ignore[attr-defined]  # its workers have fetched ahead elsewhere


class _StartAt:
    """A sampler that leaves out the first ``skip`` entries the first time it is iterated over."""

    def __init__(self, sampler: Iterable[Any], skip: int) -> None:
        self.sampler = sampler
        self.skip = skip
        self._entries: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        self._entries = iter(self.sampler)
        return self

    def __next__(self) -> Any:
        self.advance()
        return next(self._entries)

    def advance(self) -> None:
        """Leave out what is to be left out; a shuffling sampler draws its permutation here."""
        skip, self.skip = self.skip, 0
        for _ in islice(self._entries, skip):
            pass

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


def _open_at(loader: Iterable[Any], batch: int) -> Iterator[Any]:
    """Start an epoch at its ``batch``-th batch, with every random number drawn that opening it draws."""
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        original = getattr(loader, name)
        start_at = _StartAt(original, batch)
        # DataLoader refuses this assignment because a running iterator would not notice; none is running here.
        object.__setattr__(loader, name, start_at)
        try:
            batches = iter(loader)
        finally:
            object.__setattr__(loader, name, original)
        # With workers the loader has prefetched and thereby advanced; without, the permutation is not drawn yet.
        start_at.advance()
        return batches
    batches = iter(loader)
    for _ in islice(batches, batch):
        pass
    return batches


def _generators(loader: Iterable[Any]) -> dict[str, Any]:
    """Return the generators that a user gave to the loader or its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = {
        "loader": loader,
        "sampler": getattr(loader, "sampler", None),
        "batch_sampler": batch_sampler,
        "inner_sampler": getattr(batch_sampler, "sampler", None),
    }
    return {name: g for name, owner in owners.items() if (g := getattr(owner, "generator", None)) is not None}


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def build_iterations(
    train_dl: Iterable[Any] | None = None,
    val_dl: Iterable[Any] | None = None,
    test_dl: Iterable[Any] | None = None,
    iterator_type: str = "cyclic",
) -> tuple[Any, Any, Any]:
    """Turn up to three loaders into iterators; ``iterator_type`` is ``"cyclic"`` (endless) or ``"single"``.

    A dict of loaders becomes a dict of iterators.

    Raises:
        UserError: the iterator type is neither.
    """
    if iterator_type not in ("cyclic", "single"):
        raise UserError(f"build_iterations: iterator_type is '{iterator_type}', it must be 'cyclic' or 'single'.")
    cyclic = iterator_type == "cyclic"

    def convert(loader: Any) -> Any:
        if isinstance(loader, Mapping):
            return {name: convert(one) for name, one in loader.items()}
        return None if loader is None else iterate(loader, cyclic)

    return convert(train_dl), convert(val_dl), convert(test_dl)


def iterate(loader: Iterable[Any], cyclic: bool = True) -> CyclicIterator:
    """Return the iterator that knows best where it stands in ``loader``."""
    ours = isinstance(getattr(loader, "batch_sampler", None), DistributedBatchSampler)
    return CursorIterator(loader, cyclic) if ours else CyclicIterator(loader, cyclic)
