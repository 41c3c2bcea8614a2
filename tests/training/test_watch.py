"""A job that stands still is ended, and the rank that holds it up is named."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mindspeed_mm.distributed import phases
from mindspeed_mm.training.watch import Limits, Report, Watch, verdict
from tests.ranks import RankPool

LATE = Report(0, 9, "a", 1, None, "forward", 3, 40, stalled=601, limit=600)


def at(rank: int, **changes: Any) -> Report:
    return replace(LATE, rank=rank, pid=100 + rank, **changes)


def test_the_rank_that_does_not_wait_holds_the_others_up() -> None:
    said = verdict([at(0, waits=True), at(1, phase="data", stack=["set.py:7 in load"])], set(), 601)
    assert said is not None
    assert "rank 1 (a, pid 101) hangs in data of iteration 3, for 601 s, at\n    set.py:7 in load" in said
    assert "rank 0" not in said and "1 rank waits for that, in forward of iteration 3" in said


def test_of_two_that_compute_the_one_that_is_behind_is_named() -> None:
    said = verdict([at(0), at(1, ticks=38), at(2, ticks=38), at(3, waits=True)], set(), 601)
    assert said is not None and "rank 1" in said and "rank 2" in said and "rank 0" not in said and "rank 3" not in said


def test_a_silent_rank_is_named_whatever_it_told_last() -> None:
    said = verdict([at(0), at(1, stalled=0, limit=9999, waits=True, iteration=None)], {1}, 601)
    assert said is not None and "rank 1 (a, pid 101) does not answer" in said and "known to be in forward\n" in said
    assert "rank 0" not in said


@pytest.mark.parametrize("allowed", [{"limit": 7200}, {"stalled": 3}])
def test_a_rank_within_its_limit_is_waited_for(allowed: dict[str, Any]) -> None:
    assert verdict([at(0, waits=True), at(1, **allowed)], set(), 601) is None
    assert verdict([at(0, waits=True), at(1, waits=True, **allowed)], set(), 601) is not None, "waiting is no reason"


def test_ranks_that_wait_for_each_other() -> None:
    reports = [at(r, waits=True, stack=[f"call.py:{r % 2} in f"]) for r in range(4)]
    said = verdict(reports, set(), 601)
    assert said is not None and "all ranks wait for each other" in said
    assert said.count("at call.py:0") == 1 and said.count("at call.py:1") == 1


def test_limits() -> None:
    limits = Limits(training=10, preparing=100)
    phases.prepare()
    assert limits.of(phases.now()) == 100, "before the first step is over"
    phases.begin_step(1)
    with phases.phase("data"):
        assert limits.of(phases.now()) == 100
    phases.finish_step(2)
    assert limits.of(phases.now()) == 10
    with phases.phase("save", patient=True), phases.phase("data"):
        assert limits.of(phases.now()) == 100
    phases.finish_step(4)
    assert limits.of(phases.now()) == 12, "three times the slowest step"
    ticks = phases.now().ticks
    with phases.phase("forward"):
        assert phases.now()[:2] == ("forward", 1)
    assert phases.now().ticks == ticks + 2
    phases.prepare()


def _load_slowly(seconds: float) -> None:
    time.sleep(seconds)


def stand_still(name: str, *, patient: bool = False) -> str | None:
    """Rank 1 is slow for 4 seconds and rank 0 waits for it, where 1 is the limit; return what this rank says."""
    phases.prepare()
    phases.finish_step(0.0)
    phases.begin_step(7)
    said: list[str] = []
    over = threading.Event()

    def end(message: str, store: Any) -> None:
        said.append(message)
        over.wait(10)  # as the process would: nothing more is said

    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    watch = Watch(store, dist.get_rank(), 2, range(2), Limits(1.0, 60.0), end)
    dist.barrier()
    watch.start()
    if dist.get_rank() == 1:
        with phases.phase("data", patient=patient):
            _load_slowly(4)
    with phases.phase("forward"):
        dist.all_reduce(torch.ones(1))
    watch.stop()
    over.set()
    phases.prepare()
    return said[0] if said else None


def test_who_hangs_is_named_by_any_rank(ranks2: RankPool) -> None:
    said = [message for message in ranks2.run(stand_still, "hangs") if message]
    assert said
    for message in said:
        assert "rank 1 (" in message and "hangs in data of iteration 7" in message and "in _load_slowly" in message
        assert "1 rank waits for that, in forward of iteration 7" in message


def test_who_is_slow_by_right_is_not(ranks2: RankPool) -> None:
    assert ranks2.run(stand_still, "prepares", patient=True) == [None, None]


def look_at_the_other() -> Any:
    phases.prepare()
    board = phases.share()
    phases.begin_step(5)
    places: list[Any] = [None, None]
    with phases.phase("forward" if dist.get_rank() else "data"):
        dist.all_gather_object(places, (os.getpid(), board))
        pid, other = places[1 - dist.get_rank()]
        opened = phases.open_shared(pid, other)
        assert opened is not None and phases.open_shared(pid, other + 1000) is None
        seen = phases.read_shared(opened)[:2]
        os.close(opened)
        dist.barrier()
    return seen


def test_where_a_rank_stands_is_read_by_others(ranks2: RankPool) -> None:
    assert ranks2.run(look_at_the_other) == [("forward", 5), ("data", 5)]
