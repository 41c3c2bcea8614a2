"""The verbs of ``mindspeed-mm precision`` that compare records: their functions join the app of `commands`."""

from __future__ import annotations

import typer

app = typer.Typer()
