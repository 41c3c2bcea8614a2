from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.arguments import get_args, global_args, set_args
from mindspeed_mm.errors import UserError


def test_get_before_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(global_args, "_args", None)
    with pytest.raises(UserError, match="call it inside one of the callbacks"):
        get_args()
    args = argparse.Namespace()
    set_args(args)
    assert get_args() is args


USER = """
import argparse, sys
from mindspeed_mm.arguments import set_args
{early}
args = argparse.Namespace(seed=5)
set_args(args)
from megatron.training import get_args
assert get_args() is args
"""


@pytest.mark.parametrize("early", ["", "from megatron.training import get_args"])
def test_a_checkout_with_megatron_training_gets_our_arguments(tmp_path: Path, early: str) -> None:
    training = tmp_path / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").write_text("from .global_vars import get_args\n")
    (training / "global_vars.py").write_text("_GLOBAL_ARGS = None\n\ndef get_args():\n    return _GLOBAL_ARGS\n")
    _run(USER.format(early=early), tmp_path)


def test_a_broken_checkout_does_not_stop_the_run(tmp_path: Path) -> None:
    training = tmp_path / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").write_text("import not_installed_here\n")
    _run("import argparse\nfrom mindspeed_mm.arguments import set_args\nset_args(argparse.Namespace())\n", tmp_path)


def test_without_megatron_training_nothing_of_megatron_is_imported() -> None:
    code = "import argparse, sys\nfrom mindspeed_mm.arguments import set_args\nset_args(argparse.Namespace())\n"
    _run(f"{code}assert not [name for name in sys.modules if name.startswith(('megatron.', 'torch'))]\n", Path.cwd())


def _run(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(Path.cwd()), str(folder)]}\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
