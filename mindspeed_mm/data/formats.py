"""From a row as its author laid it out to a conversation; where a user's own layout is registered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mindspeed_mm.errors import UserError, did_you_mean

Format = Callable[[Mapping[str, Any], Any], Mapping[str, Any]]
"""``format(row, attr)`` returns the conversation of a row. Keys of it:

``messages``: a list of ``{"role", "content"}``; roles are ``system`` (first, optional), ``user``, ``assistant`` and
``tool``. An assistant's message may have ``tool_calls``: a list of ``{"name", "arguments"}``.
``images``, ``videos``, ``audios``: optional lists of files, or their content as bytes, one for each placeholder in the
contents.
``tools``: optional list of descriptions of functions, in JSON Schema.

``attr`` is the object of that name in data.json. A row that cannot be read raises `FormatError`.
"""


class FormatError(ValueError):
    """A row is not as the format demands; the message says what was found and what to write instead."""


FORMATS: dict[str, Format] = {}


def register_format(name: str) -> Callable[[Format], Format]:
    """Register a function that reads rows for ``attr.formatting: name``; see ``Format``.

    The file with the function is named by ``--plugin``.

    Raises:
        UserError: the name is taken.
    """

    def register(read: Format) -> Format:
        before = FORMATS.get(name)
        if before is not None and before.__qualname__ != read.__qualname__:
            raise UserError(f"register_format({name!r}): there is a format of that name; choose another.")
        FORMATS[name] = read
        return read

    return register


def find_format(name: str) -> Format:
    """Return the function of ``attr.formatting``.

    Raises:
        UserError: nothing is registered under the name.
    """
    if name not in FORMATS:
        raise UserError(
            f"data.json: dataset_param.attr.formatting: {name!r} is not known; use one of {', '.join(FORMATS)}, or "
            f"register your own with register_format in a file for --plugin.{did_you_mean(name, FORMATS)}"
        )
    return FORMATS[name]


@register_format("sharegpt")
def read_sharegpt(row: Mapping[str, Any], attr: Any) -> dict[str, Any]:
    """Read a list of messages; columns and tags as ``attr`` names them."""
    roles = {
        attr.system_tag: "system",
        attr.user_tag: "user",
        attr.assistant_tag: "assistant",
        attr.observation_tag: "tool",
        attr.function_tag: "call",
    }
    roles.pop(None, None)
    turns = _listed(column(row, attr.messages, "messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise FormatError(f"column {attr.messages!r} must be a list of objects, found {turns!r:.80}")
    messages = _system(row, attr)
    for number, turn in enumerate(turns, start=1):
        at = f"message {number}: "
        tag = column(turn, attr.role_tag, "role_tag", at)
        if not isinstance(tag, str) or tag not in roles:
            known = ", ".join(map(repr, roles))
            raise FormatError(f"{at}unknown role {tag!r:.80}; attr names {known}.{did_you_mean(str(tag), roles)}")
        message: dict[str, Any] = {"role": roles[tag]}
        calls = turn.get("tool_calls")
        content = turn.get(attr.content_tag) if calls else column(turn, attr.content_tag, "content_tag", at)
        message["content"] = "" if calls and content is None else text(content, f"{at}{attr.content_tag!r}")
        if roles[tag] == "call":
            thought, call = _split_thought(message["content"])
            message = {"role": "assistant", "content": thought, "tool_calls": _calls(call, at)}
        elif calls:
            message["tool_calls"] = _calls(calls, at)
        messages.append(message)
    return {"messages": messages, **_media(row, attr)}


@register_format("alpaca")
def read_alpaca(row: Mapping[str, Any], attr: Any) -> dict[str, Any]:
    """Read an instruction with its answer, and earlier pairs of them."""

    def cell(key: str, default: str) -> str:
        name = attr.get(key) or default
        value = row.get(name)
        return "" if value is None else text(value, f"column {name!r}")

    messages = _system(row, attr)
    history = _listed(row.get(attr.get("history") or "history") or [])
    if not isinstance(history, list):
        raise FormatError(f"history must be a list of [question, answer], found {history!r:.80}")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError(f"history must be a list of [question, answer], found {pair!r:.80}")
        messages.append({"role": "user", "content": text(pair[0], "history")})
        messages.append({"role": "assistant", "content": text(pair[1], "history")})
    question = "\n".join(part for part in (cell("prompt", "instruction"), cell("query", "input")) if part)
    messages.append({"role": "user", "content": question})
    name = attr.get("response") or "output"
    messages.append({"role": "assistant", "content": text(column(row, name, "response"), f"column {name!r}")})
    return {"messages": messages, **_media(row, attr)}


def read_document(row: Mapping[str, Any], attr: Any) -> dict[str, Any]:
    """Read plain text to continue (``attr.pretrain``), from the column ``attr.prompt``."""
    name = attr.prompt if "prompt" in attr else "text"
    content = text(column(row, name, "prompt"), f"column {name!r}")
    return {"messages": [{"role": "document", "content": content}], **_media(row, attr)}


def column(row: Mapping[str, Any], name: str | None, key: str, at: str = "") -> Any:
    """Return a column of a row, or say which there are."""
    if name is None:
        raise FormatError(f"{at}attr.{key} is null; set it to one of {', '.join(map(repr, row)):.200}")
    if name not in row:
        found = ", ".join(map(repr, row))
        raise FormatError(f"{at}no column {name!r} (attr.{key}); the row has {found:.200}.{did_you_mean(name, row)}")
    return row[name]


def text(value: Any, what: str) -> str:
    """Return a value that must be text."""
    if not isinstance(value, str):
        raise FormatError(f"{what} must be text, found {value!r:.80}")
    return value


def _system(row: Mapping[str, Any], attr: Any) -> list[dict[str, Any]]:
    if attr.system is None or not row.get(attr.system):
        return []
    return [{"role": "system", "content": text(row[attr.system], f"column {attr.system!r}")}]


def _media(row: Mapping[str, Any], attr: Any) -> dict[str, Any]:
    media: dict[str, Any] = {}
    for key in ("images", "videos", "audios"):
        name = getattr(attr, key)
        files = _listed((row.get(name) if name else None) or [])
        files = [files] if isinstance(files, str | bytes | Mapping) else files
        files = [_content(file) for file in files] if isinstance(files, list) else files
        if not isinstance(files, list) or not all(isinstance(file, str | bytes) for file in files):
            raise FormatError(f"column {name!r} must be a list of file names, found {files!r:.80}")
        media[key] = files
    tools = row.get(attr.tools) if attr.tools else None
    if isinstance(tools, str):
        tools = _json(tools, f"column {attr.tools!r}") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise FormatError(f"column {attr.tools!r} must be a list of objects, found {tools!r:.80}")
    return {**media, "tools": tools or None}


def _content(file: Any) -> Any:
    """Return what Hugging Face ``datasets`` writes of a file as ``{"bytes", "path"}``: its content, else its name."""
    if isinstance(file, Mapping) and {"bytes", "path"} >= file.keys():
        return file.get("bytes") or file.get("path")
    return file


def _listed(value: Any) -> Any:
    """Return what a table holds as JSON text where a list is meant: of messages, of files."""
    if isinstance(value, str) and value[:1] + value[-1:] == "[]":
        try:
            return json.loads(value)
        except (RecursionError, ValueError):
            pass  # the name of a file may look like it
    return value


def _calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Return calls of functions, written as JSON text or as objects, alone or in a list, in one form."""
    if isinstance(calls, str):
        calls = _json(calls, f"{at}a call of a function")
    calls = [calls] if isinstance(calls, Mapping) else calls
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise FormatError(
                f'{at}a call of a function must be {{"name": ..., "arguments": {{...}}}}, found {call!r:.80}'
            )
        arguments = call["arguments"]
        if isinstance(arguments, str):  # as some services write them
            arguments = _json(arguments, f"{at}'arguments'")
        if not isinstance(arguments, Mapping):
            raise FormatError(f"{at}'arguments' must be an object, found {arguments!r:.80}")
        found.append({"name": call["name"], "arguments": dict(arguments)})
    if not found:
        raise FormatError(f"{at}the list of calls is empty")
    return found


def _split_thought(content: str) -> tuple[str, str]:
    """Return the reasoning before a call, as far as ``</think>``, and the call."""
    thought, end, call = content.rpartition("</think>")
    return thought + end, call


def _json(value: str, what: str) -> Any:
    try:
        return json.loads(value)
    except (RecursionError, ValueError) as error:
        raise FormatError(f"{what} is not JSON: {error}; found {value!r:.80}") from None
