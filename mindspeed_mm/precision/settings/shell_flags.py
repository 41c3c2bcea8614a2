"""The flags and variables of a launch script, read without running it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

from mindspeed_mm.errors import UserError

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)
_ARITHMETIC = re.compile(r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)")
_VARIABLE = re.compile(
    r"\$\{([A-Za-z_]\w*)(?::?[-=]([^}]*))?\}"  # ${NAME}, ${NAME:-default}
    r"|\$([A-Za-z_]\w*)"
    r"|\$\{([A-Za-z_]\w*)\[[@*]\]\}"  # an array
)
_SUM = re.compile(r"[\d\s+*/%()-]+")


@dataclass
class Script:
    """What a script passes on.

    Attributes:
        flags: words after each flag, by its name with underscores; none after a bare flag.
        variables: everything that is assigned, as text.
        unknown: flags whose value comes from outside of the script.
    """

    flags: dict[str, list[str]] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def read_script(text: str) -> Script:
    """Read a shell script: assignments, ``$NAME``, ``${NAME:-default}`` and integer ``$((...))`` are followed.

    Branches are not: of two assignments the later one counts.

    Raises:
        UserError: its quotes are not balanced.
    """
    script = Script()
    text = _ARITHMETIC.sub(lambda found: "$((" + re.sub(r"\s", "", found[1]) + "))", text)
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise UserError(f"not a shell script that can be read: {error}") from error
    commands: list[str] = []
    for word in (word.rstrip(";") for word in words):
        if assigned := _ASSIGNMENT.fullmatch(word):
            value = _expand(assigned[2], script.variables)
            script.variables[assigned[1]] = value
            commands.extend(_split(value))
        else:
            commands.extend(_split(_expand(word, script.variables)))
    _collect(script, commands)
    return script


def _split(text: str) -> list[str]:
    return [word for word in text.replace("\\\n", " ").split() if word not in ("\\", "(", ")")]


def _expand(text: str, variables: dict[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[3] or found[4]
        return variables.get(name) or (_expand(found[2], variables) if found[2] is not None else found[0])

    def result(found: re.Match[str]) -> str:
        names = re.sub(r"(?<![\w$])([A-Za-z_]\w*)", r"${\1}", found[1])
        terms = _VARIABLE.sub(value, names).replace("/", "//")
        if not _SUM.fullmatch(terms):
            return found[0]
        try:
            return str(eval(terms, {"__builtins__": {}}))  # digits and operators only
        except (SyntaxError, ZeroDivisionError):
            return found[0]

    return _VARIABLE.sub(value, _ARITHMETIC.sub(result, text))


def _collect(script: Script, words: list[str]) -> None:
    name: str | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            script.flags[name] = [value] if equals else []
        elif name is not None:
            script.flags[name].append(word.strip("()"))
    for flag, values in list(script.flags.items()):
        if values and "$" in values[0]:
            del script.flags[flag]
            script.unknown.append(flag)
