"""Data files of every kind as one sequence of rows, each of which knows where it came from."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError, did_you_mean

Row = tuple[int, Any]
"""Number of the row from 1 (of its line, in a file of lines) and what it holds; `Unreadable` if that is no row."""


class Unreadable:
    """Stands where a row should be.

    Attributes:
        reason: why it cannot be read.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


class RowFiles:
    """The files of one data set, in order; names a row by its file and its line or number.

    Args:
        paths: files, folders (all data files below them that are not hidden, in the order of their names) and patterns.

    Raises:
        UserError: a file does not exist, is empty or is of a kind we do not read; names it.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = [file for path in paths for file in _expand(path)]
        self._readers = [_reader(path) for path in self.paths]

    def where(self, file: int, row: int) -> str:
        """Return ``file:line`` for a file of lines and ``file: row n`` (from 1) for others."""
        of_lines = self._readers[file] in (_read_lines, _read_text)
        return f"{self.paths[file]}:{row}" if of_lines else f"{self.paths[file]}: row {row}"

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield ``(file, row, value)`` for every row; a value is a dict, or `Unreadable`."""
        return self.rows()

    def rows(self, skip: int = 0) -> Iterator[tuple[int, int, Any]]:
        """Yield what ``__iter__`` does without the first ``skip`` rows of each file, which are not parsed."""
        for file, (path, read) in enumerate(zip(self.paths, self._readers, strict=True)):
            found = skip > 0
            for number, value in read(path, skip):
                found = True
                if not isinstance(value, dict | Unreadable):
                    value = Unreadable(f"a row must be a JSON object, found {type(value).__name__}")
                yield file, number, value
            if not found:
                raise UserError(f"{path}: holds no rows; expected one conversation per line or a JSON list of them")


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        # As with a pattern, what is hidden is none of it: what editors and notebooks put beside a file, say.
        named = (file for file in path.rglob("*") if not any(p[0] == "." for p in file.relative_to(path).parts))
        found = [file for file in named if file.suffix.lower() in _READERS and file.is_file()]
        if not found:
            raise UserError(f"{path}: the folder has no data files; expected {', '.join(_READERS)}")
    elif has_magic(str(path)) and not path.exists():
        found = [Path(file) for file in glob(str(path), recursive=True) if Path(file).is_file()]
        if not found:
            raise UserError(f"{path}: no file fits this pattern; check basic_parameters.dataset in data.json")
    else:
        found = [path]
    return sorted(found)


def _reader(path: Path) -> Callable[[Path, int], Iterator[Row]]:
    if not path.is_file():
        raise UserError(f"{path}: no such data file; check basic_parameters.dataset in data.json")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        kinds = ", ".join(_READERS)
        raise UserError(
            f"{path}: cannot read this kind of file; use one of {kinds}.{did_you_mean(path.suffix, _READERS)}"
        )
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    if not head:
        raise UserError(f"{path}: the data file is empty; expected one conversation per line or a JSON list of them")
    if reader is not _read_lines:
        return reader
    if head[:1] not in b"[{":
        raise UserError(
            f"{path}:1: not JSON: starts with {head[:20].decode('utf-8', 'replace')!r}; "
            "expected one object per line, or a list of objects"
        )
    return _read_list if head[:1] == b"[" else _read_lines


_BOM = b"\xef\xbb\xbf"


def _read_list(path: Path, skip: int) -> Iterator[Row]:
    # A byte that is no UTF-8 only spoils the row that it is in: it becomes a lone surrogate, which no text may have.
    text = path.read_bytes().removeprefix(_BOM).decode("utf-8", "surrogateescape")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: broken JSON: {error}") from None
    yield from islice(enumerate(rows, start=1), skip, None)


def _read_lines(path: Path, skip: int) -> Iterator[Row]:
    yield from ((number, _parse(line)) for number, line in islice(_lines(path), skip, None))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not empty, each with its number."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield number, line


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.rstrip().decode("utf-8"))
    except json.JSONDecodeError as error:
        return Unreadable(f"broken JSON: {error.msg} (column {error.colno}); each line must hold one object")
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 text at byte {error.start} of the line: {error.reason}; save the file as UTF-8")
    except (RecursionError, ValueError) as error:  # nested too deeply, a number of thousands of digits
        return Unreadable(f"broken JSON: {error}; each line must hold one object")


def _read_text(path: Path, skip: int) -> Iterator[Row]:
    found = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = (line.removeprefix(_BOM) if number == 1 else line).decode("utf-8", "surrogateescape")
            found += bool(text.strip())
            if text.strip() and found > skip:
                yield number, {"text": text.rstrip("\r\n")}


def _read_csv(path: Path, skip: int) -> Iterator[Row]:
    # The size of a field is checked with the row, not here.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = (row for row in csv.reader(file) if row)  # an empty line is no row
        header = next(rows)
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise UserError(f"{path}: the header names column {twice[0]!r} twice; rename one of them")
        for number, row in islice(enumerate(rows, start=1), skip, None):
            if len(row) != len(header):
                yield number, Unreadable(f"{len(row)} fields, the header names {len(header)} columns")
            else:
                yield number, dict(zip(header, row, strict=True))


def _read_parquet(path: Path, skip: int) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for index in range(max(0, skip - number), len(batch)):
                    yield number + index + 1, _arrow_row(batch, index)
                number += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet after row {number}: {error}") from None


def _arrow_row(batch: Any, index: int) -> Any:
    try:
        return {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 text: {error.reason}")


_READERS: dict[str, Callable[[Path, int], Iterator[Row]]] = {
    ".json": _read_lines,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
