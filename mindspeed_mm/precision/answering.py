"""Exit codes of ``mindspeed-mm precision``: 0 aligned, 1 not aligned, 2 cannot be judged."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from mindspeed_mm.errors import UserError

if TYPE_CHECKING:
    from mindspeed_mm.precision.finding import Verdict

CANNOT_BE_JUDGED = 2


class JudgingGroup(TyperGroup):
    """Commands whose failure must not be taken for "not aligned": a user's mistake and a crash end with 2, not 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except Exception as error:
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise  # how commands end with a code of their own
            traceback.print_exc()
        raise typer.Exit(CANNOT_BE_JUDGED)


def answer(verdict: Verdict, out: Path | None = None, *, findings_shown: bool = False) -> NoReturn:
    """Print a verdict, write it into ``out`` if that is given, and end the command with its exit code.

    Args:
        verdict: what the check says.
        out: folder for ``verdict.json``.
        findings_shown: the command has already printed the findings.
    """
    if out is not None:
        print(f"wrote {verdict.write(out)}", file=sys.stderr)
    if findings_shown:
        verdict_only = verdict.to_json()
        print("\n".join([*(f"note: {note}" for note in verdict.notes), str(verdict_only["verdict"])]))
        if verdict.undecided:
            print(verdict.undecided)
    else:
        print(verdict)
    raise typer.Exit(verdict.exit_code)
