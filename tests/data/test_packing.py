"""Plans of packs: everything once, nothing over the capacity, nearly full, and no more than a window in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.data.packing import plan_packs


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 25))
def test_every_sample_is_in_one_pack_that_holds_it(lengths: list[int], window: int) -> None:
    packs = list(plan_packs(lengths, 20, window))
    assert sorted(position for pack in packs for position in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[position] for position in pack) <= 20
        assert pack == sorted(pack) and pack[-1] // window == pack[0] // window


def test_windows_are_independent() -> None:
    """So that a run resumes in the middle without planning what lies before."""
    lengths = np.random.default_rng(0).integers(1, 100, 1000)
    whole = list(plan_packs(lengths, 100, 250))
    rest = [[500 + position for position in pack] for pack in plan_packs(lengths[500:], 100, 250)]
    assert whole[-len(rest) :] == rest


def log_normal(count: int, capacity: int, seed: int = 0) -> np.ndarray:
    """Lengths as conversation data has them: median 400 tokens, a long tail, cut at the capacity."""
    return np.random.default_rng(seed).lognormal(6.0, 0.9, count).astype(int).clip(1, capacity)


@pytest.mark.parametrize(("capacity", "window"), [(4096, 1024), (8192, 2048), (32768, 8192)])
def test_log_normal_lengths_fill_98_percent(capacity: int, window: int) -> None:
    lengths = log_normal(20 * window, capacity)
    packs = sum(1 for _ in plan_packs(lengths, capacity, window))
    assert lengths.sum() / (packs * capacity) >= 0.98


def test_no_more_than_a_window_is_read_ahead() -> None:
    read = 0

    def endless() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield 1 + read % 7

    for number, pack in enumerate(islice(plan_packs(endless(), 16, 32), 100)):
        assert pack and read <= 32 * (1 + pack[0] // 32), number


@pytest.mark.parametrize("lengths", [[3, 17], [0]])
def test_a_sample_that_fits_into_no_pack_is_named(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sample \d has (17|0) tokens, a pack has 16"):
        list(plan_packs(lengths, 16, 4))
