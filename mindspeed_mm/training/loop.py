"""The training loop: step, log, evaluate, save, stop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from mindspeed_mm.distributed.phases import begin_step, finish_step, phase
from mindspeed_mm.distributed.state import print_rank_0
from mindspeed_mm.engine import Engine
from mindspeed_mm.engine.base import ForwardStep
from mindspeed_mm.optimizer.schedule import Schedule
from mindspeed_mm.training.evaluation import evaluate, print_losses
from mindspeed_mm.training.exits import ExitWatch
from mindspeed_mm.training.nonfinite import NonFinitePolicy, WatchedStep
from mindspeed_mm.training.reporting import StepRecord, TrainingLog, is_loss, merge_reports, report_memory
from mindspeed_mm.training.step_feed import StepFeed


@dataclass
class Progress:
    """Where the run stands. ``publish`` keeps ``get_args()`` of user scripts up to date."""

    iteration: int
    consumed_samples: int
    publish: Callable[[int, int], None]
    evaluated: tuple[int, float] | None = None
    """Iteration and validation loss of the newest evaluation."""

    def advance(self, samples: int) -> None:
        """Count one finished step."""
        self.go_to(self.iteration + 1, self.consumed_samples + samples)

    def go_to(self, iteration: int, consumed_samples: int) -> None:
        """Stand after ``iteration``."""
        self.iteration, self.consumed_samples = iteration, consumed_samples
        self.publish(iteration, consumed_samples)

    @property
    def validation_loss(self) -> float | None:
        """The validation loss of this iteration, or None if it was not evaluated."""
        return self.evaluated[1] if self.evaluated and self.evaluated[0] == self.iteration else None


@dataclass(frozen=True)
class Cadence:
    """How long to train and how often to do what, in iterations; None is never."""

    train_iters: int
    eval_interval: int
    eval_iters: int
    save_interval: int | None
    gc_interval: int | None
    gc_before_evaluation: bool


class StepWatcher(Protocol):
    """Who is told where a step begins and ends."""

    def step_begins(self, iteration: int) -> None:
        """So many iterations are done; the next begins."""

    def step_ends(self, record: StepRecord) -> None:
        """This became of it."""

    def stop(self) -> None:
        """Training is over, or has failed; other ranks may be gone."""


@dataclass
class Trainer:
    """Everything the loop drives, built by :mod:`mindspeed_mm.training.run`."""

    engine: Engine
    schedule: Schedule
    forward_step: ForwardStep
    feed: StepFeed
    valid_iterators: dict[str, Iterator[Any]]
    num_microbatches: int
    global_batch_size: int
    cadence: Cadence
    progress: Progress
    log: TrainingLog
    nonfinite: NonFinitePolicy
    save: Callable[[], None] | None
    go_back: Callable[[], tuple[int, int]]
    """Restores the newest checkpoint; returns its iteration and consumed samples."""
    generate: Callable[[], None] | None
    """Called after every validation."""
    observers: list[Callable[[], None]]
    """Called after every step: profilers."""
    watchers: list[StepWatcher] = field(default_factory=list)
    """Told when a step begins and ends."""

    def train(self, exits: ExitWatch) -> str | None:
        """Train to the last iteration, or until there is a reason to stop, which is returned.

        The last state is saved in both cases when the run saves at all.
        """
        if self.cadence.gc_interval is not None:
            gc.disable()  # the collector's pauses fall on a different step on every rank, and all wait for each
            gc.collect()
        reason, saved_at = None, self.progress.iteration
        self.engine.module.train()
        first_iteration = self.progress.iteration + 1
        while reason is None and self.progress.iteration < self.cadence.train_iters:
            bad = self._step()
            if bad is not None:
                saved_at = self._roll_back(bad)
                continue
            iteration = self.progress.iteration
            if iteration == first_iteration:
                report_memory(1)
            for observe in self.observers:
                observe()
            if self.cadence.gc_interval and iteration % self.cadence.gc_interval == 0:
                gc.collect()
            if self.valid_iterators and self.cadence.eval_iters and iteration % self.cadence.eval_interval == 0:
                self.evaluate(self.valid_iterators, "validation", f"iteration {iteration}")
            if self.save and self.cadence.save_interval and iteration % self.cadence.save_interval == 0:
                self._save()
                saved_at = iteration
            reason = exits.reason(iteration)
            if exits.save_asked and self.save and not reason and saved_at != iteration:
                if (bad := self.nonfinite.settle()) is None:
                    self._save()
                    saved_at = iteration
                else:
                    saved_at = self._roll_back(bad)
        if (bad := self.nonfinite.settle()) is not None:
            saved_at = self._roll_back(bad)
        self.log.flush()
        if self.save and saved_at != self.progress.iteration:
            self._save()
        if reason:
            print_rank_0(reason)
        return reason

    def evaluate(self, iterators: dict[str, Iterator[Any]], name: str, where: str) -> dict[str, float]:
        """Evaluate on ``eval_iters`` global batches of each data set, print and record the result."""
        if self.cadence.gc_before_evaluation:
            gc.collect()
        with phase("evaluation"):
            losses = evaluate(
                self.engine,
                self.forward_step,
                iterators,
                steps=self.cadence.eval_iters,
                num_microbatches=self.num_microbatches,
                name=name,
                check=self.feed.check,
            )
        print_losses(where, losses)
        if name == "validation":
            loss = next((key for key in losses if is_loss(key)), next(iter(losses)))
            self.progress.evaluated = (self.progress.iteration, losses[loss])
        self.log.validation(self.progress.iteration, self.progress.consumed_samples, losses)
        if self.generate and name == "validation":
            with phase("generation", patient=True):
                self.generate()
        return losses

    def _step(self) -> WatchedStep | None:
        """Make a step; return the step that has to be rolled back, if one turns out to be bad."""
        start = time.perf_counter()
        begin_step(self.progress.iteration + 1)
        self.feed.start_step(self.progress.consumed_samples)
        for watcher in self.watchers:
            watcher.step_begins(self.progress.iteration)
        reports = self.engine.forward_backward(self.forward_step, self.feed, self.num_microbatches)
        if (bad := self.nonfinite.settle()) is not None:  # the step before, long over on the device
            return bad
        learning_rate = self.schedule.current_lr
        result = self.engine.optimizer_step()
        self.schedule.step(self.global_batch_size)
        self.progress.advance(self.global_batch_size + self.feed.passed_over)
        wait, tokens = self.feed.take_counts()
        record = StepRecord(
            iteration=self.progress.iteration,
            consumed_samples=self.progress.consumed_samples,
            learning_rate=learning_rate,
            values=merge_reports(reports),
            grad_norm=result.grad_norm,
            seconds=time.perf_counter() - start,
            data_wait_seconds=wait,
            tokens=tokens,
        )
        for watcher in self.watchers:
            watcher.step_ends(record)
        self.log.add(record)
        self.nonfinite.watch(record, self.feed.taken)
        if self._is_looked_at(record.iteration):
            bad = self.nonfinite.settle()
            self.log.write()
        finish_step(record.seconds)
        return bad

    def _is_looked_at(self, iteration: int) -> bool:
        """Return whether the state after ``iteration`` is about to be logged, evaluated or saved."""
        intervals = (self.log.log_interval, self.cadence.eval_interval, self.cadence.save_interval)
        return iteration >= self.cadence.train_iters or any(n and iteration % n == 0 for n in intervals)

    def _roll_back(self, bad: WatchedStep) -> int:
        """Go back to the newest checkpoint, leaving the samples of the bad step out from now on."""
        self.engine.optimizer.zero_grad(set_to_none=True)
        self.feed.take_counts()
        left_out = self.feed.left_out
        for batch in bad.taken:
            left_out.add(batch.first_sample, batch.end_sample)
        self.progress.go_to(*self.go_back())
        self.log.roll_back(bad.record, self.progress.iteration, left_out.ranges)
        return self.progress.iteration

    def _save(self) -> None:
        self.log.flush()  # what metrics.jsonl says never lags behind what a checkpoint holds
        assert self.save is not None
        with phase("save", patient=True):
            self.save()
