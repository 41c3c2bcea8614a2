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


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("script", "config"), [("train.py", "fsdp2_config.yaml"), ("train_hf.py", "fsdp2_config_hf.yaml")]
)
def test_script_learns_in_one_process(script: str, config: str, tmp_path: Path) -> None:
    flags = f"--fsdp2-config-path {FOLDER}/{config} --micro-batch-size 32 --lr 3e-3 --train-iters 40 --save {tmp_path}"
    answer = subprocess.run(
        [sys.executable, f"{FOLDER}/{script}", "--use-torch-fsdp2", "--lr-decay-style", "constant", *flags.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, 41))
    losses = [row["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
