"""Attaching the recording of precision to a run, when one of its flags asks for it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mindspeed_mm import accelerator
from mindspeed_mm.arguments import road_of
from mindspeed_mm.checkpoint.coordination import run_together
from mindspeed_mm.distributed.state import loader_group, print_rank_0
from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.recording.anomaly import AnomalyRing, read_anomaly_plan
from mindspeed_mm.precision.recording.capture import Capture
from mindspeed_mm.precision.recording.frozen_weights import FrozenWeights
from mindspeed_mm.precision.recording.local_norm import LocalNorms
from mindspeed_mm.precision.recording.perturb import Perturbation
from mindspeed_mm.precision.recording.plan import read_plan
from mindspeed_mm.precision.recording.sites import innermost
from mindspeed_mm.precision.recording.view import ModelView, PlainView
from mindspeed_mm.precision.records.record import RecordWriter
from mindspeed_mm.training.loop import Trainer
from mindspeed_mm.training.reporting import StepRecord
from mindspeed_mm.training.step_feed import StepFeed, TakenBatch

_SUMS_EVERY = 100  # steps between two looks at the sums of lr0


def attach(args: Namespace, trainer: Trainer, manifest: dict[str, Any]) -> None:
    """Record what the flags ask for. A collective.

    Args:
        args: the command line.
        trainer: about to train.
        manifest: what the run is made of.

    Raises:
        UserError: a flag cannot be honoured.
    """
    engine = trainer.engine
    view = _view(args, engine)
    if args.precision_perturb:  # first: what is recorded is to have the noise
        Perturbation(args.precision_perturb).attach(innermost(engine.module))
        print_rank_0("--precision-perturb: rounding noise is added, for a band; this is no run to keep")
    if args.log_local_norm:
        norms = LocalNorms(view)
        trainer.log.parameter_names = norms.names
        engine.listeners.append(norms)
        trainer.watchers.append(NormWatcher(norms))
    if args.precision_capture:
        plan = read_plan(args.precision_capture)
        writer = _writer(_record_folder(args), manifest, args.iteration)
        capture = Capture(view, engine.optimizer, writer, plan, device=accelerator.device())
        engine.listeners.append(capture)
        trainer.watchers.append(CaptureWatcher(capture, trainer.feed, args.micro_batch_size))
    if args.precision_on_anomaly:
        anomaly = read_anomaly_plan(args.precision_on_anomaly)
        ring = AnomalyRing(view, RecordWriter(_record_folder(args) / "anomalies", *_ranks()), anomaly)
        engine.listeners.append(ring)
        trainer.watchers.append(AnomalyWatcher(ring, trainer.feed))
    if args.precision_mode == "lr0":
        writer = _writer(_record_folder(args) / "lr0", manifest, args.iteration)
        frozen = FrozenWeights(view, writer)  # last: the others see the update before it is taken back
        engine.listeners.append(frozen)
        trainer.watchers.append(SumWatcher(frozen))
        print_rank_0("--precision-mode lr0: the weights stay as they are")


def _view(args: Namespace, engine: Any) -> ModelView:
    if road_of(args) == "fsdp2":
        return PlainView(engine.module)
    from mindspeed_mm.precision.recording.megatron.view import MegatronView

    return MegatronView(engine.module, engine.mains, engine.group_names)


def _ranks() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def _writer(folder: Path, manifest: dict[str, Any], iteration: int) -> RecordWriter:
    writer = RecordWriter(folder, *_ranks())
    start = lambda: writer.start(manifest, iteration) if writer.rank == 0 else None  # noqa: E731
    run_together(f"writing to {folder}", start)
    return writer


def _record_folder(args: Namespace) -> Path:
    if args.precision_dir:
        return Path(args.precision_dir)
    if args.save:
        return Path(args.save) / "precision"
    raise UserError("command line: what is recorded of precision needs a folder: add --precision-dir, or --save.")


class NormWatcher:
    """Hands the local norms to the log."""

    def __init__(self, norms: LocalNorms) -> None:
        self._norms = norms

    def step_begins(self, iteration: int) -> None:
        """Nothing to do."""

    def step_ends(self, record: StepRecord) -> None:
        """Put the norms into the step's record."""
        record.local_norms = self._norms.norms

    def stop(self) -> None:
        """Nothing to do."""


class CaptureWatcher:
    """Brings the steps of the loop to a :class:`~mindspeed_mm.precision.recording.capture.Capture`.

    Args:
        capture: it.
        feed: of the loop.
        micro_batch_size: samples, or packs, of a rank's batch.
    """

    def __init__(self, capture: Capture, feed: StepFeed, micro_batch_size: int) -> None:
        self._capture = capture
        self._feed = feed
        self._rank = dist.get_rank(loader_group())
        self._size = micro_batch_size

    def step_begins(self, iteration: int) -> None:
        """Let the batches of a recorded step through to the capture."""
        self._capture.step_begins(iteration)
        self._feed.on_batch = self._take if self._capture.is_recording else None

    def step_ends(self, record: StepRecord) -> None:
        """Write the step down."""
        self._capture.step_ends(learning_rate=record.learning_rate)
        self._feed.on_batch = None

    def stop(self) -> None:
        """Leave nothing attached to the model of a step that was not finished."""
        self._capture.give_up()

    def _take(self, taken: TakenBatch) -> None:
        first = taken.first_sample + self._rank * self._size
        positions = range(first, first + self._size)
        self._capture.micro_batch(taken.batch, positions, self._feed.samples_at(taken.place))


class AnomalyWatcher:
    """Brings the steps of the loop to an :class:`~mindspeed_mm.precision.recording.anomaly.AnomalyRing`."""

    def __init__(self, ring: AnomalyRing, feed: StepFeed) -> None:
        self._ring = ring
        self._feed = feed

    def step_begins(self, iteration: int) -> None:
        """A step begins."""
        self._ring.step_begins(iteration)

    def step_ends(self, record: StepRecord) -> None:
        """Look at the step before."""
        taken = self._feed.taken
        self._ring.take(
            [item.batch for item in taken],
            lambda: [name for item in taken for name in self._feed.samples_at(item.place) or ()],
        )
        self._tell(self._ring.step_ends(record.learning_rate))

    def stop(self) -> None:
        """Look at the last step."""
        self._tell(self._ring.stop())

    def _tell(self, folder: Path | None) -> None:
        if folder:
            print_rank_0(f"anomaly: the last steps are in {folder}; replay them with {folder / 'replay.sh'}")


class SumWatcher:
    """Writes the sums of ``--precision-mode lr0`` now and then."""

    def __init__(self, frozen: FrozenWeights) -> None:
        self._frozen = frozen
        self._last = self._written = -1

    def step_begins(self, iteration: int) -> None:
        """Nothing to do."""

    def step_ends(self, record: StepRecord) -> None:
        """Write the sums of every hundredth step."""
        self._last = record.iteration - 1
        if record.iteration % _SUMS_EVERY == 0:
            self._write()

    def stop(self) -> None:
        """Write the sums of the last step."""
        if self._written < self._last:
            self._write()

    def _write(self) -> None:
        self._frozen.write(self._last)
        self._written = self._last
