"""The files beside the rows or in them: images, videos, audio."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mindspeed_mm.data.formats import FormatError
from mindspeed_mm.data.preparation import writable
from mindspeed_mm.data.sample_store import write_whole


def locate(path: str, folder: str | Path, kind: str) -> str:
    """Return the absolute path of a file of a row.

    ``path`` is looked for under ``folder``, then (published data sets write such paths) as it stands. In both cases
    the file must lie inside ``folder``; links inside the folder may lead out of it.

    Args:
        path: as the row has it.
        folder: ``basic_parameters.dataset_dir``.
        kind: ``images``, ``videos`` or ``audios``.

    Raises:
        FormatError: the file does not exist, the path leads out of the folder, or it is no text.
    """
    name = f"{kind.removesuffix('s')} {path[:200]!r}"
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{name} is not UTF-8 text; rename the file") from None
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


def keep(content: bytes, folder: Path | None, kind: str) -> str:
    """Return the absolute path of a file that a row holds itself, which is written unless it is there already.

    Its name is its checksum: rows with the same picture, and other ranks, find it there.

    Args:
        content: of the file.
        folder: for such files.
        kind: ``images``, ``videos`` or ``audios``.

    Raises:
        FormatError: there is no folder for them.
        UserError: the folder cannot be written to.
    """
    if folder is None:
        raise FormatError(f"column of {kind}: must be file names here, found the content of a file")
    name = hashlib.sha256(content).hexdigest()
    path = folder.absolute() / name[:2] / name
    # The size tells a whole file from one that a power cut has left: flushing each would take longer than all else.
    if not (path.is_file() and path.stat().st_size == len(content)):
        with writable(path.parent), write_whole(path, flush=False) as file:
            file.write(content)
    return str(path)
