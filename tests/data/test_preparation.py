"""Preparing samples: shared between processes, gone on with after a kill, and the same whoever did it."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

from mindspeed_mm.data.preparation import Measured, Prepared, forget_changed, is_prepared, prepare
from mindspeed_mm.data.sample_store import write_whole
from mindspeed_mm.errors import UserError

FORK = torch.multiprocessing.get_context("fork")


@dataclass
class Numbers:
    """Sample ``i`` is ``i`` in the shape of a text; every one that is fetched leaves a line in ``log``."""

    count: int
    log: Path
    seconds: float = 0.0
    bad: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def measure(self, index: int) -> Measured:
        time.sleep(self.seconds)
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        if index in self.bad:
            raise UserError(f"row {index}: spoilt")
        length = index % 7 + 1
        sample = {"input_ids": torch.full((length,), index), "pixel_values": torch.full((2, 3), index / 3)}
        return Measured(sample, length, 2, 1, length + 1, int(self.stamps()[index]))

    def stamps(self) -> np.ndarray:
        return np.array([0 if i in self.bad else 2**31 - 1 - i for i in range(self.count)], np.int32)

    def fetched(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []


def check(prepared: Prepared, numbers: Numbers) -> None:
    stamps = numbers.stamps().tolist()
    rows = [[i % 7 + 1, 2, 1, i % 7 + 2, stamps[i]] if i not in numbers.bad else [0] * 5 for i in range(numbers.count)]
    assert prepared.table.dtype == np.int32 and prepared.table.tolist() == rows
    assert prepared.bad == {index: f"row {index}: spoilt" for index in numbers.bad}


@pytest.mark.ranks
@pytest.mark.parametrize("processes", [1, 2])
def test_every_sample_is_measured_once_and_then_read(processes: int, tmp_path: Path) -> None:
    numbers = Numbers(300, tmp_path / "log", bad=(0, 200))
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "cache"
    prepared = prepare(numbers, folder, processes=processes, report=lambda *x: seen.append(x))
    assert sorted(numbers.fetched()) == list(range(300))
    assert seen[-1] == (300, 300) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    check(prepared, numbers)
    assert prepared.sample(3) is None
    numbers.log.unlink()
    prepare(numbers, folder)
    assert numbers.fetched() == []
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["done.json", "finish.lock", "places.npy", "samples", "table.npy"]
    )


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    numbers = Numbers(100, tmp_path / "log", bad=(7,))
    prepared = prepare(numbers, tmp_path / "cache", keep_samples=True)
    assert prepared.sample(7) is None
    for index in (0, 6, 8, 50, 99):
        kept, fresh = prepared.sample(index), numbers.measure(index).sample
        assert kept is not None and kept.keys() == fresh.keys()
        assert all(kept[key].dtype == fresh[key].dtype and torch.equal(kept[key], fresh[key]) for key in fresh)
        kept["input_ids"] += 1  # the caller's own
    assert torch.equal(prepared.sample(0)["input_ids"], torch.tensor([0]))


@pytest.mark.ranks
@pytest.mark.parametrize("processes", [1, 2])
def test_a_kill_costs_the_chunks_in_work(processes: int, tmp_path: Path) -> None:
    numbers, folder = Numbers(192, tmp_path / "log", seconds=0.01), tmp_path / "cache"  # chunks of 6
    options = {"keep_samples": True, "processes": processes}
    first = FORK.Process(target=prepare, args=(numbers, folder), kwargs=options)
    first.start()
    while len(numbers.fetched()) < 60:
        time.sleep(0.02)
        assert first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    time.sleep(0.5)  # its own processes notice it
    before = numbers.fetched()
    time.sleep(0.3)
    assert numbers.fetched() == before and not is_prepared(folder), "it goes on although nobody waits for it"
    numbers.log.unlink()
    prepared = prepare(numbers, folder, **options)
    again = numbers.fetched()
    assert set(range(192)) - set(again) <= set(before)
    assert len(before) + len(again) - 192 <= 6 * processes
    assert not list(folder.rglob("*.tmp"))
    check(prepared, numbers)
    assert torch.equal(prepared.sample(191)["input_ids"], numbers.measure(191).sample["input_ids"])


def test_two_that_come_at_once_share_the_work(tmp_path: Path) -> None:
    numbers, folder = Numbers(128, tmp_path / "log", seconds=0.01), tmp_path / "cache"
    others = [FORK.Process(target=prepare, args=(numbers, folder)) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
        assert other.exitcode == 0
    assert sorted(numbers.fetched()) == list(range(128))
    check(Prepared(folder), numbers)


def test_one_that_comes_late_keeps_what_it_writes(tmp_path: Path) -> None:
    """Its description of the samples, say, while another that came with it has already prepared them."""
    numbers, folder = Numbers(6, tmp_path / "log"), tmp_path / "cache"
    folder.mkdir()
    with write_whole(folder / "rows.arrow") as file:
        prepare(numbers, folder)
        file.write(b"rows")
    assert (folder / "rows.arrow").read_bytes() == b"rows"


def test_files_that_a_killed_process_left_in_the_middle_are_not_believed(tmp_path: Path) -> None:
    numbers, folder = Numbers(128, tmp_path / "log"), tmp_path / "cache"
    (folder / "parts").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / "samples" / "000003").write_bytes(b"half")  # its part is not there: the rename came first
    (folder / "parts" / "000003.json.node.1.tmp").write_text('{"table": [[')
    (folder / "parts" / "000003.lock").touch()
    prepared = prepare(numbers, folder, keep_samples=True)
    check(prepared, numbers)
    assert torch.equal(prepared.sample(6)["input_ids"], numbers.measure(6).sample["input_ids"])


def test_bad_samples_are_looked_at_again_when_asked(tmp_path: Path) -> None:
    numbers, folder = Numbers(192, tmp_path / "log", bad=(5, 100)), tmp_path / "cache"
    prepare(numbers, folder, keep_samples=True)
    numbers.log.unlink()
    numbers.bad = (100,)
    assert forget_changed(folder, numbers.stamps())
    prepared = prepare(numbers, folder, keep_samples=True)
    assert sorted(numbers.fetched()) == [*range(6), *range(96, 102)]
    check(prepared, numbers)
    assert torch.equal(prepared.sample(5)["input_ids"], numbers.measure(5).sample["input_ids"])
    numbers.bad = ()
    assert forget_changed(folder, numbers.stamps()) and not prepare(numbers, folder, keep_samples=True).bad
    assert not forget_changed(folder, numbers.stamps())
    numbers.log.unlink()
    stamps = numbers.stamps()
    stamps[17] += 1
    assert forget_changed(folder, stamps)
    prepare(numbers, folder, keep_samples=True)
    assert sorted(numbers.fetched()) == [*range(12, 18)]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache: the cache .* cannot be written: .*cache_dir"):
        prepare(Numbers(3, tmp_path / "log"), tmp_path / "file" / "cache")


def test_an_error_in_a_process_is_raised(tmp_path: Path) -> None:
    class Broken(Numbers):
        def measure(self, index: int) -> Measured:
            raise ZeroDivisionError("a defect, not a bad sample")

    with pytest.raises(ZeroDivisionError):
        prepare(Broken(4, tmp_path / "log"), tmp_path / "cache", processes=2)


def test_what_is_stored_is_small_and_readable(tmp_path: Path) -> None:
    prepare(Numbers(100, tmp_path / "log", bad=(1,)), tmp_path / "cache")
    done = json.loads((tmp_path / "cache" / "done.json").read_text())
    assert done["bad"] == {"1": "row 1: spoilt"}
