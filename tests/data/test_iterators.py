"""Position and resume of CyclicIterator, against an uninterrupted pass over torch's own loaders."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from mindspeed_mm import accelerator
from mindspeed_mm.data.iterators import CyclicIterator, build_iterations
from mindspeed_mm.errors import UserError


class Numbers(Dataset):
    """Ten samples, each its index and a random number; remembers what was fetched."""

    def __init__(self) -> None:
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        self.fetched.append(index)
        return torch.tensor([float(index), torch.rand(()).item()])


class Stream(IterableDataset):
    def __iter__(self) -> Iterable[int]:
        return iter(range(7))


def shuffled() -> DataLoader:
    return DataLoader(Numbers(), batch_size=3, shuffle=True)


def own_generator() -> DataLoader:
    return DataLoader(Numbers(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5))


def distributed() -> DataLoader:
    data = Numbers()
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, num_replicas=2, rank=1, seed=3))


def unbatched() -> DataLoader:
    return DataLoader(Numbers(), batch_size=None, shuffle=True)


def stream() -> DataLoader:
    return DataLoader(Stream(), batch_size=2)


def plain_list() -> list[int]:
    return list(range(4))


LOADERS = [shuffled, own_generator, distributed, unbatched, stream, plain_list]


def as_lists(batches: list) -> list:
    return [b.tolist() if isinstance(b, torch.Tensor) else b for b in batches]


@pytest.mark.parametrize("make", LOADERS)
def test_resume_continues_exactly_at_every_position_of_two_epochs(make: Callable[[], Iterable]) -> None:
    torch.manual_seed(0)
    straight = CyclicIterator(make())
    expected, states = [], []
    for _ in range(12):
        states.append((straight.state_dict(), accelerator.rng_state()))
        expected.append(next(straight))
    for position, (state, rng) in enumerate(states):
        for resumed in (CyclicIterator(make()), straight):  # in a new run, and going back in the same one
            torch.manual_seed(999)
            resumed.load_state_dict(state)
            accelerator.set_rng_state(rng)
            rest = [next(resumed) for _ in range(12 - position)]
            assert as_lists(rest) == as_lists(expected[position:]), f"after {position} batches"


def test_two_epochs_differ_and_each_is_complete() -> None:
    torch.manual_seed(0)
    it = CyclicIterator(DataLoader(Numbers(), batch_size=5, shuffle=True))
    first, second = ([int(x) for _ in range(2) for x in next(it)[:, 0]] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_nothing_is_fetched_twice_after_a_resume() -> None:
    it = CyclicIterator(shuffled())
    next(it), next(it)
    resumed = CyclicIterator(shuffled())
    resumed.load_state_dict(it.state_dict())
    next(resumed), next(resumed)
    assert len(resumed.loader.dataset.fetched) == 4  # the third batch of 3 and the last one of 1


@pytest.mark.ranks
@pytest.mark.parametrize("persistent", [False, True])
def test_resume_with_worker_processes(persistent: bool) -> None:
    def make() -> CyclicIterator:
        data = list(range(10))
        return CyclicIterator(
            DataLoader(data, batch_size=2, shuffle=True, num_workers=2, persistent_workers=persistent)
        )

    torch.manual_seed(0)
    straight = make()
    taken = [next(straight) for _ in range(3)]
    state, rng = straight.state_dict(), accelerator.rng_state()
    expected = [next(straight).tolist() for _ in range(9)]
    for resumed in (make(), straight):
        resumed.load_state_dict(state)
        accelerator.set_rng_state(rng)
        assert [next(resumed).tolist() for _ in range(9)] == expected
    assert len(taken) == 3


def test_state_survives_a_weights_only_load(tmp_path) -> None:
    it = CyclicIterator(shuffled())
    next(it)
    torch.save(it.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    it.load_state_dict(loaded)
    next(it)


def test_a_distributed_sampler_is_given_the_epoch() -> None:
    it = CyclicIterator(distributed())
    epochs = [[int(x) for _ in range(3) for x in next(it)[:, 0]] for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_seek_positions_by_batches_since_the_start() -> None:
    straight, sought = CyclicIterator(distributed()), CyclicIterator(distributed())
    for _ in range(4):
        next(straight)
    sought.seek(4)
    assert next(sought)[:, 0].tolist() == next(straight)[:, 0].tolist()


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(UserError, match="gave no batch in epoch 0"):
        next(CyclicIterator([]))


def test_build_iterations() -> None:
    train, valid, test = build_iterations([1, 2], [3], iterator_type="single")
    assert (list(train), list(valid), test) == ([1, 2], [3], None)
    with pytest.raises(UserError, match="'endless'"):
        build_iterations([1], iterator_type="endless")


class Pids(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_the_signal_that_a_launcher_sends_to_the_process_group(number: signal.Signals) -> None:
    batches = CyclicIterator(DataLoader(Pids(), num_workers=1, prefetch_factor=1))
    worker = int(next(batches))
    os.kill(worker, number)
    assert [int(next(batches)) for _ in range(7)] == [worker] * 7
    next(batches)  # the end of the epoch: the loader is done with its workers and could end them
    assert not psutil.pid_exists(worker)
