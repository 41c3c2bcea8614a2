"""``mindspeed-mm checkpoint``: list, show, verify, diff and prune. Heavy imports wait until a command runs."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mindspeed_mm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_mm.checkpoint.integrity import Condition

app = typer.Typer(help="Look at checkpoints, check, compare and delete them.", no_args_is_help=True)

_Folder = Annotated[Path, typer.Argument(help="The --save folder of a run.")]
_Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint (iter_0000100), or a run's folder for its newest.")]
_Any = Annotated[Path, typer.Argument(help="A checkpoint, a run's folder, a DCP folder or a Hugging Face folder.")]


@app.command("list")
def list_checkpoints(folder: _Folder) -> None:
    """List the checkpoints of a run. Files are checked by their sizes only."""
    from mindspeed_mm.checkpoint.integrity import inspect

    published, newest = _published(folder), _tracked(folder)
    table = new_table("checkpoint", "saved", "size", "ranks", "validation loss", "")
    for path in published:
        condition = inspect(path, quick=True)
        known = condition.manifest
        table.add_row(
            path.name,
            f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M:%S}",
            _size(sum(file.stat().st_size for file in path.iterdir() if file.is_file())),
            str(known.world_size) if known else "?",
            "" if known is None or known.validation_loss is None else f"{known.validation_loss:.6g}",
            "; ".join([*(["newest"] if path.name == newest else []), *_remarks(condition)]),
        )
    print_table(table)


@app.command()
def show(checkpoint: _Checkpoint) -> None:
    """Show what a checkpoint holds: versions, arguments, files, tensors."""
    from mindspeed_mm.checkpoint import manifest
    from mindspeed_mm.checkpoint.publish import find
    from mindspeed_mm.checkpoint.python_state import read_python_state
    from mindspeed_mm.checkpoint.store import STATE

    path = find(checkpoint)
    known = manifest.read(path)
    lines = new_table("key", "value", title=str(path))
    if known:
        for key, value in {
            "iteration": known.iteration,
            "world size": known.world_size,
            "validation loss": known.validation_loss,
            **known.versions,
            "files": f"{len(known.files)}, {_size(known.bytes)}",
            "tensors": len(known.tensors),
        }.items():
            lines.add_row(key, "" if value is None else str(value))
    else:
        lines.add_row(manifest.NAME, "none: saved by an older version or another program")
    if (path / STATE).is_file():
        state = read_python_state(path / STATE)
        lines.add_row("consumed samples", str(state["extra"].get("consumed_train_samples", "")))
        for key, value in sorted(state["extra"].get("args", {}).items()):
            lines.add_row(f"args.{key}", str(value))
    print_table(lines)
    if known:
        tensors = new_table("tensor", "shape", "dtype", "digest")
        for name, record in known.tensors.items():
            tensors.add_row(name, str(tuple(record.shape)), record.dtype, record.digest)
        print_table(tensors)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint, or a run's folder for all of its checkpoints.")],
) -> None:
    """Compare every file with its checksum. Exit code 1 when one is damaged."""
    from mindspeed_mm.checkpoint.integrity import inspect
    from mindspeed_mm.checkpoint.publish import find, is_checkpoint

    alone = is_checkpoint(folder)
    damaged = False
    for path in [folder] if alone else _published(folder):
        condition = inspect(path)
        damaged |= not condition.good
        print(f"{path}: {'; '.join(_remarks(condition)) or 'good'}", flush=True)
        for problem in condition.problems:
            print(f"  {problem}", flush=True)
    if not alone:
        try:
            find(folder)
        except UserError as error:
            print(error)
            damaged = True
    raise typer.Exit(int(damaged))


@app.command()
def diff(
    a: _Any,
    b: _Any,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer's state out.")] = False,
) -> None:
    """Say which tensors differ, and by how much. Exit code 1 when some do.

    Equal tensors of checkpoints with a manifest are known by their digests and not read.
    """
    from mindspeed_mm.checkpoint.compare import differences

    count, found = differences(a, b, weights_only=weights_only)
    if found:
        table = new_table("tensor", "max abs", "relative L2", "")
        for difference in found:
            numbers = (difference.max_abs, difference.relative_l2)
            table.add_row(difference.name, *(f"{n:.3e}" if n == n else "" for n in numbers), difference.reason)
        print_table(table)
    print(f"{count - len(found)} of {count} tensors are equal")
    raise typer.Exit(int(bool(found)))


@app.command()
def prune(
    folder: _Folder,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Keep so many of the newest.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Keep those of multiples of so many steps.")] = None,
    keep_best: Annotated[int | None, typer.Option(min=1, help="Keep so many with the lowest validation loss.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete checkpoints. The tracker's and the newest good one always stay."""
    from mindspeed_mm.checkpoint.publish import remove
    from mindspeed_mm.checkpoint.retention import Retention, reasons_to_keep

    keep = Retention(keep_last, keep_every, keep_best)
    if not keep:
        raise UserError("say what to keep: --keep-last, --keep-every, --keep-best")
    _published(folder)
    table = new_table("checkpoint", "")
    for path, reason in reasons_to_keep(folder, keep, quick=False).items():
        table.add_row(path.name, f"stays: {reason}" if reason else "would be deleted" if dry_run else "deleted")
        if not reason and not dry_run:
            remove(path)
    print_table(table)


def _published(folder: Path) -> list[Path]:
    from mindspeed_mm.checkpoint.publish import checkpoints_in, find

    if folder.is_dir() and (found := checkpoints_in(folder)):
        return found
    find(folder)  # says what is there instead
    raise UserError(f"{folder} is a checkpoint; pass the folder that holds it")


def _tracked(folder: Path) -> str | None:
    from mindspeed_mm.checkpoint.publish import read_tracker

    try:
        return read_tracker(folder)
    except UserError:
        return None


def _remarks(condition: Condition) -> list[str]:
    unlisted = [f"not in the manifest: {', '.join(condition.unlisted)}"] if condition.unlisted else []
    if not condition.good:
        return ["DAMAGED", *unlisted]
    return unlisted if condition.manifest else ["cannot be verified: no manifest"]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def new_table(*columns: str, title: str | None = None) -> Any:
    """Return a table for the terminal, without lines between its cells."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_table(table: Any) -> None:
    """Print a table, folded to the terminal's width."""
    import sys

    from rich.console import Console

    # Into a file or a pipe a line is never folded: it is for other programs.
    # Names and values are what they are: "[/a]" in a path is no markup.
    Console(width=None if sys.stdout.isatty() else 500, markup=False, emoji=False).print(table)
