"""The last steps before something went wrong: ``--precision-on-anomaly``."""

from __future__ import annotations

import math
import os
import shlex
import statistics
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm import accelerator
from mindspeed_mm.accelerator import HostRead
from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.view import ModelView
from mindspeed_mm.precision.records.record import Key, RankStep, RecordWriter, SampleFingerprint

_HISTORY = 64
_ENOUGH = 8  # steps before a leap can be told
# What the replay has settings of its own for.
_OWN_FLAGS = ("--save", "--load", "--save-interval", "--exit-interval", "--export-hf", "--export-hf-interval")
_PREFIX = "--precision-"


@dataclass(frozen=True)
class AnomalyPlan:
    """What to do about an anomaly.

    Attributes:
        dump: steps to write down, the bad one included.
        spike: a gradient norm of so many times the median of those before is one.
        loss: so is a loss of so many times the median.
    """

    dump: int = 3
    spike: float = 10.0
    loss: float = 3.0


def read_anomaly_plan(text: str) -> AnomalyPlan:
    """Read ``dump=3,spike=10,loss=3``.

    Raises:
        UserError: it says something else.
    """
    try:
        values = {name.strip(): float(value) for name, _, value in (item.partition("=") for item in text.split(","))}
        plan = AnomalyPlan(**{**values, "dump": int(values.get("dump", AnomalyPlan.dump))})  # type: ignore[arg-type]
        readable = plan.dump >= 1 and plan.spike > 1 and plan.loss > 1
    except (TypeError, ValueError, OverflowError):
        readable = False
    if not readable:
        raise UserError(
            f"command line: --precision-on-anomaly {text}: write dump=3 for the number of steps, and if need be "
            "dump=3,spike=10,loss=3 for how many times the usual gradient norm, and the usual loss, is a spike."
        )
    return plan


@dataclass
class _Kept:
    step: int
    pool: StepPool
    losses: list[Tensor]
    batches: list[Any]
    names: Callable[[], list[str]]
    grad_norm: HostRead | None = None
    whole_loss: HostRead | None = None
    learning_rate: float = 0.0
    factor: Tensor | float = 1.0
    judged: bool = False

    @property
    def is_finished(self) -> bool:
        """Return whether the step came as far as its update."""
        return self.whole_loss is not None

    def read(self) -> tuple[float, float]:
        """Return gradient norm and loss of a finished step."""
        assert self.grad_norm and self.whole_loss
        return self.grad_norm.read()[0], self.whole_loss.read()[0]


class AnomalyRing:
    """Keeps the gradients' sketches and the batches of the last steps, and writes them down after a bad one.

    The host learns of a step's gradient norm and loss when the next one is over, so nothing waits for the device.

    Args:
        view: of the model.
        writer: of this rank, for a folder of its own.
        plan: what to keep.
    """

    def __init__(self, view: ModelView, writer: RecordWriter, plan: AnomalyPlan) -> None:
        self._view = view
        self._trained = [held for held in view.held if held.value.requires_grad]
        self._writer = writer
        self._plan = plan
        self._ring: deque[_Kept] = deque(maxlen=plan.dump + 1)  # the newest is not judged yet
        self._norms: deque[float] = deque(maxlen=_HISTORY)
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._usual = True  # a run that has gone astray is one anomaly, however long it goes on

    def step_begins(self, step: int) -> None:
        """Make room for a step, in the place of one that was broken off."""
        if self._ring and not self._ring[-1].is_finished:
            self._ring.pop()
        self._ring.append(_Kept(step, StepPool(), [], [], list))

    def take(self, batches: Sequence[Any], names: Callable[[], list[str]]) -> None:
        """Keep the step's batches; ``names`` of their samples are looked up when they are written."""
        self._ring[-1].batches, self._ring[-1].names = list(batches), names

    def loss(self, loss: Tensor, num_tokens: Tensor | None = None) -> None:
        """Keep a micro-batch's part of the loss."""
        self._ring[-1].losses.append(loss.detach().float().reshape(()))

    def gradients_reduced(self, factor: Tensor | float = 1.0) -> None:
        """Keep sketches of the gradients."""
        self._ring[-1].factor = factor
        for held in self._trained:
            if held.value.grad is not None:
                for name, placed in held.parts(held.value.grad):
                    self._ring[-1].pool.add_whole(Key("grad_reduced", name, "gradient"), placed)

    def gradients_clipped(self, grad_norm: Tensor) -> None:
        """Let the norm and the loss go on their way to the host. A collective: a rank knows its part of the loss."""
        newest = self._ring[-1]
        newest.grad_norm = HostRead(grad_norm)
        loss = torch.zeros((), device=accelerator.device())
        if newest.losses and self._view.speaks_for_loss:
            loss += torch.stack(newest.losses).sum() * newest.factor
        if dist.is_initialized():
            dist.all_reduce(loss)
        newest.whole_loss = HostRead(loss)

    def updated(self) -> None:
        """Nothing to do."""

    def step_ends(self, learning_rate: float) -> Path | None:
        """Look at the step before this one; return where something was written."""
        self._ring[-1].learning_rate = learning_rate
        return self._judge(list(self._ring)[:-1])

    def stop(self) -> Path | None:
        """Look at the last step that was finished: nothing follows, or what follows was broken off by its fault."""
        return self._judge([item for item in self._ring if item.is_finished])

    def _judge(self, kept: list[_Kept]) -> Path | None:
        if not kept or kept[-1].judged:
            return None
        newest = kept[-1]
        newest.judged = True
        norm, loss = newest.read()
        usual = _is_usual(norm, self._norms, self._plan.spike) and _is_usual(loss, self._losses, self._plan.loss)
        begins, self._usual = self._usual and not usual, usual
        if usual:
            self._norms.append(norm)
            self._losses.append(loss)
        return self._write(kept[-self._plan.dump :]) if begins else None

    def _write(self, kept: list[_Kept]) -> Path:
        folder = self._writer.folder / f"step_{kept[-1].step:07d}"
        writer = RecordWriter(folder, self._writer.rank, self._writer.world_size)
        if writer.rank == 0:
            norm, loss = kept[-1].read()
            about = {"step": kept[-1].step, "grad_norm": norm, "usual": list(self._norms)}
            about |= {"loss": loss, "usual_losses": list(self._losses)}
            writer.write_manifest({"anomaly": about})
            self._write_script(folder, kept[0].step, kept[-1].step)
        folder.mkdir(parents=True, exist_ok=True)
        writer.forget_mine()
        for item in kept:
            names = item.names() if self._view.speaks else []
            norm, loss = item.read()
            scalars = {"learning_rate": item.learning_rate, "loss": loss, "grad_norm": norm}
            data = RankStep(
                entries=item.pool.read(),
                scalars={name: (value, "same") for name, value in scalars.items()},
                samples=[SampleFingerprint("", {}, name=name) for name in names],
            )
            writer.write(item.step, data)
        batches = {item.step: [dict(b) if isinstance(b, Mapping) else b for b in item.batches] for item in kept}
        torch.save(batches, folder / f"batches_{writer.rank:05d}.pt")
        return folder

    def _write_script(self, folder: Path, first: int, last: int) -> None:
        save = _value_of("--save")
        load = _value_of("--load")
        if save and any(Path(save).glob("iter_*")):
            load = save  # the newest state before the bad step
        command = [*_without_own(sys.argv), "--exit-interval", str(last + 1)]
        command += ["--precision-dir", str((folder / "replay").absolute())]
        command += ["--precision-capture", f"steps={first}-{last},level=module"]
        if load:
            command += ["--load", load]
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        lines = [
            "#!/bin/sh",
            f"# Trains again up to iteration {last + 1}, from the newest checkpoint or from the start, with the same",
            f"# samples and random numbers, and records steps {first} to {last} with every module. Nothing is saved.",
            f"cd {shlex.quote(os.getcwd())} || exit 2",
            f'exec "${{PYTHON:-python}}" -m torch.distributed.run --standalone --nproc_per_node {ranks} \\',
            "  " + " ".join(shlex.quote(word) for word in command) + ' "$@"',
        ]
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "replay.sh"
        script.write_text("\n".join(lines) + "\n", encoding="utf-8")
        script.chmod(0o755)


def _is_usual(value: float, before: Sequence[float], most: float) -> bool:
    """Return whether ``value`` is finite and no more than ``most`` times the median of those before."""
    return math.isfinite(value) and (len(before) < _ENOUGH or value <= most * abs(statistics.median(before)))


def _is(word: str, flag: str) -> bool:
    return word.partition("=")[0].replace("_", "-") == flag


def _value_of(flag: str) -> str | None:
    """Return what the command line gives a flag, as an absolute path."""
    for number, word in enumerate(sys.argv):
        if _is(word, flag):
            value = word.partition("=")[2] or (sys.argv[number + 1] if number + 1 < len(sys.argv) else "")
            return str(Path(value).absolute())
    return None


def _without_own(words: Sequence[str]) -> list[str]:
    """Return a command line without the flags that the replay sets itself, and their values."""
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0].replace("_", "-")
            dropping = name in _OWN_FLAGS or name.startswith(_PREFIX)
        if not dropping:
            kept.append(word)
    return kept
