"""Ranks that are killed in the middle of a save, at a phase of it that is chosen, as a power cut would choose it."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspeed_mm.checkpoint import publish
from mindspeed_mm.checkpoint.publish import TRACKER
from mindspeed_mm.checkpoint.tensor_files import DigestingPlanner
from tests.ranks import free_port
from tests.training.script import train

PHASES = ("before staging", "mid-shard", "before rename", "before tracker", "during retention")


def run_until_killed(folder: Path, phase: str, victim: int, time_round: int, *flags: str, steps: int) -> list[int]:
    """Train on two ranks until rank ``victim`` is killed at the given phase of a save; return the exit codes.

    The other rank is killed as well, a second later: a launcher does so, unless it leaves by itself.

    Args:
        folder: to save to.
        phase: one of `PHASES`.
        victim: the rank that is killed.
        time_round: the how many-th time the run comes to this phase.
        flags: of the run.
        steps: of the run.
    """
    processes = _start(folder, phase, victim, time_round, flags, steps)
    processes[victim].join(timeout=60)
    return _bury(processes, processes[1 - victim])


def kill_at_random(folder: Path, rng: random.Random, *flags: str, steps: int) -> list[int]:
    """Train on two ranks, kill one of them some time after its first save, and return the exit codes."""
    tracker = folder / TRACKER
    before = tracker.read_text() if tracker.exists() else ""
    processes = _start(folder, "", 0, 1, flags, steps)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not tracker.exists() or tracker.read_text() == before):
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.2))
    victim = rng.randrange(2)
    processes[victim].kill()
    return _bury(processes, processes[1 - victim])


def _start(folder: Path, *arguments: Any) -> list[Any]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.mortal", "mindspeed_mm.training.run"])
    port = free_port()
    processes = [context.Process(target=_live, args=(rank, port, str(folder), *arguments)) for rank in (0, 1)]
    for process in processes:
        process.start()
    return processes


def _bury(processes: list[Any], survivor: Any) -> list[int]:
    survivor.join(timeout=1)
    for process in processes:
        process.kill()
        process.join()
    return [int(process.exitcode or 0) for process in processes]


def _live(
    rank: int, port: int, folder: str, phase: str, victim: int, time_round: int, flags: tuple[str, ...], steps: int
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    pid_file = Path(folder) / f"pid_{rank}"
    pid_file.write_text(str(os.getpid()))
    left = [time_round]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            while not (other := Path(folder) / f"pid_{victim}").exists():
                time.sleep(0.01)
            os.kill(int(other.read_text()), signal.SIGKILL)

    _plant(phase, rank, victim, strike)
    train(folder, *flags, steps=steps)


def _plant(phase: str, rank: int, victim: int, strike: Callable[[], None]) -> None:
    """Call ``strike`` whenever this rank comes to the phase; what only rank 0 does strikes there for the victim."""
    if phase == "before staging" and rank == 0:
        _before(publish, "_prepare", strike)
    elif phase == "mid-shard" and rank == victim:
        _before(DigestingPlanner, "resolve_data", strike)
    elif phase == "before rename" and rank == 0:
        _before(Path, "rename", strike, lambda path, *_: path.name.endswith(".staging"))
    elif phase == "before tracker" and rank == 0:
        _before(Path, "replace", strike)
    elif phase == "during retention" and rank == 0:
        _before(shutil, "rmtree", strike, lambda path, *_, **__: _half_removed(Path(path)))


def _half_removed(path: Path) -> bool:
    """Remove some of the files, as ``rmtree`` is about to; tell whether it is a checkpoint that is pruned."""
    pruned = path.name.endswith(".removed")
    if pruned:
        for name in (".metadata", "__0_0.distcp"):
            (path / name).unlink()
    return pruned


def _before(owner: Any, name: str, strike: Callable[[], None], applies: Callable[..., bool] | None = None) -> None:
    original = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if applies is None or applies(*args, **kwargs):
            strike()
        return original(*args, **kwargs)

    setattr(owner, name, struck)
