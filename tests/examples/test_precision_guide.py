"""The guide to precision alignment: its commands run as they stand and print what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mindspeed_mm.precision.commands import app
from tests.test_docs import fences

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/en/precision.md"


def blocks() -> list[tuple[str, list[str]]]:
    """Return the commands of each bash block and the lines that the page shows right below it."""
    found: list[tuple[str, list[str]]] = []
    before = ""
    for language, _, content in fences(PAGE):
        if language == "bash":
            found.append((content, []))
        elif language == "text" and before == "bash":
            found[-1][1].extend(content.splitlines())
        before = language
    return found


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_every_verb_and_option_of_the_page_exists() -> None:
    group = typer.main.get_command(app)
    verbs = group.commands  # type: ignore[attr-defined]
    called = 0
    for commands, _ in blocks():
        for line in commands.replace("\\\n", " ").splitlines():
            line = line.partition(";")[0]
            if not line.startswith("mindspeed-mm precision"):
                continue
            verb, *rest = shlex.split(line)[2:]
            options = {name for parameter in verbs[verb].params for name in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, line
            called += 1
    assert called >= 7
    named = re.findall(r"^\| `([a-z-]+)`(?:, `([a-z-]+)`)? \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert {verb for pair in named for verb in pair if verb} <= set(verbs)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a dozen commands, each of which imports torch
def test_the_guide_ends_aligned(tmp_path: Path) -> None:
    for name in ("examples", "pretrain_transformers.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, module in (("mindspeed-mm", "mindspeed_mm.cli"), ("torchrun", "torch.distributed.run")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for file in tools.iterdir():
        file.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for commands, expected in blocks():
        done = subprocess.run(
            ["bash", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=900, check=False,
        )  # fmt: skip
        printed = words(done.stdout + done.stderr)
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        place = 0
        for line in expected:
            at = words(done.stdout).find(words(line), place)
            assert at >= 0, f"{commands}\ndoes not print, in this order: {line}\n{printed}"
            place = at + 1
