"""A job that is resumed from any of its saves, on any number of ranks, goes on with the samples it would have had.

The ranks are loaders in one process: what they take is decided without communication.
"""

from __future__ import annotations

import io
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mindspeed_mm.configs.data import DataloaderParam
from mindspeed_mm.data.iterators import CursorIterator, iterate
from mindspeed_mm.data.loaders import MultiModalDataLoader
from mindspeed_mm.data.mixing import MixedDataset
from mindspeed_mm.data.planning import build_sampler
from mindspeed_mm.data.samplers import Position
from mindspeed_mm.errors import UserError

SEED, GLOBAL, SAMPLES = 5, 8, 43
LENGTHS = np.random.default_rng(0).integers(1, 60, SAMPLES).tolist()


class Ids(Dataset):
    """Samples that are their index, with lengths from 1 to 60 tokens; remembers what was fetched."""

    def __init__(self, count: int = SAMPLES, first: int = 0) -> None:
        self.first, self.count = first, count
        generator = np.random.default_rng(first)
        self.sizes = generator.integers(1, 60, (count, 2)).astype(np.int32)
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.fetched.append(index)
        return self.first + index


class Rows(Dataset):
    """A stream of rows in files of different lengths, whose order is another in every epoch."""

    def __init__(self, rows: int = SAMPLES) -> None:
        numbers = list(range(rows))
        self.files = [numbers[: rows // 4], numbers[rows // 4 : rows // 2 + 3], numbers[rows // 2 + 3 :]]

    def stream(self, epoch: int, seed: int | None) -> datasets.IterableDataset:
        files = self.files[epoch % 3 :] + self.files[: epoch % 3]
        return datasets.IterableDataset.from_generator(read, gen_kwargs={"files": files})

    def __getitem__(self, row: dict[str, int]) -> int:
        return row["id"]

    def tokens_of(self, row: dict[str, int]) -> int:
        return LENGTHS[row["id"]]


class Unmeasured(Rows):
    tokens_of = property()  # as if there were none


def read(files: list[list[int]]) -> Iterator[dict[str, int]]:
    for file in files:
        yield from ({"id": number} for number in file)


def mixed() -> MixedDataset:
    return MixedDataset([Ids(20), Ids(9, 20), Ids(14, 29)], [1.0, 2.0, 1.0], [3.0, 1.0, 2.0])


def job(ranks: int, make: Callable[[], Any] = Ids, micro: int = 1, workers: int = 0, pack_to: int | None = None,
        size: int = GLOBAL, **param: Any) -> list[CursorIterator]:  # fmt: skip
    """Return the iterator of every rank."""
    typed = DataloaderParam(batch_size=micro, seed=SEED, global_batch_size=size, num_workers=workers, **param)
    iterators = []
    for rank in range(ranks):
        dataset = make()
        sampler = build_sampler(dataset, typed, rank, ranks, pack_to=pack_to)
        iterators.append(iterate(MultiModalDataLoader(dataset, sampler, list, num_workers=workers)))
    return iterators


def step(iterators: list[CursorIterator]) -> list[list[int]]:
    """Return the micro batches of one step, those of all ranks of the first micro step first."""
    return [next(it) for _ in range(iterators[0].sampler.num_microbatches) for it in iterators]


def ids(micro_batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(micro_batches))


def stored(iterators: list[CursorIterator]) -> dict[str, Any]:
    """Return the state as a checkpoint keeps it: that of rank 0, which is that of all."""
    states = [it.state_dict() for it in iterators]
    assert all(state == states[0] for state in states)
    file = io.BytesIO()
    torch.save(states[0], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(state: dict[str, Any], ranks: int, **options: Any) -> list[CursorIterator]:
    iterators = job(ranks, **options)
    for iterator in iterators:
        iterator.load_state_dict(state)
    return iterators


JOBS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "nothing left out": {"drop_last": False},
    "in order": {"shuffle": False, "drop_last": False},
    "packed": {"pack_to": 100, "drop_last": False, "size": 4},
    "token budget": {"max_seq_len": 120, "dynamic_batch_buffer_size": 20, "drop_last": False, "size": 4},
    "grouped": {"sampler_type": "LengthGroupedSampler"},
    "mixed": {"make": mixed, "drop_last": False},
    "packed mixture": {"make": mixed, "pack_to": 100, "drop_last": False, "size": 4},
    "packed groups": {"sampler_type": "LengthGroupedSampler", "pack_to": 100, "size": 4},
    "streamed": {"make": Rows, "drop_last": False},
    "packed stream": {"make": Rows, "pack_to": 100, "drop_last": False, "size": 4},
    "token budget of a stream": {
        **{"make": Rows, "max_seq_len": 120, "dynamic_batch_buffer_size": 7, "drop_last": False, "size": 4},
    },
    "balanced": {"use_data_balance": True},
    "balanced packs": {"use_data_balance": True, "pack_to": 100, "drop_last": False, "size": 4},
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_can_be_resumed_from_every_step_at_any_world_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_mm.data.row_windows.WINDOW", 10)
    monkeypatch.setattr("mindspeed_mm.data.batching._PACKS_IN_WINDOW", 5)
    monkeypatch.setattr("mindspeed_mm.data.planning._PACKS", 5)
    options = JOBS[name]
    straight, states, steps = job(2, **options), [], []
    for _ in range(13):  # more than two epochs
        states.append(stored(straight))
        steps.append(ids(step(straight)))
    one_order = "balanced" not in name
    for number, state in enumerate(states):
        for ranks in (1, 2, 4):
            again = resumed(state, ranks, **options)
            for expected in steps[number : number + 4]:
                found = ids(step(again))
                assert found == expected if one_order else sorted(found) == sorted(expected), (number, ranks)


@pytest.mark.parametrize(
    ("samples", "drop_last", "expected_steps"),
    [(40, True, 5), (43, True, 5), (43, False, 43 * 8 // 8), (5, False, 5), (5, True, 5)],
)
def test_the_order_is_what_numpy_says_for_every_split(samples: int, drop_last: bool, expected_steps: int) -> None:
    """Oracle: the permutations of the epochs one after the other, cut by hand."""
    orders = [np.random.default_rng([SEED, epoch]).permutation(samples).tolist() for epoch in range(20)]
    if drop_last and samples >= GLOBAL:
        orders = [order[: samples // GLOBAL * GLOBAL] for order in orders]
    order = list(chain.from_iterable(orders))
    expected = [order[first : first + GLOBAL] for first in range(0, GLOBAL * 12, GLOBAL)]
    for ranks, micro in ((1, 1), (1, 5), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2), (8, 1)):
        if GLOBAL % (ranks * micro) == 0 and not (drop_last and samples < ranks * micro):
            iterators = job(ranks, lambda: Ids(samples), micro, drop_last=drop_last)
            assert [ids(step(iterators)) for _ in range(12)] == expected, (ranks, micro)


@pytest.mark.parametrize(
    "name",
    ["nothing left out", "in order", "packed", "token budget", "streamed", "packed stream", "token budget of a stream"],
)
def test_every_epoch_gives_every_sample_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_mm.data.row_windows.WINDOW", 10)
    monkeypatch.setattr("mindspeed_mm.data.planning._PACKS", 5)
    iterators = job(2, **JOBS[name])
    seen: list[int] = []
    while len(seen) < 5 * SAMPLES:
        seen += ids(step(iterators))
    for epoch in range(4):
        assert sorted(seen[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES)), epoch


@pytest.mark.parametrize("name", ["one by one", "packed", "mixed", "streamed", "packed stream"])
def test_workers_and_another_micro_batch_change_nothing(name: str) -> None:
    options = JOBS[name]
    straight = job(1, **options)
    states, steps = [], []
    for _ in range(9):
        states.append(stored(straight))
        steps.append(ids(step(straight)))
    working = job(1, workers=2, **options)
    first = [ids(step(working)) for _ in range(5)]
    state = stored(working)
    assert first == steps[:5] and state == states[5]
    assert [ids(step(it)) for it in [resumed(state, 1, workers=2, **options)] for _ in range(4)] == steps[5:]
    working[0].load_state_dict(states[2])  # going back in the same run, with workers that have fetched ahead
    assert [ids(step(working)) for _ in range(3)] == steps[2:5]
    if "pack_to" not in options:
        assert [ids(step(it)) for it in [resumed(state, 2, micro=2, **options)] for _ in range(4)] == steps[5:]


class FewRows(Rows):
    """Eleven rows in one file, three windows of four rows and ten tokens: {0, 1, 2, 3}, {4, 5, 6, 7, 8}, {9, 10}."""

    def __init__(self) -> None:
        self.files = [list(range(11))]

    def tokens_of(self, row: dict[str, int]) -> int:
        return [6, 3, 4, 2, 1, 2, 1, 2, 9, 10, 3][row["id"]]


PACKS = [[0, 2], [1, 3], [4, 8], [5, 6, 7], [9], [10]]  # by hand: best fit decreasing, ten tokens to a pack


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.ranks)])
def test_packs_of_a_stream_are_those_made_by_hand(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_mm.data.row_windows.WINDOW", 4)
    monkeypatch.setattr("mindspeed_mm.data.planning._PACKS", 1)
    options = {"make": FewRows, "pack_to": 10, "size": 4, "drop_last": False, "shuffle": False, "workers": workers}
    first, *others = [PACKS[:4], PACKS[4:] + PACKS[:2], PACKS[2:]]  # two epochs, then the same again
    straight = job(2, **options)
    for expected in (first, *others, first):
        state = stored(straight)
        for ranks in (1,) if workers else (1, 2, 4):
            assert step(resumed(state, ranks, **options)) == expected
        assert step(straight) == expected
    assert list(chain.from_iterable(straight[0].sampler.source.one_pass())) == [
        [{"id": number} for number in pack] for pack in PACKS
    ]


def test_processes_that_find_lengths_stay_and_nobody_takes_them_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_mm.data.row_windows.WINDOW", 4)
    monkeypatch.setattr("mindspeed_mm.data.planning._PACKS", 1)
    sampler = job(1, FewRows, pack_to=10, size=6, drop_last=False, shuffle=False, workers=1)[0].sampler
    before = multiprocessing.active_children()
    sampler.start_at(Position())
    packs = iter(sampler)
    found, children = [next(packs) for _ in range(3)], multiprocessing.active_children()
    assert len(children) == len(before) + 1
    assert sampler.samples_at(Position(), 4) == [{"id": 9}]  # while the other goes on
    found += [next(packs) for _ in range(15)]
    assert [[row["id"] for row in pack] for pack in found] == PACKS * 3
    assert {child.pid for child in multiprocessing.active_children()} & {child.pid for child in children}
    assert len(multiprocessing.active_children()) == len(children)


def test_a_position_in_a_packed_stream_reads_no_window_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_mm.data.row_windows.WINDOW", 10)
    monkeypatch.setattr("mindspeed_mm.data.planning._PACKS", 1)
    options = {"make": lambda: CountingRows(900), "pack_to": 50, "size": 4}
    straight = job(1, **options)
    for _ in range(30):
        step(straight)
    (again,) = resumed(stored(straight), 1, **options)
    measured = len(again.loader.dataset.measured)
    step([again])
    assert measured == 0 and 4 <= len(again.loader.dataset.measured) <= 40 < len(straight[0].loader.dataset.measured)


class CountingRows(Rows):
    """Remembers the rows whose length was asked for."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.measured: list[int] = []

    def tokens_of(self, row: dict[str, int]) -> int:
        self.measured.append(row["id"])
        return 1 + row["id"] % 30


def test_nothing_is_fetched_to_get_to_a_position() -> None:
    straight = job(1, lambda: Ids(4000))
    for _ in range(900):
        step(straight)
    (again,) = resumed(stored(straight), 1, make=lambda: Ids(4000))
    step([again])
    assert len(again.loader.dataset.fetched) == GLOBAL


def test_a_checkpoint_without_a_position_is_sought_by_its_consumed_samples() -> None:
    for name in ("one by one", "nothing left out", "packed", "mixed"):
        straight = job(2, **JOBS[name])
        steps = [ids(step(straight)) for _ in range(11)]
        sought = job(4, **JOBS[name])
        for iterator in sought:
            iterator.seek(8 * iterator.sampler.num_microbatches)
        assert [ids(step(sought)) for _ in range(3)] == steps[8:], name


def test_no_random_number_is_drawn_to_open_a_loader() -> None:
    before = torch.random.get_rng_state()
    next(job(1, workers=1)[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_mixing_takes_shares_and_repeats_nothing_before_its_time() -> None:
    data = mixed()  # 20, 9 twice and 14 rows are 52, split 3:1:2
    iterators = job(1, mixed, size=1, drop_last=False)
    seen = [next(iterators[0])[0] for _ in range(52 * 6)]
    of = lambda ids: [sum(i < 20 for i in ids), sum(20 <= i < 29 for i in ids), sum(i >= 29 for i in ids)]  # noqa: E731
    assert all(of(seen[epoch * 52 : (epoch + 1) * 52]) == [26, 9, 17] for epoch in range(6))
    counts = Counter(seen)
    assert {counts[i] for i in range(20)} <= {7, 8}  # 156 of 20 rows
    assert {counts[i] for i in range(20, 29)} == {6}  # 54 of 18 entries are 3 rounds of each row twice
    assert {counts[i] for i in range(29, 43)} <= {7, 8}
    assert [data.where(i) for i in (0, 19, 20, 28, 29)] == [
        "data set 0, sample 0", "data set 0, sample 19", "data set 1, sample 0", "data set 1, sample 8",
        "data set 2, sample 0",
    ]  # fmt: skip


def test_repeat_time_below_one_takes_the_first_rows_only() -> None:
    iterators = job(1, lambda: MixedDataset([Ids(10), Ids(4, 10)], [0.5, 2.5]), size=1, drop_last=False)
    for _ in range(2):
        epoch = Counter(next(iterators[0])[0] for _ in range(15))
        assert epoch == Counter([*range(5), *range(10, 14), *range(10, 14), 10, 11])


def test_a_changed_data_set_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    state = stored(job(1))
    resumed(state, 1, make=lambda: Ids(50))
    assert "the order of the samples is not the one that was saved: samples 50 was 43" in capsys.readouterr().err


def test_a_position_within_a_global_batch_needs_a_micro_batch_that_reaches_it() -> None:
    one = job(1)
    next(one[0]), next(one[0]), next(one[0])
    state = stored(one)
    assert ids([next(resumed(state, 1)[0])]) == ids([next(one[0])])
    with pytest.raises(UserError, match="after 3 samples of a global batch"):
        resumed(state, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 30}, r"has \d+ tokens, more than --max-seq-len 30"),
        ({"max_seq_len": 60, "micro": 2}, r"--use-txt-dynamic-batching .*set --micro-batch-size 1"),
        ({"make": Rows, "max_seq_len": 30}, r"has \d+ tokens, more than --max-seq-len 30"),
        ({"make": Rows, "pack_to": 60, "micro": 2}, r"packing decides .*set --micro-batch-size 1"),
        ({"make": Unmeasured, "pack_to": 60}, r"packing needs the length of every row: give .* 'tokens_of'"),
        ({"make": Rows, "sampler_type": "LengthGroupedSampler"}, r"grouping by length needs .* a stream"),
        ({"make": Rows, "use_data_balance": True}, r"balance needs the length of every sample, which a stream"),
        ({"make": lambda: list(range(20)), "use_data_balance": True}, r"give list an attribute 'sizes'"),
        ({"ranks": 3}, r"global batch of 8 cannot be split .* multiple of 3"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        step(job(**{"ranks": 1, **options}))
