"""Read conversations of any layout into one table, and find every mistake in them before the first step.

A row becomes ``{messages: [{role, content, tool_calls}], images: [path], videos: [path], audios: [path], tools,
problem, file, row}``. ``file`` and ``row`` say where it came from; ``problem`` says why it cannot be trained on and is
null for a good one; ``tools`` and ``tool_calls`` are JSON text or null. The table is Arrow memory without Python
objects, so forked loader workers share it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.data.formats import Format, FormatError, text
from mindspeed_mm.data.media import keep, locate
from mindspeed_mm.data.quarantine import BadSample
from mindspeed_mm.data.rows import RowFiles, Unreadable

if TYPE_CHECKING:
    import datasets

PLACEHOLDERS = {
    "images": os.environ.get("IMAGE_PLACEHOLDER", "<image>"),
    "videos": os.environ.get("VIDEO_PLACEHOLDER", "<video>"),
    "audios": os.environ.get("AUDIO_PLACEHOLDER", "<audio>"),
}
_BATCH = 1000


def read_conversations(
    files: RowFiles,
    read: Format,
    attr: Any,
    media_folder: str | Path,
    max_samples: int | None = None,
    keep_bad: bool = False,
    embedded: Path | None = None,
) -> datasets.Dataset:
    """Read, check and align the rows of ``files``.

    Nothing is decoded here: an image only has to exist.

    Args:
        files: what to read.
        read: makes a conversation of a row.
        attr: names of columns and tags (``dataset_param.attr``), for ``read``.
        media_folder: paths of images, videos and audio are relative to it and must stay inside it.
        max_samples: keep this many rows from the start; later rows are not read.
        keep_bad: keep a bad row in its place, with its ``problem``.
        embedded: folder for the images, videos and audio that the rows hold themselves.

    Raises:
        UserError: a file cannot be read.
        BadSample: a row is bad and ``keep_bad`` is off; names file, row, the value found and the fix.
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    message = pa.struct([(name, pa.string()) for name in ("role", "content", "tool_calls")])
    columns = [("messages", pa.list_(message)), *((name, pa.list_(pa.string())) for name in PLACEHOLDERS)]
    schema = pa.schema([*columns, ("tools", "string"), ("problem", "string"), ("file", "int32"), ("row", "int32")])

    rows = iterate_conversations(files, read, attr, media_folder, max_samples, keep_bad, embedded=embedded)
    batches = []
    while chunk := list(islice(rows, _BATCH)):
        batches.append(pa.RecordBatch.from_pylist(chunk, schema=schema))
    return datasets.Dataset(datasets.table.InMemoryTable(pa.Table.from_batches(batches, schema=schema)))


def iterate_conversations(
    files: RowFiles,
    read: Format,
    attr: Any,
    media_folder: str | Path,
    max_samples: int | None = None,
    keep_bad: bool = False,
    skip: int = 0,
    embedded: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows one by one, without the first ``skip`` of each file; see :func:`read_conversations`."""
    for file, row, value in islice(files.rows(skip), max_samples):
        try:
            if isinstance(value, Unreadable):
                raise FormatError(value.reason)
            found = {**_conversation(_read(value, read, attr), attr, media_folder, embedded), "problem": None}
        except FormatError as error:
            if not keep_bad:
                raise BadSample(files.where(file, row), str(error)) from None
            found = {"problem": str(error).encode("utf-8", "backslashreplace").decode()}
        yield {**found, "file": file, "row": row}


def _read(row: Mapping[str, Any], read: Format, attr: Any) -> Mapping[str, Any]:
    try:
        found = read(row, attr)
        for number, message in enumerate(found["messages"], start=1):
            text(message["role"], f"message {number}: the role")
            text(message["content"], f"message {number}: the content")
        for kind in PLACEHOLDERS:
            for file in found.get(kind) or []:
                if not isinstance(file, bytes):
                    text(file, f"a file of {kind!r}")
        return found
    except FormatError:
        raise
    except Exception as error:  # a function of the user's that a row is too much for
        problem = f"{type(error).__name__}: {error}"
        raise FormatError(f"the format {attr.get('formatting')!r} cannot read this row: {problem}") from error


def _conversation(
    found: Mapping[str, Any], attr: Any, media_folder: str | Path, embedded: Path | None
) -> dict[str, Any]:
    messages = [_message(message, number) for number, message in enumerate(found["messages"], start=1)]
    _check_turns([message["role"] for message in messages])
    row: dict[str, Any] = {"messages": messages, "tools": _json_or_none(found.get("tools"))}
    for kind, placeholder in PLACEHOLDERS.items():
        files = found.get(kind) or []
        marks = sum(message["content"].count(placeholder) for message in messages)
        name = getattr(attr, kind, None)
        # Who does not read a column of audio may well write about "<audio>".
        if marks != len(files) and (files or name or kind == "images"):
            place = f"{len(files)} file(s) in column {name!r}" if name else f"attr.{kind} names no column"
            raise FormatError(
                f"{marks} {placeholder} placeholder(s) in the messages but {place}; write one placeholder for each file"
            )
        row[kind] = [
            keep(file, embedded, kind) if isinstance(file, bytes) else locate(file, media_folder, kind)
            for file in files
        ]
    return row


def _message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    content = message["content"]
    if "\0" in content:
        raise FormatError(f"message {number} has a NUL character, which no text has; remove the row")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"message {number} is not UTF-8 text at character {error.start}; repair the text") from None
    return {"role": message["role"], "content": content, "tool_calls": _json_or_none(message.get("tool_calls"))}


def _json_or_none(value: Any) -> str | None:
    try:
        return None if value is None else json.dumps(value)
    except (TypeError, ValueError) as error:  # a table may hold dates and bytes
        raise FormatError(f"tools and calls of functions must be JSON values: {error}; found {value!r:.80}") from None


_AFTER: dict[str, tuple[str, ...]] = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_turns(roles: list[str]) -> None:
    """Demand an optional system turn, then user and assistant in turn, an assistant last; or one document."""
    if roles == ["document"]:
        return
    turns = roles[1:] if roles[:1] == ["system"] else roles
    before = ""
    for number, role in enumerate(turns, start=1 + len(roles) - len(turns)):
        if role not in _AFTER[before]:
            raise FormatError(
                f"message {number} is from {role!r}, expected {' or '.join(map(repr, _AFTER[before]))}; turns must "
                "alternate user, assistant after an optional system turn"
            )
        before = role
    if before != "assistant":
        raise FormatError(
            f"the conversation must end with an assistant turn, found {' '.join(roles[-4:]) or 'no turn'}"
        )
