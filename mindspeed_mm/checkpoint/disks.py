"""Folders that the hosts of a job share, or have each on a disk of its own."""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist

from mindspeed_mm.checkpoint import manifest
from mindspeed_mm.checkpoint.coordination import gather, group_position, rank, run_together
from mindspeed_mm.checkpoint.manifest import FileRecord
from mindspeed_mm.distributed.state import RankInfo, print_rank_0
from mindspeed_mm.errors import UserError

_PATIENCE_SECONDS = 10.0  # a network file system may show a new file late
_BLOCK = 64 * 2**20
_PARTIAL = ".partial"


def keeps(folder: str | Path) -> bool:
    """Return whether this rank looks after ``folder``, which is made if it is not there. A collective.

    One rank of each disk does: rank 0, and where hosts have disks of their own there, the first rank on each of them.

    Raises:
        UserError: a host cannot write there; raised on all ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return True
    folder = Path(folder)
    token = gather(uuid.uuid4().hex)[0]
    mark = folder / f".seen_{token}_{rank()}"
    writes = RankInfo.from_environment().local_rank == 0 or rank() == 0

    def write() -> int | None:
        if not writes:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        return rank()

    def look(writers: set[int]) -> int:
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            seen = {int(path.name.rpartition("_")[2]) for path in folder.glob(f".seen_{token}_*")}
            if seen == writers or (seen and time.monotonic() > until):
                return min(seen)
            if time.monotonic() > until:
                raise UserError(f"{folder}: rank {rank()} ({socket.gethostname()}) does not see its host's other ranks")
            time.sleep(0.2)

    try:
        writers = {number for number in gather(run_together(f"preparing {folder}", write)) if number is not None}
        first = run_together(f"looking into {folder}", lambda: look(writers))
        disks = sorted(set(gather(first)))
    finally:
        if writes:
            mark.unlink(missing_ok=True)
    if len(disks) > 1:
        print_rank_0(
            f" {folder} is not on one disk: ranks {', '.join(map(str, disks))} are the first on theirs. A disk keeps "
            "what its ranks save, and is given the files of the others when a checkpoint is loaded"
        )
    return bool(first == rank())


def complete(path: Path, group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Give every disk the files of the checkpoint ``path`` that it lacks and another one has. A collective.

    A file that no disk has is left to the check that follows.

    Returns:
        This rank's number among the ranks that see the same disk as it does, and how many they are.

    Raises:
        UserError: the hosts have different checkpoints of that name, or one cannot be written to.
    """
    what = f"looking for {path}"
    views = gather(run_together(what, lambda: _look(path), group), group)
    disks = [view.disk for view in views]
    me, _ = group_position(group)
    here = [number for number, disk in enumerate(disks) if disk == disks[me]]
    share = here.index(me), len(here)
    known = {view.manifest for view in views} - {None}
    if len(set(disks)) == 1 or not known:
        return share
    if len(known) > 1:
        hosts = sorted({view.host for view in views})
        raise UserError(f"{path} is not the same checkpoint on {', '.join(hosts)}; remove those that are not wanted")

    source = next(number for number, view in enumerate(views) if view.manifest)
    read = run_together(f"reading {path}", lambda: manifest.read(path) if me == source else None, group)
    files: dict[str, FileRecord | None] = dict(gather(read, group)[source].files)
    files[manifest.NAME] = None  # last: with it a folder is a checkpoint
    names = run_together(what, lambda: {file.name for file in path.iterdir()} if path.is_dir() else set(), group)
    there = gather(names, group)
    firsts = sorted({disks.index(disk) for disk in disks})
    copied = 0
    for name, record in files.items():
        lacking = [number for number in firsts if name not in there[number]]
        owner = next((number for number in firsts if name in there[number]), None)
        if lacking and owner is not None:
            _copy(path / name, record, owner, me in lacking, group)
            copied += 1
    if copied:
        print_rank_0(f" {path}: {copied} files were copied to disks of hosts that did not have them")
    return share


@dataclass(frozen=True)
class _View:
    """What a rank sees of a checkpoint: on which disk, and which; None without a manifest."""

    host: str
    disk: object
    manifest: str | None


def _look(path: Path) -> _View:
    host, file = socket.gethostname(), path / manifest.NAME
    if not file.is_file():
        return _View(host, (path.is_dir(), host), None)
    content, status = file.read_bytes(), file.stat()
    # Device numbers differ between the hosts of one network disk; two disks do not agree in both of these.
    return _View(host, (status.st_ino, status.st_mtime_ns), hashlib.sha256(content).hexdigest())


def _copy(file: Path, record: FileRecord | None, owner: int, wanted: bool, group: dist.ProcessGroup | None) -> None:
    """Send a file from rank ``owner`` of ``group`` to those that want it. A collective."""
    what, begun = f"copying {file}", file.with_name(file.name + _PARTIAL)
    sender = owner if group is None else dist.get_global_rank(group, owner)
    sends = dist.get_rank(group) == owner
    with ExitStack() as opened:

        def start() -> tuple[BinaryIO | None, BinaryIO | None]:
            if wanted:
                file.parent.mkdir(parents=True, exist_ok=True)
            return (
                opened.enter_context(open(file, "rb")) if sends else None,
                opened.enter_context(open(begun, "wb")) if wanted else None,
            )

        source, target = run_together(what, start, group)
        while True:
            block = [run_together(what, lambda: source.read(_BLOCK) if source else b"", group)]
            dist.broadcast_object_list(block, src=sender, group=group)
            if not block[0]:
                break
            run_together(what, partial(target.write, block[0]) if target else lambda: None, group)

        def finish() -> None:
            if target:
                target.flush()
                os.fsync(target.fileno())
                if record and (problem := manifest.what_changed(begun, record)):
                    begun.unlink()
                    raise UserError(f"{file.parent} is damaged on the disk of rank {sender}: {problem}")
                begun.replace(file)

        run_together(what, finish, group)
