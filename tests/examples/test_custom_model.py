"""The two scripts of the README train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "examples/custom_model"


@pytest.mark.parametrize(
    ("script", "config"), [("train.py", "fsdp2_config.yaml"), ("train_hf.py", "fsdp2_config_hf.yaml")]
)
def test_script_learns_in_one_process(script: str, config: str, tmp_path: Path) -> None:
    flags = f"--micro-batch-size 32 --lr 1e-2 --lr-decay-style constant --train-iters 12 --save {tmp_path}".split()
    answer = subprocess.run(
        [
            sys.executable,
            f"{FOLDER}/{script}",
            "--use-torch-fsdp2",
            "--fsdp2-config-path",
            f"{FOLDER}/{config}",
            *flags,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    losses = [row["loss"] for row in rows]
    assert sum(losses[-3:]) < sum(losses[:3])
