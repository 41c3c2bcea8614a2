"""Run ``mindspeed-mm precision`` in this process, as a user sees it."""

from __future__ import annotations

from typer.testing import CliRunner

from mindspeed_mm.precision.commands import app


def run(*words: object) -> tuple[int, str]:
    """Return the exit code and everything that was printed."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output
