"""The files beside the rows: images, videos, audio."""

from __future__ import annotations

import os
from pathlib import Path

from mindspeed_mm.data.formats import FormatError


def locate(path: str, folder: str | Path, kind: str) -> str:
    """Return the absolute path of a file of a row.

    ``path`` is looked for under ``folder``, then (published data sets write such paths) as it stands. In both cases
    the file must lie inside ``folder``; links inside the folder may lead out of it.

    Args:
        path: as the row has it.
        folder: ``basic_parameters.dataset_dir``.
        kind: ``images``, ``videos`` or ``audios``.

    Raises:
        FormatError: the file does not exist, or the path leads out of the folder.
    """
    name = f"{kind.removesuffix('s')} {path[:200]!r}"
    root = os.path.abspath(folder)
    inside = False
    for candidate in (os.path.join(root, path), path):
        candidate = os.path.abspath(candidate)
        if candidate.startswith(os.path.join(root, "")):
            inside = True
            if os.path.isfile(candidate):
                return candidate
    if not inside:
        raise FormatError(
            f"{name} is outside the data folder {root}; "
            f"move it inside, or set basic_parameters.dataset_dir to a folder that holds all {kind}"
        )
    raise FormatError(f"{name} not found in {root}; check the path and basic_parameters.dataset_dir")
