"""What a run does about a step whose loss or gradient is not finite: ``--nan-policy``.

Such a step changes neither weights nor optimizer state; that is decided on the device. The host learns of it when it
reads the gradient norm, before the next update and before anything is logged, evaluated or saved. Weights and
optimizer are then still those the step began with, and only the schedule has to be taken back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from mindspeed_mm.accelerator import HostRead
from mindspeed_mm.distributed.state import data_parallel_group, warn_rank_0
from mindspeed_mm.engine import Engine
from mindspeed_mm.engine.base import ForwardStep
from mindspeed_mm.errors import UserError
from mindspeed_mm.optimizer.schedule import Schedule
from mindspeed_mm.training.diagnosis import Finding, diagnose
from mindspeed_mm.training.reporting import StepRecord, TrainingLog, read_means
from mindspeed_mm.training.step_feed import TakenBatch, count_targets

_TOO_LARGE = 1e15
"""The squares of some hundred million gradients of this size overflow."""


@dataclass
class WatchedStep:
    """A step whose outcome the host does not know yet."""

    record: StepRecord
    grad_norm: HostRead
    taken: list[TakenBatch]


class NonFinitePolicy:
    """Learns what became of a step, and acts on it.

    Args:
        policy: ``stop``, ``skip`` or ``rollback``.
        limit: skipped steps in a row, or rollbacks, after which it stops all the same.
        engine: its optimizer leaves such a step out.
        schedule: advances for the other steps only.
        forward_step: the user's, to run a step again.
        log: written out before the run stops.
        num_microbatches: of a step.
        samples: of a step, on all ranks together.
        samples_at: names the samples of a batch.
        where_to_resume: how to continue after a stop.
    """

    def __init__(
        self,
        policy: str,
        limit: int,
        *,
        engine: Engine,
        schedule: Schedule,
        forward_step: ForwardStep,
        log: TrainingLog,
        num_microbatches: int,
        samples: int,
        samples_at: Callable[[object], list[str] | None],
        where_to_resume: Callable[[], str],
    ) -> None:
        self.policy = policy
        self.limit = limit
        self.engine = engine
        self.schedule = schedule
        self.forward_step = forward_step
        self.log = log
        self.num_microbatches = num_microbatches
        self.samples = samples
        self.samples_at = samples_at
        self.where_to_resume = where_to_resume
        self._step: WatchedStep | None = None
        self._times = 0  # skipped in a row, or rolled back in the run

    def watch(self, record: StepRecord, taken: list[TakenBatch]) -> None:
        """Take the step that was just made; its gradient norm starts on its way to the host."""
        self._step = WatchedStep(record, HostRead(record.grad_norm), taken)

    def settle(self) -> WatchedStep | None:
        """Learn what became of the step, if there is one. A collective when it was bad.

        Returns:
            The step, if the run has to be rolled back because of it.

        Raises:
            UserError: the run ends, for the reason the message gives.
        """
        step, self._step = self._step, None
        if step is None:
            return None
        (norm,) = step.grad_norm.read()
        if math.isfinite(norm):
            if self.policy == "skip":
                self._times = 0
            if norm == 0:
                self._expect_targets(step)
            return None
        step.record.skipped = True
        self.schedule.step(-self.samples)
        self._times += 1
        goes_on = self.policy != "stop" and self._times <= self.limit
        values = self._values(step.record)
        action = {"skip": f"skipped, {self._times} in a row", "rollback": f"rollback {self._times} of the run"}
        warn_rank_0(
            f"iteration {step.record.iteration}: {values} | grad norm: {norm} | weights and optimizer stay as they were"
            + (f" ({action[self.policy]})" if goes_on else "")
        )
        if not goes_on:
            self.log.flush(print_line=True)
            raise UserError(self._account(step, values, norm))
        return step if self.policy == "rollback" else None

    def _values(self, record: StepRecord) -> str:
        return " | ".join(f"{key}: {mean}" for key, mean in read_means(record.values).items())

    def _account(self, step: WatchedStep, values: str, norm: float) -> str:
        group = data_parallel_group()
        findings = diagnose(self.engine, self.forward_step, step.taken, self.num_microbatches, group)
        bad = [(f.micro_batch, rank) for rank, f in enumerate(findings) if f.micro_batch is not None]
        first = min(bad, default=(0, None))
        ranks = [rank for index, rank in bad if index == first[0]]
        batches = step.taken[first[0] : first[0] + 1]
        names: list[list[str] | None] = [None] * len(findings)
        dist.all_gather_object(
            names, [name for item in batches for name in self.samples_at(item.place) or ()], group=group
        )
        lines = [f"iteration {step.record.iteration}: not finite: {values} | grad norm: {norm}"]
        if self.policy != "stop":
            what = {"skip": "steps in a row were skipped", "rollback": "rollbacks were made"}[self.policy]
            lines[0] += f" (--nan-limit {self.limit}: that many {what} before)"
        if ranks:
            lines += self._of_the_loss(findings, first[0], ranks, names, batches)
        else:
            lines += _of_the_gradient(findings)
        before = step.record.iteration - 1
        lines.append(f"weights and optimizer are those after iteration {before}; this state was not saved")
        lines.append(self.where_to_resume())
        if self.policy == "stop":
            lines.append("--nan-policy skip or rollback goes on without such a step")
        return "\n  ".join(lines)

    def _of_the_loss(
        self,
        findings: list[Finding],
        index: int,
        ranks: list[int],
        names: list[list[str] | None],
        batches: list[TakenBatch],
    ) -> list[str]:
        lines = []
        for rank in ranks[:3]:
            finding = findings[rank]
            samples = _listed(names[rank] or [])
            if batches and not samples:
                samples = f"of consumed samples {batches[0].first_sample} to {batches[0].end_sample - 1}"
            lines.append(
                f"rank {rank}, micro-batch {index + 1} of {self.num_microbatches}: loss {finding.loss}"
                + (f", samples {samples}" if samples else "")
            )
            if finding.keys:
                lines.append(f"  the batch itself is not finite: {', '.join(finding.keys)}")
            lines.append(f"  first module whose output is not finite: {finding.module or 'none, only the loss'}")
        if len(ranks) > 3:
            lines.append(f"and ranks {', '.join(map(str, ranks[3:]))}")
        return lines

    def _expect_targets(self, step: WatchedStep) -> None:
        """Refuse a gradient of exactly zero that comes from labels that are all ignored, on every rank."""
        count = count_targets(step.taken)
        counts: list[int | None] = [None] * dist.get_world_size(data_parallel_group())
        dist.all_gather_object(counts, count if step.taken else None, group=data_parallel_group())
        if any(counts) or None in counts:
            return
        first, end = step.taken[0].first_sample, step.taken[-1].end_sample
        samples = [name for item in step.taken for name in self.samples_at(item.place) or ()]
        raise UserError(
            f"iteration {step.record.iteration}: no sample of the global batch has a target: every label is -100, on "
            f"all ranks ({_listed(samples) or f'consumed samples {first} to {end - 1}'}). Check 'labels' in your "
            "data, and whether samples are cut before the answer begins."
        )


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _of_the_gradient(findings: list[Finding]) -> list[str]:
    """Describe a step all losses of which are finite."""
    gradients = [f.gradient for f in findings if f.gradient is not None]
    largest = max(f.largest for f in findings)
    if not gradients and largest > _TOO_LARGE:
        return [
            f"all losses and gradients are finite, the largest value of a gradient is {largest:.1e}: the sum of their "
            "squares is too large for float32. Training has diverged; lower --lr, or look at the loss"
        ]
    if not gradients:
        return [
            "the same batches run again give finite losses and gradients: a fault of the hardware, or a kernel that "
            "is not deterministic (--use-deter-comp)"
        ]
    lines = [f"all losses are finite; the gradient of '{max(gradients)[1]}' is not, and of none after it"]
    modules = [(rank, f.module) for rank, f in enumerate(findings) if f.module]
    lines += [f"first module whose output is not finite: {module} on rank {rank}" for rank, module in modules[:1]]
    if not modules:
        lines.append("all modules' outputs are finite, so the backward pass made it")
    return lines
