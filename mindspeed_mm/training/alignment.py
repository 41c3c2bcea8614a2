"""Attaching the recording of precision to a run, when one of its flags asks for it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint.coordination import run_together
from mindspeed_mm.distributed.state import data_parallel_group
from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.capture import Capture
from mindspeed_mm.precision.plan import read_plan
from mindspeed_mm.precision.record import RecordWriter
from mindspeed_mm.training.loop import Trainer
from mindspeed_mm.training.reporting import StepRecord
from mindspeed_mm.training.step_feed import TakenBatch


def attach(args: Namespace, trainer: Trainer, manifest: dict[str, Any]) -> None:
    """Record what the flags ask for. A collective.

    Args:
        args: the command line.
        trainer: about to train.
        manifest: what the run is made of.

    Raises:
        UserError: a flag cannot be honoured.
    """
    folder = record_folder(args)
    writer = RecordWriter(folder, dist.get_rank(), dist.get_world_size())
    start = lambda: writer.start(manifest, args.iteration) if dist.get_rank() == 0 else None  # noqa: E731
    run_together(f"writing to {folder}", start)
    engine = trainer.engine
    if args.precision_capture:
        plan = read_plan(args.precision_capture)
        capture = Capture(engine.module, engine.optimizer, writer, plan, device=accelerator.device())
        engine.listeners.append(capture)
        trainer.watchers.append(CaptureWatcher(capture, trainer, args.micro_batch_size))


def record_folder(args: Namespace) -> Path:
    """Return where the record goes.

    Raises:
        UserError: no flag says where.
    """
    if args.precision_dir:
        return Path(args.precision_dir)
    if args.save:
        return Path(args.save) / "precision"
    raise UserError("command line: what is recorded of precision needs a folder: add --precision-dir, or --save.")


class CaptureWatcher:
    """Brings the steps of the loop to a :class:`~mindspeed_mm.precision.capture.Capture`.

    Args:
        capture: it.
        trainer: of the loop.
        micro_batch_size: samples, or packs, of a rank's batch.
    """

    def __init__(self, capture: Capture, trainer: Trainer, micro_batch_size: int) -> None:
        self._capture = capture
        self._feed = trainer.feed
        self._rank = dist.get_rank(data_parallel_group())
        self._size = micro_batch_size

    def step_begins(self, iteration: int) -> None:
        """Let the batches of a recorded step through to the capture."""
        self._capture.step_begins(iteration)
        self._feed.on_batch = self._take if self._capture.is_recording else None

    def step_ends(self, record: StepRecord) -> None:
        """Write the step down."""
        self._capture.step_ends(learning_rate=record.learning_rate)
        self._feed.on_batch = None

    def _take(self, taken: TakenBatch) -> None:
        first = taken.first_sample + self._rank * self._size
        positions = range(first, first + self._size)
        self._capture.micro_batch(taken.batch, positions, self._feed.samples_at(taken.place))
