"""A file of lines that a full disk does not stop."""

from __future__ import annotations

import os
import sys
from pathlib import Path


class PatientFile:
    """Appends text to a file; what cannot be written now is tried again at the next flush.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._complained = False
        self._pending = ""
        path.touch()

    def write(self, text: str) -> None:
        """Take text for the next flush."""
        self._pending += text

    def flush(self) -> None:
        """Write what was taken, all of it or nothing."""
        try:
            with open(self.name, "ab", buffering=0) as file:
                size, rest = file.tell(), self._pending.encode()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    os.truncate(self.name, size)
                    raise
            self._pending = ""
        except OSError as error:
            if not self._complained:
                sys.stderr.write(f"warning: cannot write {self.name}: {error.strerror}; its lines are kept for later\n")
            self._complained = True

    close = flush
