"""The whole quickstart, as ``make quickstart`` runs it: prepare, train, evaluate; then kill a run and resume it.

Usage, from the root of the repository: ``python examples/quickstart/run.py``. Everything is written to
``runs/quickstart``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path("runs/quickstart")
STRAIGHT = OUT / "ckpt"  # the run that is left alone
BROKEN = OUT / "resumed"  # the run that is killed and resumed

# The broken run stops where the straight run has a checkpoint (--save-interval of pretrain.sh), to be compared there.
COMPARE_AT = 60
SAVE_EVERY = 20
KILL_AFTER = 40

DATA_WAIT = 0.02  # of the training time, at most


def step(title: str) -> None:
    """Print the headline of a step with the seconds since the start."""
    print(f"\n=== {title} [{time.monotonic() - START:.0f} s]", flush=True)


def train(save: Path, *flags: str, load: Path | None = None) -> subprocess.Popen[bytes]:
    """Start pretrain.sh, which starts torchrun, which starts the ranks."""
    environment = {**os.environ, "SAVE_PATH": str(save), "LOAD_PATH": str(load or "")}
    return subprocess.Popen(["bash", str(HERE / "pretrain.sh"), *flags], env=environment)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run to end and stop here if it failed."""
    if process.wait():
        sys.exit(f"training failed with exit code {process.returncode}; its last message is above")


def metrics(save: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl that are about a training step."""
    path = save / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for row in (json.loads(line) for line in lines if line.endswith("}")) if "loss" in row]


def losses(save: Path) -> dict[int, float]:
    """Return the loss of every iteration; of one that was run twice, the later."""
    return {row["iteration"]: row["loss"] for row in metrics(save)}


def data_wait(save: Path) -> float:
    """Return the share of the training time, without the first step, that was spent waiting for batches."""
    rows = metrics(save)[1:]
    return sum(row["data_wait_time"] for row in rows) / sum(row["step_time"] for row in rows)


def about_data_wait(save: Path) -> str:
    """Say whether the target is reached. A busy machine may miss it, so the run goes on."""
    share = data_wait(save)
    verdict = "reached" if share <= DATA_WAIT else "MISSED"
    return f"waiting for data: {share:.2%} of the steps; target at most {DATA_WAIT:.0%} {verdict}"


def kill_after(process: subprocess.Popen[bytes], save: Path, iteration: int) -> None:
    """Send SIGKILL to every process of a run once it has passed ``iteration``."""
    while max(losses(save), default=0) < iteration:
        if process.poll() is not None:
            sys.exit(f"the run ended by itself before iteration {iteration}; its last message is above")
        time.sleep(0.1)
    launcher = psutil.Process(process.pid)
    for victim in [*launcher.children(recursive=True), launcher]:
        victim.send_signal(signal.SIGKILL)
    process.wait()


def tensors(save: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint, those of the model and those of the optimizer, into one process."""
    folder = save / f"iter_{iteration:07d}"
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group, which is the intention
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def compare() -> None:
    """Compare losses, weights and optimizer state of the two runs, bit by bit, and stop here if they differ."""
    straight, broken = losses(STRAIGHT), losses(BROKEN)
    iterations = range(1, COMPARE_AT + 1)
    differing = [i for i in iterations if straight.get(i) != broken.get(i)]
    if differing:
        first = differing[0]
        sys.exit(f"losses differ from iteration {first} on: {straight.get(first)!r} and {broken.get(first)!r}")
    left, right = tensors(STRAIGHT, COMPARE_AT), tensors(BROKEN, COMPARE_AT)
    if left.keys() != right.keys():
        sys.exit(f"the checkpoints hold different tensors: {sorted(left.keys() ^ right.keys())[:3]} ...")
    changed = [name for name in left if not torch.equal(left[name], right[name])]
    if changed:
        sys.exit(f"{len(changed)} of {len(left)} tensors differ at iteration {COMPARE_AT}, the first is {changed[0]}")
    print(
        f"nothing was lost: the losses of iterations 1 to {COMPARE_AT} and all {len(left)} tensors of the checkpoint"
        " are bitwise those of the run that was not killed"
    )


def main() -> None:
    """Run all steps in order."""
    os.chdir(ROOT)
    for old in (STRAIGHT, BROKEN, OUT / "export"):
        shutil.rmtree(old, ignore_errors=True)

    step("prepare: handwritten digits as pictures and conversations, and a model folder without weights")
    subprocess.run([sys.executable, HERE / "prepare.py"], check=True)

    step("train: Qwen3-VL architecture, 2 million parameters, from random weights, two FSDP2 ranks")
    finish(train(STRAIGHT, "--export-hf", str(OUT / "export")))
    print(about_data_wait(STRAIGHT))

    step("evaluate: generate() on held-out pictures, from the exported Hugging Face folder")
    evaluation = subprocess.run([sys.executable, HERE / "evaluate.py"])

    step(f"kill: the same run again, SIGKILL after iteration {KILL_AFTER}")
    kill_after(train(BROKEN, "--save-interval", str(SAVE_EVERY)), BROKEN, KILL_AFTER)

    step(f"resume: from its last checkpoint up to iteration {COMPARE_AT}")
    finish(train(BROKEN, "--save-interval", str(SAVE_EVERY), "--exit-interval", str(COMPARE_AT), load=BROKEN))
    compare()

    step("done")
    sys.exit(evaluation.returncode)


START = time.monotonic()

if __name__ == "__main__":
    main()
