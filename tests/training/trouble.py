"""A tiny run in which something happens to a rank at a named place: ``trouble.py FOLDER STEPS TROUBLE [flags]``.

``TROUBLE`` is ``what:where:rank:iteration``, or ``none``; it happens in the first attempt of a job only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, get_worker_info

from tests.training import script

FOLDER, STEPS, TROUBLE, *FLAGS = sys.argv[1:]
WHAT, WHERE, RANK, ITERATION = [*TROUBLE.split(":"), "", "", ""][:4]
MARK = Path(FOLDER, "happened")


def _signal_launcher() -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(1)


HAPPENS = {
    "raise": lambda: {}["trouble"],
    "sleep": lambda: time.sleep(600),
    "block": lambda: ctypes.PyDLL(None).sleep(600),  # a call that keeps Python from running
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": _signal_launcher,
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
}


def happens(where: str, iteration: int | None = None) -> None:
    """Let it happen, if this is where."""
    here = where == WHERE and os.environ["RANK"] == RANK and (iteration is None or iteration == int(ITERATION))
    if here and not MARK.exists():
        MARK.write_text(repr(time.time()))
        HAPPENS[WHAT]()


class Numbers(script.Noise):
    """Where ``data`` and ``worker`` are: two samples make an iteration."""

    fetched = 0

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        where = "worker" if get_worker_info() else "data"
        happens(where, self.fetched // 2 + 1)
        self.fetched += 1
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(6, generator=generator), "y": self.labels[index]}


def datasets() -> tuple[Any, Any, Any]:
    """Return the training data; ``preparation`` is here."""
    happens("preparation")
    return DataLoader(Numbers(), batch_size=2, num_workers=int(WHERE == "worker")), None, None


def model() -> nn.Module:
    """Return the model; ``setup`` is here."""
    happens("setup")
    net = script.Net()
    net.dropout.p = 0.0
    return net


def forward_step(data_iterator: Any, net: nn.Module) -> tuple[Any, Any]:
    """Run the model; ``forward`` is here."""
    from mindspeed_mm.training import get_args

    batch = next(data_iterator)
    happens("forward", get_args().iteration + 1)
    return net(**batch), lambda loss: loss


def main() -> None:
    """Train."""
    from mindspeed_mm.training import get_args, pretrain
    from mindspeed_mm.training.checkpointing import Checkpointer

    save = Checkpointer.save

    def troubled(self: Any, *args: Any, **kwargs: Any) -> None:
        happens("save", get_args().iteration)
        save(self, *args, **kwargs)

    Checkpointer.save = troubled
    flags = ["--log-interval", "1", "--eval-iters", "0", "--auto-resume", *FLAGS]
    script.arguments(FOLDER, *flags, steps=int(STEPS))
    pretrain(datasets, model, None, forward_step)


if __name__ == "__main__":
    main()
