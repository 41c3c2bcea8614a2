"""Read a JSON or YAML document, and say where it is wrong when it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from mindspeed_mm.errors import UserError, did_you_mean


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the JSON or YAML object in ``path``; the suffix says which of the two it is.

    Raises:
        UserError: the file is missing, unreadable or empty, has a syntax error (line and column are named), gives
            one key of an object twice, or holds something other than an object.
    """
    path = Path(path)
    parse = {".json": _parse_json, ".yaml": _parse_yaml, ".yml": _parse_yaml}.get(path.suffix.lower())
    if parse is None:
        raise UserError(f"{path}: '{path.suffix}' is not a format of config files. Use .json, .yaml or .yml.")
    text = _read_text(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty. It must hold an object of keys and values.")
    try:
        document = parse(path, text)
    except RecursionError:
        raise UserError(f"{path}: objects and lists are nested too deeply to be read.") from None
    if not isinstance(document, dict):
        found = "nothing but comments" if document is None else f"a {type(document).__name__}"
        raise UserError(f"{path}: the top level must be an object of keys and values; found {found}.")
    return document


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(
            f"{path}: no such file.{did_you_mean(path.name, siblings)} "
            f"Relative paths start at the current folder, {Path.cwd()}."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8. Save the file in UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None


def _syntax_error(path: Path, line: int, column: int, what: str) -> UserError:
    return UserError(f"{path}: line {line}, column {column}: {what}")


def _parse_json(path: Path, text: str) -> Any:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
        hint = ""
        if after.startswith(("//", "/*", "#")):
            hint = " JSON has no comments: delete it, or write the document as .yaml."
        elif (before.endswith(",") and after.startswith(("}", "]"))) or "trailing comma" in error.msg:
            hint = " Delete the comma after the last entry."
        raise _syntax_error(path, error.lineno, error.colno, f"{error.msg}.{hint}") from None
    _refuse_duplicate_json_keys(path, text)
    return document


_JSON_KEY_OR_BRACE = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}]')


def _refuse_duplicate_json_keys(path: Path, text: str) -> None:
    """The json module keeps the last of two equal keys and says nothing; ``text`` is known to be valid JSON."""
    objects: list[dict[str, int]] = []  # for each open object, the line of each of its keys
    for token in _JSON_KEY_OR_BRACE.finditer(text):
        if token[0] == "{":
            objects.append({})
        elif token[0] == "}":
            objects.pop()
        elif token[2]:
            line, column = _position(text, token.start())
            if token[1] in objects[-1]:
                raise _twice(path, line, column, token[1], objects[-1][token[1]])
            objects[-1][token[1]] = line


def _position(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _twice(path: Path, line: int, column: int, key: str, first_line: int) -> UserError:
    return _syntax_error(path, line, column, f"key '{key}' was already given on line {first_line}. Keep one of them.")


class _DuplicateKeyError(yaml.MarkedYAMLError):
    def __init__(self, key: yaml.ScalarNode, first: yaml.ScalarNode) -> None:
        what = f"key '{key.value}' was already given on line {first.start_mark.line + 1}. Keep one of them"
        super().__init__(problem=what, problem_mark=key.start_mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses duplicate keys and reads ``1e-5`` as the number it is.

    Keys are strings, as in JSON: ``on`` and ``1`` too.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, yaml.ScalarNode] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if seen.setdefault(key.value, key) is not key:
                raise _DuplicateKeyError(key, seen[key.value])
            if key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _parse_yaml(path: Path, text: str) -> Any:
    # Published files carry tabs after their values. Tabs mean nothing there, but PyYAML takes them for tokens.
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"{error.problem or error.context}."
        if mark is None:
            raise UserError(f"{path}: {what}") from None
        hint = " Indent with spaces, not tabs." if "\\t" in what else ""
        raise _syntax_error(path, mark.line + 1, mark.column + 1, what + hint) from None
    except (yaml.YAMLError, ValueError) as error:  # an odd character, an impossible date
        raise UserError(f"{path}: {error}") from None
