from __future__ import annotations

from itertools import chain

import pytest

from mindspeed_mm.data.samplers import DistributedBatchSampler


def global_batches(num_samples: int, micro_batch: int, ranks: int, accumulate: int, **options) -> list[list[int]]:
    """The samples of every optimizer step, in order: micro batches first, ranks within."""
    per_rank = [list(DistributedBatchSampler(num_samples, micro_batch, r, ranks, **options)) for r in range(ranks)]
    micro = [[i for rank in per_rank for i in rank[m]] for m in range(len(per_rank[0]))]
    return [list(chain(*micro[k : k + accumulate])) for k in range(0, len(micro), accumulate)]


@pytest.mark.parametrize(("micro_batch", "ranks", "accumulate"), [(2, 4, 1), (1, 8, 1), (4, 1, 2), (1, 2, 4)])
def test_a_global_batch_is_the_same_samples_for_every_split(micro_batch, ranks, accumulate):
    expected = global_batches(24, 8, 1, 1, seed=3)
    assert global_batches(24, micro_batch, ranks, accumulate, seed=3) == expected
    assert sorted(chain(*expected)) == list(range(24))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = DistributedBatchSampler(50, 5, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    sampler = DistributedBatchSampler(50, 5, seed=1)
    assert list(sampler) == list(sampler) == order(1, 0)


def test_without_shuffle_the_order_is_that_of_the_data():
    assert list(DistributedBatchSampler(6, 1, rank=1, num_ranks=2, shuffle=False)) == [[1], [3], [5]]


def test_drop_last_decides_about_the_tail():
    dropped = [DistributedBatchSampler(10, 2, r, 2, shuffle=False) for r in range(2)]
    filled = [DistributedBatchSampler(10, 2, r, 2, shuffle=False, drop_last=False) for r in range(2)]
    assert [len(s) for s in dropped] == [2, 2] and [len(list(s)) for s in dropped] == [2, 2]
    assert [len(s) for s in filled] == [3, 3]
    assert [list(s)[-1] for s in filled] == [[8, 9], [0, 1]]


def test_a_batch_larger_than_the_data_goes_on_with_the_next_epoch():
    two = [list(DistributedBatchSampler(3, 2, r, 2, shuffle=False)) for r in range(2)]
    assert two == [[[0, 1]], [[2, 0]]]


def test_consumed_samples_start_in_the_middle_of_an_epoch_until_the_epoch_is_set():
    whole = DistributedBatchSampler(20, 2, seed=5)
    whole.set_epoch(2)
    later = DistributedBatchSampler(20, 2, seed=5, consumed_samples=2 * 20 + 6)
    assert list(later) == list(whole)[3:]
    assert list(later) == list(whole)
    later = DistributedBatchSampler(20, 2, seed=5, consumed_samples=6)
    later.set_epoch(2)
    assert list(later) == list(whole)
