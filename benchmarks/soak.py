"""Kill a run at random moments, again and again, and see whether it ends where an undisturbed run ends.

A small model is trained by torchrun, saving after every step. One rank, or the launcher with all ranks, gets SIGKILL at
a random moment; the run goes on by itself (``--max-restarts``, ``--auto-resume``) or is started again. After every kill
the newest checkpoint is verified. At the end the weights and the optimizer's state are compared bit by bit with those
of a run that nobody disturbed.

    python benchmarks/soak.py --kills 200
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ("--save-interval", "1", "--keep-last", "2", "--auto-resume", "--lr-decay-iters", "100000")
ENDLESS = 100_000  # steps


def train(folder: Path, steps: int, flags: list[str]) -> None:
    """Train on this rank: a model with dropout, on data drawn at random."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from mindspeed_mm.training import pretrain

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(17, 17) for _ in range(4)])
            self.dropout = nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = self.dropout(layer(x).tanh())
            return x.square().mean()

    def data() -> tuple[Any, Any, Any]:
        pictures = torch.randn(30, 17, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(pictures), batch_size=2, shuffle=True), None, None

    def forward_step(iterator: Any, model: nn.Module) -> tuple[Any, Any]:
        # From here on the run may be killed. Once: who outlives another's death does not pass for a new rank.
        if not told:
            told.append(pid_file.write_text(str(os.getpid())))
        return model(next(iterator)[0]), lambda loss: loss

    rank, told = os.environ["RANK"], list[int]()
    pid_file = folder / f"pid_{rank}"
    yaml = folder / f"fsdp2_config_{rank}.yaml"
    yaml.write_text("sharding_size: auto\nsub_modules_to_wrap: ['layers.{*}']\n")
    sys.argv = [
        *("soak.py", "--use-torch-fsdp2", "--fsdp2-config-path", str(yaml), "--micro-batch-size", "2"),
        *("--train-iters", str(steps), "--save", str(folder), "--lr", "1e-3", "--log-interval", "100"),
        *flags,
    ]
    pretrain(data, Net, None, forward_step)


class Run:
    """A job of torchrun in a process group of its own."""

    def __init__(self, folder: Path, ranks: int, steps: int, flags: list[str]) -> None:
        self.folder, self.ranks = folder, ranks
        self.forget()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1000"]
        worker = [str(Path(__file__).resolve()), "--worker", str(folder), "--steps", str(steps), *flags]
        self._log = open(folder / "output.txt", "ab")  # noqa: SIM115 - closed with the run
        self.process = subprocess.Popen(
            [*torchrun, "--nproc_per_node", str(ranks), *worker],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def forget(self) -> None:
        """Forget the ranks' process ids and what was saved: the next attempt's are waited for."""
        self._before = self._newest()
        for file in self.folder.glob("pid_*"):
            file.unlink()

    def _newest(self) -> str:
        tracker = self.folder / "latest_checkpointed_iteration.txt"
        return tracker.read_text() if tracker.exists() else ""

    def wait_until_it_saves(self, seconds: float = 120.0) -> list[int]:
        """Return the ranks' process ids once this attempt trains and has saved."""
        deadline = time.monotonic() + seconds
        while True:
            texts = [f.read_text() for f in sorted(self.folder.glob("pid_*"))]
            if len(texts) == self.ranks and all(texts) and self._newest() != self._before:
                return [int(text) for text in texts]
            if time.monotonic() > deadline or self.process.poll() is not None:
                tail = (self.folder / "output.txt").read_text()[-5000:]
                raise SystemExit(f"the run does not train and save (exit code {self.process.poll()}):\n{tail}")
            time.sleep(0.02)

    def kill_rank(self, pid: int) -> None:
        """Kill one rank; torchrun starts all of them again."""
        self.forget()
        os.kill(pid, signal.SIGKILL)

    def kill(self, pids: list[int]) -> None:
        """Kill the launcher and the ranks."""
        for pid in (self.process.pid, *pids):
            with suppress(ProcessLookupError):  # the launcher may have been ending them
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            SystemExit: it did not end well.
        """
        if code := self.process.wait():
            raise SystemExit(f"exit code {code}:\n{(self.folder / 'output.txt').read_text()[-5000:]}")
        self._log.close()


def soak(kills: int, ranks: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Kill a run so many times, let it end, and compare it with an undisturbed one.

    Returns:
        How often what was killed, and ``"corrupt"``, the number of damaged checkpoints that were chosen.

    Raises:
        SystemExit: the run did not go on, or ended elsewhere.
    """
    from mindspeed_mm.checkpoint import manifest
    from mindspeed_mm.checkpoint.integrity import inspect
    from mindspeed_mm.checkpoint.publish import find, iteration_of

    disturbed, straight = folder / "disturbed", folder / "straight"
    disturbed.mkdir(parents=True), straight.mkdir()
    rng, count = random.Random(seed), Counter[str]()
    run = None
    for kill in range(kills):
        # Both ways of saving, one after the other: what one has left the other has to cope with.
        way = ["--async-save"] if kill // 5 % 2 else []
        run = run or Run(disturbed, ranks, ENDLESS, [*FLAGS, *way])
        pids = run.wait_until_it_saves()
        time.sleep(rng.uniform(0.0, 0.4))
        everything = kill % 5 == 4 or kill == kills - 1
        count["all" if everything else "one rank"] += 1
        if everything:
            run.kill(pids)
            run = None
        else:
            run.kill_rank(rng.choice(pids))
        if everything:  # nobody writes now
            newest = find(disturbed)
            condition = inspect(newest)
            count["corrupt"] += not condition.good
            print(f"kill {kill + 1}: newest {newest.name}, {'good' if condition.good else condition}", flush=True)
    steps = (iteration_of(find(disturbed)) or 0) + 5
    Run(disturbed, ranks, steps, [*FLAGS]).finish()
    Run(straight, ranks, steps, [*FLAGS[2:]]).finish()
    ends = [manifest.read(path / f"iter_{steps:07d}") for path in (disturbed, straight)]
    if any(end is None for end in ends) or ends[0].tensors != ends[1].tensors:  # type: ignore[union-attr]
        raise SystemExit(f"after {kills} kills and {steps} steps the run ends elsewhere than an undisturbed one")
    restarts = (disturbed / "output.txt").read_text().count("loading checkpoint from")
    print(f"{kills} kills, {restarts} resumes, {count['corrupt']} corrupt, {steps} steps: bitwise the undisturbed run")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.worker:
        train(args.worker, args.steps, flags)
        return
    with tempfile.TemporaryDirectory() as folder:
        count = soak(args.kills, args.ranks, Path(folder), args.seed)
    sys.exit(1 if count["corrupt"] else 0)


if __name__ == "__main__":
    main()
