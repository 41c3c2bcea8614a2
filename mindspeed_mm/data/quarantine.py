"""What a bad sample is, and the list of those that a run has left out."""

from __future__ import annotations

import fcntl
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError

QUARANTINE_FILE = "quarantine.jsonl"


class BadSample(UserError):
    """A row that cannot be trained on. The file it is in is all right otherwise.

    Args:
        where: names the file and the row, for messages.
        reason: what is wrong with it, and what to do.

    Attributes:
        file: as data.json names it; None until the data set fills it in.
        row: line or number of the row, from 1.
    """

    def __init__(self, where: str, reason: str = "") -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason
        self.file: str | None = None
        self.row: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.reason else self.where

    def at(self, file: str, row: int) -> BadSample:
        """Return self, with the place filled in."""
        self.file, self.row = file, row
        return self


class Quarantine:
    """Lists the bad samples of a run in ``quarantine.jsonl``, one ``{"file", "row", "reason"}`` a line.

    A bad sample keeps its place in the order, as a short one without any target. So the order does not depend on
    which samples are bad, and neither a resumed run nor one on another number of ranks trains on anything else.

    All ranks write to the same file, each line once; the file is locked meanwhile.

    Args:
        folder: where the file lies.
        budget: how many bad samples to put up with: a number (int), or a share (float) of ``rows``, rounded up.
        rows: of all data sets of the run.
    """

    def __init__(self, folder: str | Path, budget: int | float, rows: int) -> None:
        self.path = Path(folder) / QUARANTINE_FILE
        self.limit = math.ceil(budget * rows) if isinstance(budget, float) else budget
        self._allowed = f"{budget} of {rows} rows" if isinstance(budget, float) else str(budget)
        self._known: set[tuple[Any, Any]] = set()

    def add(self, samples: Iterable[BadSample]) -> None:
        """List those samples that are not listed yet.

        Raises:
            UserError: there are more than the budget allows, or the list is damaged.
        """
        new = {(bad.file, bad.row): bad for bad in samples if (bad.file, bad.row) not in self._known}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="ascii", errors="surrogateescape") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)  # the only lock that network file systems know
            file.seek(0)
            text = file.read()
            whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
            file.truncate(len(whole))
            self._known = set(_entries(self.path, whole))
            new = {key: bad for key, bad in new.items() if key not in self._known}
            file.writelines(
                json.dumps({"file": bad.file, "row": bad.row, "reason": bad.reason}) + "\n" for bad in new.values()
            )
        self._known |= new.keys()
        if len(self._known) > self.limit:
            last = f" The last: {str(list(new.values())[-1]).rstrip('.')}." if new else ""
            raise UserError(
                f"{self.path}: {len(self._known)} bad samples are more than dataset_param.bad_sample_budget allows "
                f"({self._allowed}).{last} Repair the data, or raise the budget."
            )


def _entries(path: Path, text: str) -> dict[tuple[Any, Any], dict[str, Any]]:
    try:
        return {(entry["file"], entry["row"]): entry for entry in map(json.loads, text.splitlines())}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no list of bad samples: {error}; repair it, or move it away") from error


def start_over(folder: str | Path) -> None:
    """Put the list of another run aside, as ``quarantine.jsonl.old``. One rank calls it, before the data is read."""
    path = Path(folder) / QUARANTINE_FILE
    if path.exists():
        path.replace(path.with_suffix(".jsonl.old"))


def summarise(folder: str | Path) -> str | None:
    """Sort the list of a finished run, and return a line about it; None when nothing was quarantined.

    One rank calls it, when all have finished.
    """
    path = Path(folder) / QUARANTINE_FILE
    if not path.exists():
        return None
    entries = _entries(path, path.read_text(encoding="ascii", errors="surrogateescape"))
    new = path.with_suffix(".jsonl.new")
    new.write_text("".join(json.dumps(entries[key]) + "\n" for key in sorted(entries)), encoding="utf-8")
    new.replace(path)
    files = Counter(file for file, _ in sorted(entries))
    return f"{len(entries)} bad sample(s) were left out ({', '.join(f'{n} of {f}' for f, n in files.items())}): {path}"
