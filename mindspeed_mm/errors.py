"""The one exception type for mistakes a user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the command line, a config file, the data or a checkpoint.

    The message names the place (file, line, key or flag), the value found and the fix. It is printed as it
    stands, once for the whole job and without a traceback, so it must be readable by itself.
    """


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the candidate closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
