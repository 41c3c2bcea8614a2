"""Hosts with disks of their own: every rank here has another folder, as ranks of different hosts under one name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mindspeed_mm.checkpoint import disks, store
from mindspeed_mm.checkpoint.integrity import inspect
from mindspeed_mm.checkpoint.publish import TRACKER
from mindspeed_mm.errors import UserError
from tests.checkpoint import small
from tests.ranks import RankPool

SHARED = [".metadata", "state.pt"]  # what rank 0 writes for all


@contextmanager
def own_disk(root: Path) -> Iterator[Path]:
    local_rank, patience = os.environ["LOCAL_RANK"], disks._PATIENCE_SECONDS
    os.environ["LOCAL_RANK"], disks._PATIENCE_SECONDS = "0", 0.5
    try:
        yield root / f"disk_{dist.get_rank()}"
    finally:
        os.environ["LOCAL_RANK"], disks._PATIENCE_SECONDS = local_rank, patience


def keeps_shared(folder: Path) -> bool:
    return disks.keeps(folder)


def save_apart(root: Path, steps: int) -> dict[str, Any]:
    """Train and save on disks of their own, and return what was saved."""
    with own_disk(root) as folder:
        assert disks.keeps(folder)
        model, optimizer = small.build(0)
        small.train(model, optimizer, range(steps))
        snapshot = store.take_snapshot(
            steps, model=model, optimizer=optimizer, extra={"samples": steps}, rank_state=small.rank_state()
        )
        store.write_snapshot(folder, snapshot, keeper=True)
        return small.full_state(model, optimizer)


def load_apart(root: Path) -> dict[str, Any] | str:
    """Load from disks of their own; return what was loaded, or the error."""
    with own_disk(root) as folder:
        try:
            state, loaded = small.load_into_fresh(folder)
        except UserError as error:
            return str(error)
        assert loaded.extra == {"samples": loaded.iteration} and loaded.rank_state is not None
        assert loaded.rank_state["position"] == 10 + dist.get_rank()
        return state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def saved(ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("apart")
    return root, ranks2.run(save_apart, root, 2)[0]


@pytest.fixture
def apart(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    shutil.copytree(saved[0], tmp_path / "apart")
    return tmp_path / "apart", saved[1]


def test_a_disk_that_is_shared_has_one_keeper(ranks2: RankPool, tmp_path: Path) -> None:
    assert ranks2.run(keeps_shared, tmp_path / "ckpt") == [True, False]
    assert names(tmp_path / "ckpt") == []


def test_each_disk_has_what_its_ranks_saved(saved: tuple[Path, dict[str, Any]]) -> None:
    root = saved[0]
    for number in range(2):
        folder = root / f"disk_{number}"
        assert names(folder) == ["iter_0000002", TRACKER] and (folder / TRACKER).read_text() == "2"
        own = [f"__{number}_0.distcp", "manifest.json", f"rank_{number}.pt"]
        assert names(folder / "iter_0000002") == sorted([*own, *(SHARED if number == 0 else [])])


def test_a_load_gives_each_disk_what_it_lacks(apart: tuple[Path, dict[str, Any]], ranks2: RankPool) -> None:
    root, state = apart
    for loaded in ranks2.run(load_apart, root):
        small.assert_same(state, loaded)
    for number in range(2):
        condition = inspect(root / f"disk_{number}" / "iter_0000002")
        assert condition.good and condition.manifest and not condition.unlisted


def test_a_new_disk_is_given_everything(apart: tuple[Path, dict[str, Any]], ranks2: RankPool) -> None:
    root, state = apart
    ranks2.run(load_apart, root)
    shutil.rmtree(root / "disk_0")
    for loaded in ranks2.run(load_apart, root):
        small.assert_same(state, loaded)
    assert inspect(root / "disk_0" / "iter_0000002").good


def test_what_no_disk_has_is_named(apart: tuple[Path, dict[str, Any]], ranks2: RankPool) -> None:
    root, _ = apart
    shutil.rmtree(root / "disk_1")
    for error in ranks2.run(load_apart, root):
        assert "is damaged and is not loaded" in error
        assert "__1_0.distcp is missing" in error and "rank_1.pt is missing" in error
        assert "state.pt" not in error


@pytest.mark.parametrize("disk", [0, 1])
def test_a_damaged_copy_is_found_on_the_disk_it_is_on(
    apart: tuple[Path, dict[str, Any]], ranks2: RankPool, disk: int
) -> None:
    root, _ = apart
    ranks2.run(load_apart, root)
    file = root / f"disk_{disk}" / "iter_0000002" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for error in ranks2.run(load_apart, root):
        assert "__0_0.distcp is not what was saved: its checksum differs" in error


def test_a_file_is_not_copied_from_a_disk_on_which_it_is_damaged(
    apart: tuple[Path, dict[str, Any]], ranks2: RankPool
) -> None:
    root, _ = apart
    file = root / "disk_1" / "iter_0000002" / "__1_0.distcp"
    file.write_bytes(b"x" * file.stat().st_size)
    for error in ranks2.run(load_apart, root):
        assert "damaged on the disk of rank 1" in error and "__1_0.distcp" in error
    assert not [name for name in names(root / "disk_0" / "iter_0000002") if name.startswith("__1")]


def test_different_checkpoints_of_one_name_are_refused(
    apart: tuple[Path, dict[str, Any]], ranks2: RankPool, tmp_path: Path
) -> None:
    root, _ = apart
    small.save_after(tmp_path / "other", 2)
    shutil.rmtree(root / "disk_1")
    shutil.copytree(tmp_path / "other", root / "disk_1")
    for error in ranks2.run(load_apart, root):
        assert "is not the same checkpoint on" in error
