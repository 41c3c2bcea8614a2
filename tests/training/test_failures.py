"""Who speaks when a job fails, and what is said."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.failures import StoreSlot, _is_lost_peer, _say_once, describe
from tests.ranks import RankPool

LOST = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:41901.",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation",
    "Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.21",
    "[c10d] recvValue failed on SocketImpl: failed to recv, got 0 bytes. Connection was likely closed.",
]
NOT_LOST = [
    "DataLoader timed out after 5 seconds",
    "NCCL error in: ProcessGroupNCCL.cpp:268, invalid usage (run with NCCL_DEBUG=WARN for details)",
    "the download of the model failed: connection refused",
]


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


@pytest.mark.parametrize("text", LOST + NOT_LOST)
def test_a_lost_peer_is_told_from_other_errors(text: str, one_of_two: None) -> None:
    assert _is_lost_peer(RuntimeError(text)) == (text in LOST)
    assert describe(RuntimeError(text)).count("Traceback") == 0 if text in LOST else 1


def test_errors_of_the_store_are_a_lost_peer(one_of_two: None) -> None:
    assert _is_lost_peer(dist.DistStoreError("wait timeout after 300000ms, keys: /a"))
    assert _is_lost_peer(dist.DistNetworkError("Connection reset by peer"))


def test_what_is_said(one_of_two: None) -> None:
    assert describe(UserError("data.json: x")) == "\nerror (rank 1): data.json: x"
    assert describe(KeyboardInterrupt()).startswith("\nerror (rank 1): interrupted by Ctrl-C")
    try:
        raise ValueError("a bug")
    except ValueError as error:
        assert "Traceback" in describe(error) and describe(error).endswith("ValueError: a bug")


class _Mistaken(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        raise UserError("row 3: broken\nfix it")

    def __len__(self) -> int:
        return 1


def test_a_mistake_in_a_worker_of_a_users_own_loader_is_said_without_the_workers_traceback() -> None:
    with pytest.raises(UserError) as error:
        next(iter(DataLoader(_Mistaken(), num_workers=1)))
    assert describe(error.value) == "\nerror: row 3: broken\nfix it"


def say_after(name: str, delays: tuple[float, float], lost: tuple[bool, bool]) -> tuple[float | None, float]:
    """Fail on both ranks; return after how many seconds this one spoke, or None, and was free to leave."""
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    said: list[float] = []
    rank = dist.get_rank()
    dist.barrier()
    start = time.monotonic()
    time.sleep(delays[rank])
    _say_once(lambda: said.append(time.monotonic() - start), lost[rank], StoreSlot(store))
    return (said[0] if said else None), time.monotonic() - start


@pytest.mark.parametrize(
    ("delays", "lost", "speaker"),
    [
        ((0.0, 1.0), (False, False), 0),
        ((1.0, 0.0), (False, False), 1),
        ((0.0, 1.0), (True, False), 1),
        ((1.0, 0.0), (False, True), 0),
        ((0.0, 0.0), (True, True), None),
    ],
)
def test_one_rank_speaks_after_all_have_arrived(
    ranks2: RankPool, delays: tuple[float, float], lost: tuple[bool, bool], speaker: int | None
) -> None:
    name = f"failures/{delays}{lost}"
    spoke, free = zip(*ranks2.run(say_after, name, delays, lost), strict=True)
    (when,) = [t for t in spoke if t is not None]
    assert speaker is None or spoke[speaker] is not None
    # The ranks' clocks start within a few milliseconds of each other, at the barrier.
    assert when > max(delays) - 0.2 and min(free) > when - 0.2, "spoken last, and nobody left before it was"
    assert max(free) < 6


def speak_without_a_store(rank: int) -> bool:
    os.environ["RANK"] = str(rank)
    said: list[int] = []
    try:
        _say_once(lambda: said.append(1), False, StoreSlot())
    finally:
        os.environ["RANK"] = str(dist.get_rank())
    return bool(said)


def store_of_a_rank_that_is_gone() -> bool:
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=2))
    store = dist.TCPStore("127.0.0.1", host.port, is_master=False, timeout=timedelta(seconds=2))
    del host
    said: list[int] = []
    _say_once(lambda: said.append(1), True, StoreSlot(store))
    return bool(said)


def test_without_anybody_to_ask_it_is_said(ranks1: RankPool) -> None:
    assert ranks1.run(speak_without_a_store, 0) == [True]
    assert ranks1.run(speak_without_a_store, 1) == [True]
    assert ranks1.run(store_of_a_rank_that_is_gone) == [True]
