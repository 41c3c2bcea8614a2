"""The command line: argparse with our spelling rules and our error messages."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mindspeed_mm.arguments.flag import parse_bool
from mindspeed_mm.arguments.groups import GROUPS
from mindspeed_mm.errors import UserError, did_you_mean

_ARGPARSE_SAYS = {
    "expected one argument": "its value is missing; give one",
    "expected at least one argument": "its values are missing; give at least one",
    "ignored explicit argument": "it takes no value; remove",
}

ExtraArgsProvider = Callable[[argparse.ArgumentParser], "argparse.ArgumentParser | None"]


class Parser(argparse.ArgumentParser):
    """An argument parser for which ``--a-b`` and ``--a_b`` are one flag and every mistake is a ``UserError``.

    Flags cannot be abbreviated: an abbreviation that works today means something else once a flag is added.
    """

    def __init__(self) -> None:
        super().__init__(
            description="Train a multimodal model.",
            usage="torchrun [launch flags] %(prog)s [flags]",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
            conflict_handler="resolve",
            allow_abbrev=False,
        )
        self.register("type", bool, parse_bool)  # type=bool in a user's provider would read "false" as True
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse takes -1e-5 for a flag

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it ends the process."""
        for theirs, ours in _ARGPARSE_SAYS.items():
            message = message.replace(theirs, ours)
        raise UserError(f"command line: {message.removeprefix('argument ')}")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse ``args``; ``explicit`` in the result holds the names of the attributes that were passed.

        Raises:
            UserError: A flag is unknown, or its value is missing or wrong.
        """
        words = self._spell(sys.argv[1:] if args is None else args)
        namespace, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(self._explain(rest))
        flags = words[: words.index("--")] if "--" in words else words
        actions = (self._option_string_actions.get(word.split("=", 1)[0]) for word in flags)
        namespace.explicit = frozenset(action.dest for action in actions if action)
        return namespace

    def _spell(self, words: Sequence[str]) -> list[str]:
        """Replace each flag by the spelling under which it was declared."""
        declared = self._option_string_actions
        by_dashes = {name.replace("_", "-"): name for name in declared}

        def spell(word: str) -> str:
            name, equals, value = word.partition("=")
            if not name.startswith("--") or name in declared:
                return word
            return by_dashes.get(name.replace("_", "-"), name) + equals + value

        return [spell(word) for word in words]

    def _explain(self, rest: list[str]) -> str:
        unknown = [word.split("=", 1)[0] for word in rest if word.startswith("-")]
        if unknown:
            known = self._option_string_actions
            return " ".join(
                f"unknown flag {word}; remove or correct it.{did_you_mean(word.replace('_', '-'), known)}"
                for word in unknown
            )
        hint = " (a comment inside a quoted shell variable becomes part of the command)" if "#" in rest[0] else ""
        return f"'{rest[0]}' belongs to no flag; remove it, or put its flag before it{hint}"


def build_parser(extra_args_provider: ExtraArgsProvider | None = None) -> argparse.ArgumentParser:
    """Return the parser with every declared flag and those of ``extra_args_provider``.

    Args:
        extra_args_provider: A user's function that adds its own flags to the parser it is given. It may declare a
            flag of ours anew; then its declaration holds.
    """
    parser = Parser()
    for group in GROUPS:
        arguments = parser.add_argument_group(group.title)
        for flag in group.flags:
            flag.add_to(arguments)
    return (extra_args_provider(parser) if extra_args_provider else None) or parser


def parse_args(
    extra_args_provider: ExtraArgsProvider | None = None,
    args_defaults: dict[str, Any] | None = None,
    argv: Sequence[str] | None = None,
) -> argparse.Namespace:
    """Parse the command line.

    Args:
        extra_args_provider: Adds a user's own flags, see :func:`build_parser`.
        args_defaults: Values for attributes whose flag was not passed; they need not have a flag.
        argv: The words after the script's name; ``sys.argv[1:]`` if left out.

    Returns:
        The values by attribute name, and ``explicit``: the frozenset of the names that were passed.

    Raises:
        UserError: A flag is unknown, or its value is missing or wrong.
    """
    args = build_parser(extra_args_provider).parse_args(argv)
    for name, value in (args_defaults or {}).items():
        if name not in args.explicit:
            setattr(args, name, value)
    return args
