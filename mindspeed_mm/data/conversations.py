"""Read conversation files into one table, and find every mistake in them before the first step.

A row of any accepted layout becomes ``{messages: [{role, content}], images: [path], file: int, row: int}``, where
``file`` and ``row`` say where it came from. The table is Arrow memory without Python objects, so forked loader
workers share it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_mm.data.images import locate_image
from mindspeed_mm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import datasets

IMAGE_PLACEHOLDER = os.environ.get("IMAGE_PLACEHOLDER", "<image>")
_BATCH = 1000


class ConversationFiles:
    """The files of one data set, in order; names a row by its file and its line or number."""

    def __init__(self, paths: list[Path]) -> None:
        """Check that the files exist, are not empty and have a layout we read.

        Raises:
            UserError: naming the file.
        """
        self.paths = paths
        self._is_list = [_is_json_list(path) for path in paths]

    def where(self, file: int, row: int) -> str:
        """Return ``file:line`` for one-row-per-line files and ``file: row n`` (from 1) for a JSON list."""
        return f"{self.paths[file]}: row {row}" if self._is_list[file] else f"{self.paths[file]}:{row}"

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield ``(file, row, value)`` for every row."""
        for file, path in enumerate(self.paths):
            rows = _list_rows(path) if self._is_list[file] else _line_rows(path)
            found = False
            for number, value in rows:
                found = True
                yield file, number, value
            if not found:
                raise UserError(f"{path}: holds no rows; expected one conversation per line or a JSON list of them")


def read_conversations(
    files: ConversationFiles, attr: Any, image_folder: str | Path, max_samples: int | None = None
) -> datasets.Dataset:
    """Read, check and align the rows of ``files``.

    Nothing is decoded here: an image only has to exist.

    Args:
        files: what to read.
        attr: names of columns and tags (``dataset_param.attr``).
        image_folder: image paths are relative to it and must stay inside it.
        max_samples: keep this many rows from the start; later rows are not read.

    Raises:
        UserError: naming file, row, the value found and the fix.
    """
    import datasets
    import pyarrow as pa  # type: ignore[import-untyped]

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    columns = [("messages", pa.list_(message)), ("images", pa.list_(pa.string())), ("file", "int32"), ("row", "int32")]
    schema = pa.schema(columns)
    align = {"sharegpt": _from_sharegpt, "alpaca": _from_alpaca}[attr.formatting]

    def aligned() -> Iterator[dict[str, Any]]:
        for file, row, value in islice(files, max_samples):
            where = files.where(file, row)
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: a row must be a JSON object, found {type(value).__name__}")
            messages = align(value, attr, where)
            _check_turns(messages, where)
            images = _images(value, attr, messages, image_folder, where)
            yield {"messages": messages, "images": images, "file": file, "row": row}

    rows = aligned()
    batches = []
    while chunk := list(islice(rows, _BATCH)):
        batches.append(pa.RecordBatch.from_pylist(chunk, schema=schema))
    return datasets.Dataset(datasets.table.InMemoryTable(pa.Table.from_batches(batches, schema=schema)))


def _is_json_list(path: Path) -> bool:
    if not path.is_file():
        raise UserError(f"{path}: no such data file; check basic_parameters.dataset in data.json")
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise UserError(f"{path}: the data file is empty; expected one conversation per line or a JSON list of them")
    if head[:1] not in b"[{":
        raise UserError(
            f"{path}:1: not JSON: starts with {head[:20].decode('utf-8', 'replace')!r}; "
            "the dataset type 'huggingface' reads .json and .jsonl files"
        )
    return head[:1] == b"["


def _list_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text at byte {error.start}: {error.reason}; save the file as UTF-8"
        ) from None
    yield from enumerate(rows, start=1)


def _line_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}:{number}: broken JSON: {error.msg} (column {error.colno}); each line must hold one object"
                ) from None
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not UTF-8 text at byte {error.start} of the line: {error.reason}; "
                    "save the file as UTF-8"
                ) from None


def _column(row: Mapping[str, Any], name: str, key: str, where: str) -> Any:
    if name not in row:
        raise UserError(
            f"{where}: no column {name!r} (attr.{key}); the row has {', '.join(map(repr, row))}."
            f"{did_you_mean(name, row)}"
        )
    return row[name]


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {what} must be text, found {value!r:.80}")
    return value


def _from_sharegpt(row: Mapping[str, Any], attr: Any, where: str) -> list[dict[str, str]]:
    roles = {attr.system_tag: "system", attr.user_tag: "user", attr.assistant_tag: "assistant"}
    turns = _column(row, attr.messages, "messages", where)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"{where}: column {attr.messages!r} must be a list of objects, found {turns!r:.80}")
    messages = []
    if attr.system is not None and row.get(attr.system):
        messages.append({"role": "system", "content": _text(row[attr.system], f"column {attr.system!r}", where)})
    for number, turn in enumerate(turns, start=1):
        at = f"{where}: message {number}"
        tag = _column(turn, attr.role_tag, "role_tag", at)
        if tag in (attr.observation_tag, attr.function_tag):
            raise UserError(f"{at}: tool turns ({tag!r}) are not available yet; remove such rows")
        if tag not in roles:
            raise UserError(
                f"{at}: unknown role {tag!r}; attr names {', '.join(map(repr, roles))}.{did_you_mean(str(tag), roles)}"
            )
        content = _column(turn, attr.content_tag, "content_tag", at)
        messages.append({"role": roles[tag], "content": _text(content, repr(attr.content_tag), at)})
    return messages


def _from_alpaca(row: Mapping[str, Any], attr: Any, where: str) -> list[dict[str, str]]:
    def text(key: str, default: str) -> str:
        name = attr.get(key) or default
        return _text(row.get(name) or "", f"column {name!r}", where)

    messages = []
    if attr.system is not None and row.get(attr.system):
        messages.append({"role": "system", "content": _text(row[attr.system], f"column {attr.system!r}", where)})
    for pair in row.get(attr.get("history") or "history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{where}: history must be a list of [question, answer], found {pair!r:.80}")
        messages.append({"role": "user", "content": _text(pair[0], "history", where)})
        messages.append({"role": "assistant", "content": _text(pair[1], "history", where)})
    question = "\n".join(part for part in (text("prompt", "instruction"), text("query", "input")) if part)
    messages.append({"role": "user", "content": question})
    _column(row, attr.get("response") or "output", "response", where)
    messages.append({"role": "assistant", "content": text("response", "output")})
    return messages


def _check_turns(messages: list[dict[str, str]], where: str) -> None:
    """Demand an optional system turn, then user and assistant in turn, an assistant last."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise UserError(
                f"{where}: message {number + 1 + len(roles) - len(turns)} is from {role!r}, expected {expected!r}; "
                "turns must alternate user, assistant after an optional system turn"
            )
    if not turns or len(turns) % 2:
        raise UserError(
            f"{where}: the conversation must end with an assistant turn, found {' '.join(roles) or 'no turn'}"
        )


def _images(
    row: Mapping[str, Any], attr: Any, messages: list[dict[str, str]], image_folder: str | Path, where: str
) -> list[str]:
    for key in ("videos", "audios"):
        if getattr(attr, key) and row.get(getattr(attr, key)):
            raise UserError(f"{where}: column {getattr(attr, key)!r}: {key} are not available yet; remove such rows")
    paths = (row.get(attr.images) if attr.images else None) or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise UserError(f"{where}: column {attr.images!r} must be a list of file names, found {paths!r:.80}")
    placeholders = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
    if placeholders != len(paths):
        column = f"{len(paths)} file(s) in column {attr.images!r}" if attr.images else "attr.images names no column"
        raise UserError(
            f"{where}: {placeholders} {IMAGE_PLACEHOLDER} placeholder(s) in the messages but {column}; "
            "write one placeholder for each file"
        )
    return [locate_image(path, image_folder, where) for path in paths]
