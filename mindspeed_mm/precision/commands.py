"""``mindspeed-mm precision``: is a run aligned with its reference, and if not, where. Heavy imports wait."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mindspeed_mm.precision import judge_commands
from mindspeed_mm.precision.answering import JudgingGroup

app = typer.Typer(
    cls=JudgingGroup,
    help="Compare a run with its reference. Exit code 0: aligned, 1: not aligned, 2: cannot be judged.",
    no_args_is_help=True,
)
app.add_typer(judge_commands.app)

_Out = Annotated[Path | None, typer.Option(help="Folder for verdict.json and what belongs to it.")]
