from __future__ import annotations

import itertools

import numpy as np
import pytest

from mindspeed_mm.data.balance import balance, slowdown


def log_normal(batches: int, size: int, seed: int = 0) -> np.ndarray:
    """Tokens and image patches: text of log-normal length, and images in two of three samples."""
    generator = np.random.default_rng(seed)
    tokens = generator.lognormal(5.5, 1.0, (batches, size))
    patches = generator.lognormal(6.5, 0.8, (batches, size)) * (generator.random((batches, size)) < 2 / 3)
    return np.stack([tokens + patches / 4 + 1, patches], axis=-1).round()


@pytest.mark.parametrize(("micro_batches", "ranks"), [(1, 4), (4, 4), (2, 8), (1, 16)])
def test_every_unit_is_taken_once(micro_batches: int, ranks: int) -> None:
    assignment = balance(log_normal(1, 64)[0], micro_batches, ranks)
    assert assignment.shape == (micro_batches, ranks, 64 // micro_batches // ranks)
    assert sorted(assignment.reshape(-1).tolist()) == list(range(64))


@pytest.mark.parametrize(("micro_batches", "ranks", "size"), [(8, 8, 1), (1, 8, 8), (4, 8, 2)])
def test_ranks_wait_less_for_each_other(micro_batches: int, ranks: int, size: int) -> None:
    in_order = np.arange(64).reshape(micro_batches, ranks, size)
    before, after = [], []
    for work in log_normal(20, 64):
        for kind in work.T:
            before.append(slowdown(kind, in_order) - 1)
            after.append(slowdown(kind, balance(work, micro_batches, ranks)) - 1)
    print(f"{micro_batches} x {ranks} x {size}: {np.mean(before):.3f} -> {np.mean(after):.3f}")
    assert np.mean(after) < np.mean(before) / 2


def test_a_small_batch_is_spread_nearly_as_well_as_possible() -> None:
    """Oracle: every assignment of eight units to two ranks."""
    for tokens in log_normal(20, 8)[:, :, 0]:
        best = min(max(tokens[list(half)].sum(), tokens.sum() - tokens[list(half)].sum())
                   for half in itertools.combinations(range(8), 4))  # fmt: skip
        found = tokens[balance(tokens[:, None], 1, 2)].sum(axis=2).max()
        assert found <= 1.15 * best


def test_units_that_are_alike_go_to_the_rank_that_had_less() -> None:
    work = np.array([[9], [8], [7], [6], [5], [4], [3], [2]])
    totals = work[balance(work, 4, 2), 0].sum(axis=(0, 2))
    assert totals.tolist() == [22, 22]
