"""The commands ``mindspeed-mm data prepare`` and ``mindspeed-mm data inspect``."""

from __future__ import annotations

import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mindspeed_mm.configs.config import merge_mm_args
from mindspeed_mm.data.build import build_mm_dataset
from mindspeed_mm.data.datasets import ConversationDataset
from mindspeed_mm.data.inspection import length_histogram, render_samples, summarise
from mindspeed_mm.data.inspection_report import page, show
from mindspeed_mm.data.measuring import media_stamps
from mindspeed_mm.data.preparation import Prepared, Report, forget_changed
from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra


def prepare_command(options: Namespace, processes: int, overwrite: bool) -> None:
    """Prepare the samples of data.json, those that the cache does not have and those whose media files have changed.

    Args:
        options: ``mm_data`` and the flags of training that decide what samples are.
        processes: that do it.
        overwrite: prepare all samples again.
    """
    console = Console(stderr=True)
    for name, dataset in _data_sets(options).items():
        cache = dataset.cache
        assert cache is not None
        if overwrite:
            shutil.rmtree(cache.folder, ignore_errors=True)
        else:
            forget_changed(cache.folder, media_stamps(dataset.rows))
        prepared = _prepare(dataset, name, processes, console)
        print(f"{name}: {len(dataset):,} samples, {len(prepared.bad):,} of them bad, in {cache.folder}")
        for reason in list(prepared.bad.values())[:10]:
            print(f"  {reason}")


def inspect_command(options: Namespace, processes: int, samples: int, out: Path | None) -> None:
    """Show what the data of data.json are: numbers, bad rows, and rendered samples with what is trained on.

    Args:
        options: see `prepare_command`.
        processes: that prepare what the cache does not have.
        samples: how many to render of each data set.
        out: folder for ``report.html`` and ``lengths_<set>.png``; None shows it in the terminal only.
    """
    if out is not None:
        for module in ("jinja2", "matplotlib"):  # missing ones are named now, not after an hour of preparing
            import_extra(module, "report", "--out")
        out.mkdir(parents=True, exist_ok=True)
    console = Console()
    found = {}
    for name, dataset in _data_sets(options).items():
        summary = summarise(dataset, _prepare(dataset, name, processes, Console(stderr=True)))
        found[name] = (summary, list(render_samples(dataset, samples)))
        show(console, name, *found[name])
    if out is not None:
        for name, (summary, _) in found.items():
            (out / f"lengths_{name.replace('/', '_')}.png").write_bytes(length_histogram(summary, name))
        (out / "report.html").write_text(page(str(options.mm_data), found), encoding="utf-8")
        print(f"wrote {out / 'report.html'}")


def _prepare(dataset: ConversationDataset, name: str, processes: int, console: Console) -> Prepared:
    assert dataset.cache is not None
    dataset.cache.processes = processes
    with _progress(name, console) as report:
        return dataset.cache.prepare(dataset, dataset.rows, report)


@contextmanager
def _progress(name: str, console: Console) -> Iterator[Report]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(show_speed=True))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(f"preparing {name}", visible=False)  # there may be nothing to do
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _data_sets(options: Namespace) -> dict[str, ConversationDataset]:
    """Return the data sets of data.json by their names; bad rows are in them, with the reason."""
    for note in merge_mm_args(options):
        print(note)
    param: Any = options.mm.data.dataset_param
    if param is None:
        raise UserError(f"{options.mm_data}: has no dataset_param; data of your own loaders cannot be looked at")
    if param.dataset_type == "huggingface":
        param.basic_parameters.streaming = False  # what is streamed in training can still be looked at
    param.on_bad_sample, param.bad_sample_budget = "quarantine", sys.maxsize
    with tempfile.TemporaryDirectory() as param.quarantine_folder:
        made = build_mm_dataset(param)
    train, valid = made if isinstance(made, tuple) else (made, {})
    named = {f"valid_{name}": one for name, one in valid.items()} if isinstance(valid, dict) else {"valid": valid}
    sets: dict[str, ConversationDataset] = {}
    for name, one in {"train": train, **named}.items():
        parts = getattr(one, "parts", [one])  # several sets may be mixed into one
        sets |= {name if len(parts) == 1 else f"{name}_{number}": part for number, part in enumerate(parts)}
    return sets
