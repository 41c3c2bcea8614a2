"""The cache of one data set: which folder it is, its rows, and what is known of its samples."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.data.cache_key import cache_root, describe_samples, key_of
from mindspeed_mm.data.conversations import PLACEHOLDERS
from mindspeed_mm.data.encoding import EncodingOptions
from mindspeed_mm.data.preparation import Prepared, Report, Source, is_prepared, prepare, readable, writable
from mindspeed_mm.data.sample_store import write_whole
from mindspeed_mm.distributed.state import print_rank_0

if TYPE_CHECKING:
    import datasets

_ROWS = "rows.arrow"
_LINE_EVERY = 10.0  # seconds


class SampleCache:
    """Rows and sizes of a data set, and its samples where they are kept.

    Nothing is written before `prepare` is called, and nothing is read, not even to find the folder's name, where no
    cache has ever been written.

    Args:
        param: typed ``dataset_param``.
        options: of the encoder.
        files: with the rows.
        read: makes a conversation of a row; see `mindspeed_mm.data.formats.Format`.
        media_folder: that paths in the rows start from.
        max_samples: rows that are read.
    """

    def __init__(
        self,
        param: Any,
        options: EncodingOptions,
        files: list[Path],
        read: Callable[..., Any],
        media_folder: str,
        max_samples: int | None,
    ) -> None:
        basic = param.basic_parameters
        self.root = cache_root(basic.cache_dir)
        self.keep_samples: bool = basic.cache_samples
        self.processes = processes_per_rank(basic.preprocessing_num_workers)
        # Packing joins samples that are what they are.
        encoding = {key: value for key, value in asdict(options).items() if key not in ("folder", "packing")}
        self._of = (
            {
                "encoding": encoding,
                "attr": {key: value for key, value in param.attr.to_dict().items() if key != "packing"},
                "reader": inspect.getsource(read),
                "placeholders": PLACEHOLDERS,
                "media": os.path.abspath(media_folder),
                "max_samples": max_samples,
                "keep_samples": self.keep_samples,
            },
            files,
            Path(options.folder),
        )
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of exactly these samples."""
        if self._folder is None:
            self._about = describe_samples(*self._of)
            self._folder = self.root / key_of(self._about)
        return self._folder

    def rows(self, read: Callable[[], datasets.Dataset]) -> datasets.Dataset:
        """Return the rows: mapped from disk where the cache has them, otherwise what ``read`` returns.

        Rows with a problem are always read again: the file that was missing may be there now.
        """
        import datasets

        if not self.root.is_dir() or not (path := self.folder / _ROWS).exists():
            return read()
        with readable(self.folder):
            rows = datasets.Dataset.from_file(str(path))
        return read() if rows.data.column("problem").null_count < len(rows) else rows

    def prepared(self) -> Prepared | None:
        """Return what is known of the samples, None if they are not prepared."""
        return Prepared(self.folder) if self.root.is_dir() and is_prepared(self.folder) else None

    def prepare(self, source: Source, rows: datasets.Dataset, report: Report | None = None) -> Prepared:
        """Return what is known of the samples; see `mindspeed_mm.data.preparation.prepare`."""
        ready = self.prepared()
        if ready is not None:
            return ready
        self._save_rows(rows)
        return prepare(
            source,
            self.folder,
            keep_samples=self.keep_samples,
            processes=self.processes,
            report=report or ProgressLines(self.folder),
        )

    def _save_rows(self, rows: datasets.Dataset) -> None:
        import pyarrow as pa  # type: ignore[import-untyped]

        with writable(self.folder), write_whole(self.folder / "about.json") as file:
            file.write(json.dumps(self._about, indent=1).encode())
        with (
            writable(self.folder),
            write_whole(self.folder / _ROWS) as file,
            pa.ipc.new_stream(file, rows.data.schema) as stream,
        ):
            stream.write_table(rows.data.table, max_chunksize=1000)


class ProgressLines:
    """Prints on rank 0, every few seconds, how far the preparation is.

    Args:
        folder: of the cache, for the first line.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start: tuple[float, int] | None = None
        self._printed = 0.0

    def __call__(self, done: int, total: int) -> None:
        """See `mindspeed_mm.data.preparation.Report`."""
        now = time.monotonic()
        if self._start is None:
            self._start = (now, done)
            self._printed = now
            print_rank_0(f"preparing {total - done} of {total} samples, kept in {self._folder}")
        elif now - self._printed >= _LINE_EVERY:
            self._printed = now
            rate = (done - self._start[1]) / (now - self._start[0])
            left = f", about {(total - done) / rate / 60:.0f} min left" if rate else ""
            print_rank_0(f"prepared {done} of {total} samples, {rate:.0f} a second{left}")


def processes_per_rank(wanted: int | None) -> int:
    """Return how many processes each rank of a node starts to have ``wanted`` on the node, at least its own."""
    return max(1, (wanted or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
