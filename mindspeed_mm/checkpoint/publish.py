"""Where checkpoints lie, how one becomes visible and how one is found.

A folder of checkpoints holds ``iter_0000100/`` (or ``release/`` for converted weights) and the tracker file that
names the newest. A checkpoint is written under a staging name, gets its manifest and is renamed when every byte is on
the disk; then the tracker is replaced. Whenever the job is killed, what the tracker names is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from mindspeed_mm.checkpoint import manifest
from mindspeed_mm.checkpoint.coordination import gather, rank, run_together, world_size
from mindspeed_mm.checkpoint.manifest import Part
from mindspeed_mm.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_STAGING = ".staging"
_REPLACED = ".replaced"
_REMOVED = ".removed"
_REMEDY = "Give the --save folder of an earlier run, or leave --load out to start from the initial weights."


def folder_name(iteration: int) -> str:
    """Return the name of an iteration's folder, ``iter_0000100``."""
    return f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """Return the iteration in a checkpoint folder's name, or None for ``release`` and anything else."""
    digits = folder.name.removeprefix("iter_")
    return int(digits) if folder.name.startswith("iter_") and digits.isascii() and digits.isdigit() else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the published checkpoints of a folder, the oldest first and ``release`` before them."""
    found = [p for p in folder.iterdir() if (p.name == RELEASE or iteration_of(p) is not None) and is_checkpoint(p)]
    return sorted(found, key=lambda path: -1 if (iteration := iteration_of(path)) is None else iteration)


def publish(
    save_dir: Path,
    name: str,
    write: Callable[[Path], Part],
    group: dist.ProcessGroup | None = None,
    validation_loss: float | None = None,
    keeper: bool | None = None,
) -> Path:
    """Write a checkpoint with ``write(staging_folder)`` on every rank, then make it the newest one.

    ``write`` must have its files on the disk (fsync) when it returns what it wrote. ``validation_loss`` goes into
    the manifest. ``keeper`` says whether this rank looks after the folder, see `disks.keeps`; by default rank 0 does.

    Raises:
        UserError: writing failed on some rank; raised on all. What was saved before is untouched.
    """
    final, staging = save_dir / name, save_dir / (name + _STAGING)
    keeper = rank() == 0 if keeper is None else keeper
    try:
        run_together(f"preparing {staging}", lambda: _prepare(save_dir, staging) if keeper else None, group)
        parts = gather(run_together(f"saving {final}", lambda: write(staging), group), group)

        def put_in_place() -> None:
            sealed = manifest.merge(
                parts, iteration=iteration_of(final) or 0, world_size=world_size(), validation_loss=validation_loss
            )
            manifest.write(staging, sealed)
            _put_in_place(staging, final)

        # One step after the other: what one disk's tracker names is in place on all of them.
        run_together(f"publishing {final}", lambda: put_in_place() if keeper else None, group)
        run_together(f"publishing {final}", lambda: _make_newest(final) if keeper else None, group)
    except (UserError, RuntimeError):
        if keeper:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def publish_copy(source: Path, save_dir: Path) -> Path:
    """Make a copy of a checkpoint the newest one of ``save_dir``, in one process.

    Raises:
        UserError: ``save_dir`` has one of that name.
    """
    iteration = iteration_of(source)
    name = RELEASE if iteration is None else folder_name(iteration)
    final, staging = save_dir / name, save_dir / (name + _STAGING)
    if final.exists():
        raise UserError(f"{final} exists already; remove it, or name another folder")
    _prepare(save_dir, staging)
    shutil.copytree(source, staging, copy_function=_copy_flushed, dirs_exist_ok=True)
    _put_in_place(staging, final)
    _make_newest(final)
    return final


def _copy_flushed(source: str, target: str) -> None:
    with open(source, "rb") as old, open(target, "wb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


def is_checkpoint(folder: Path) -> bool:
    """Return whether ``folder`` holds a distributed checkpoint, be it damaged. DCP writes its ``.metadata`` last."""
    return (folder / ".metadata").is_file() or (folder / manifest.NAME).is_file()


def is_hf_folder(folder: str | Path) -> bool:
    """Return whether ``folder`` holds a Hugging Face model, and no checkpoint."""
    folder = Path(folder)
    return (folder / "config.json").is_file() and not (folder / TRACKER).is_file() and not is_checkpoint(folder)


def find(load_dir: str | Path, step: int | None = None) -> Path:
    """Return the checkpoint to load: the tracker's, or iteration ``step``'s.

    ``load_dir`` is the folder that holds the tracker, or a checkpoint folder itself.

    Raises:
        UserError: there is none; says what was looked for and what is there instead.
    """
    load_dir = Path(load_dir)
    if not load_dir.is_dir():
        raise UserError(f"--load {load_dir}: no such folder. {_REMEDY}")
    if is_checkpoint(load_dir):
        return load_dir
    name = folder_name(step) if step is not None else read_tracker(load_dir)
    # A crash while a checkpoint of the same iteration was being replaced leaves the old one under this name.
    for folder in (load_dir / name, load_dir / (name + _REPLACED)):
        if is_checkpoint(folder):
            return folder
    wanted = f"--ckpt-step {step} asks for" if step is not None else f"its {TRACKER} names"
    raise UserError(
        f"--load {load_dir}: {wanted} {name}, which is no checkpoint (no {name}/.metadata). {_hint(load_dir)}"
    )


def find_all(load_dir: str | Path, step: int | None = None) -> tuple[list[Path], list[str]]:
    """Return what `find` does, or why there is none, and after it the older checkpoints, the newest first.

    Raises:
        UserError: there is none at all.
    """
    load_dir = Path(load_dir)
    first: list[Path] = []
    refused: list[str] = []
    try:
        first = [find(load_dir, step)]
        folder, newest = first[0].parent, iteration_of(first[0])
        if newest is None:
            return first, refused
    except UserError as error:
        refused, folder, newest = [str(error)], load_dir, step
        if not load_dir.is_dir() or not checkpoints_in(load_dir):
            raise
    older = [
        path
        for path in reversed(checkpoints_in(folder))
        if (iteration := iteration_of(path)) is not None and (newest is None or iteration < newest)
    ]
    return [*first, *older], refused


def read_tracker(load_dir: Path) -> str:
    """Return the name of the checkpoint folder that is the newest.

    Raises:
        UserError: there is no tracker file, or it names none.
    """
    tracker = load_dir / TRACKER
    if not tracker.is_file():
        raise UserError(f"--load {load_dir}: no checkpoint: there is no {TRACKER}. {_hint(load_dir)}")
    text = tracker.read_bytes().decode("ascii", "replace").strip()
    if text == RELEASE:
        return RELEASE
    if not text.isdigit():
        raise UserError(
            f"{tracker}: {text!r} is neither an iteration nor 'release'; pass --ckpt-step. {_hint(load_dir)}"
        )
    return folder_name(int(text))


def _hint(load_dir: Path) -> str:
    """Say what a folder without the wanted checkpoint does hold, and what to do about it."""
    present = [p.name for p in checkpoints_in(load_dir)]
    if present:
        return f"It holds {', '.join(present)}: pass --ckpt-step with one of these iterations, or the folder itself."
    if is_hf_folder(load_dir):
        return (
            "It is a Hugging Face folder, which holds weights and no run: training starts from it with --load and "
            "without --ckpt-step, and puts adapters on it with --load-base-model."
        )
    if any(load_dir.glob("*/mp_rank_0*")) or any(load_dir.glob("mp_rank_0*")):
        return "It holds a checkpoint in Megatron's `torch` format, which this road does not read."
    below = sorted(p.parent.name for p in load_dir.glob(f"*/{TRACKER}"))
    if below:
        return f"Did you mean its folder {below[0]}?"
    names = sorted(p.name for p in load_dir.iterdir())[:8]
    found = f"It holds {', '.join(names)}." if names else "The folder is empty."
    return f"{found} {_REMEDY}"


def _prepare(save_dir: Path, staging: Path) -> None:
    save_dir.mkdir(parents=True, exist_ok=True)
    clean_up(save_dir)
    staging.mkdir()


def clean_up(save_dir: Path) -> None:
    """Remove what a run that was killed while saving has left, and give a checkpoint its name back."""
    for leftover in [*_ours(save_dir, _STAGING), *_ours(save_dir, _REMOVED)]:
        shutil.rmtree(leftover)
    for old in _ours(save_dir, _REPLACED):
        final = old.with_suffix("")
        if is_checkpoint(final):
            shutil.rmtree(old)
        else:
            old.rename(final)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint: it is none any more at once, also when the process is killed before all files are gone."""
    doomed = checkpoint.with_name(checkpoint.name + _REMOVED)
    checkpoint.rename(doomed)
    fsync_folder(doomed.parent)
    shutil.rmtree(doomed)


def _ours(save_dir: Path, suffix: str) -> list[Path]:
    return [*save_dir.glob(f"iter_*{suffix}"), *save_dir.glob(RELEASE + suffix)]


def _put_in_place(staging: Path, final: Path) -> None:
    fsync_folder(staging)
    if final.exists():
        final.rename(_replaced(final))
    staging.rename(final)
    fsync_folder(final.parent)


def _make_newest(final: Path) -> None:
    tracker = final.parent / TRACKER
    temporary = tracker.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(RELEASE if final.name == RELEASE else str(int(final.name.removeprefix("iter_"))))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(tracker)
    fsync_folder(final.parent)
    shutil.rmtree(_replaced(final), ignore_errors=True)


def _replaced(final: Path) -> Path:
    return final.with_name(final.name + _REPLACED)


def fsync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: without it a rename may not survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
