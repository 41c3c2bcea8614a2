"""Evaluation: mean losses of a fixed number of global batches, or of one pass over everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm import accelerator
from mindspeed_mm.data.iterators import CyclicIterator
from mindspeed_mm.distributed.state import data_parallel_group, print_rank_last, warn_rank_0
from mindspeed_mm.engine import Engine
from mindspeed_mm.engine.base import ForwardStep, Report
from mindspeed_mm.errors import UserError
from mindspeed_mm.training.feed import Check, Feed, count_samples
from mindspeed_mm.training.reporting import is_loss, merge_reports, perplexity, read_means

FULL_PASS = -1
"""``--eval-iters`` for all samples, once each."""


def evaluate(
    engine: Engine,
    forward_step: ForwardStep,
    iterators: Mapping[str, Iterator[Any]],
    *,
    steps: int,
    num_microbatches: int,
    name: str,
    check: Check | None = None,
) -> dict[str, float]:
    """Return each reported value of each data set, averaged, without gradients and in eval mode.

    Training goes on as if nothing had happened: random states and the mode of every module are restored.

    Args:
        engine: the model.
        forward_step: the user's.
        iterators: by the name of the data set; the values of a named one are called ``<value>/<name>``.
        steps: global batches of each data set, which continue from one call to the next; `FULL_PASS` takes all its
            samples once, from the beginning, and counts a micro-batch that is not full by its samples.
        num_microbatches: micro-batches in a global batch.
        name: what the iterators feed, for messages.
        check: see :class:`~mindspeed_mm.training.feed.Feed`.
    """
    values: dict[str, float] = {}
    with undisturbed(engine.module):
        for dataset, iterator in iterators.items():
            if steps == FULL_PASS:
                totals = _full_pass(engine, forward_step, iterator, name, check)
            else:
                totals = _steps(engine, forward_step, Feed(iterator, name, check), steps, num_microbatches)
            values |= {f"{key}/{dataset}" if dataset else key: mean for key, mean in read_means(totals).items()}
    for key, value in values.items():
        if is_loss(key) and value == 0:
            warn_rank_0(
                f"{name} {key} is exactly 0: no sample of the {name} data seems to have a target. Check 'labels', and "
                "whether samples are cut before the answer begins."
            )
    return values


def check_full_pass(iterators: Mapping[str, Iterator[Any]], name: str) -> None:
    """Check that every one of the iterators can be gone through from its beginning.

    Raises:
        UserError: one cannot.
    """
    if not all(isinstance(iterator, CyclicIterator) for iterator in iterators.values()):
        raise UserError(
            f"--eval-iters -1: the {name} data is an iterator, which has no beginning to go back to. Return a "
            "DataLoader or another iterable from train_valid_test_datasets_provider, or give the number of batches."
        )


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluate inside: eval mode and no gradients, and afterwards every mode and random state as before."""
    modes = {part: part.training for part in module.modules()}
    random_state = accelerator.rng_state()
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        accelerator.set_rng_state(random_state)


def print_losses(where: str, losses: Mapping[str, float]) -> None:
    """Print Megatron's validation lines; ``where`` is ``iteration 100`` or ``iteration 100 on test set``."""
    text = f" validation loss at {where} | "
    for key, value in losses.items():
        text += f"{key} value: {value:.6E} | {key} PPL: {perplexity(value):.6E} | "
    rule = "-" * (len(text) + 1)
    print_rank_last(f"{rule}\n{text}\n{rule}")


def _steps(
    engine: Engine, forward_step: ForwardStep, feed: Feed, steps: int, num_microbatches: int
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for _ in range(steps):
        _add(totals, engine.forward_backward(forward_step, feed, num_microbatches, forward_only=True))
    return totals


def _full_pass(
    engine: Engine, forward_step: ForwardStep, iterator: Any, name: str, check: Check | None
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for batch, samples in _in_step(iterator, name):
        reports = engine.forward_backward(forward_step, Feed(iter([batch]), name, check), 1, forward_only=True)
        _add(totals, [_weighted(report, samples) for report in reports])
    if not totals:
        raise UserError(
            f"--eval-iters -1: the {name} data gave no batch on any rank. Give it samples, or return None in place of "
            "the loader from train_valid_test_datasets_provider."
        )
    return totals


def _in_step(iterator: CyclicIterator, name: str) -> Iterator[tuple[Any, int]]:
    """Yield ``(batch, samples in it)`` equally often on every rank.

    A rank that has run out goes on with a batch that counts 0 samples: sharded modules run on all ranks or hang.
    """
    batches, batch = iterator.one_pass(), None
    while True:
        following = next(batches, None)
        more = torch.tensor(following is not None, dtype=torch.int32, device=accelerator.device())
        dist.all_reduce(more, op=dist.ReduceOp.MAX, group=data_parallel_group())
        if not more.item():
            return
        if following is not None:
            batch = following
            yield batch, count_samples(batch)
            continue
        if batch is None:
            batch = iterator.stand_in()
        if batch is None:
            raise UserError(
                f"--eval-iters -1: the {name} loader of rank {dist.get_rank()} is empty, that of another rank is not. "
                "Give every rank a batch, or build the loader with build_mm_dataloader."
            )
        yield batch, 0


def _weighted(report: Report, samples: int) -> Report:
    """Weigh a report by its samples; ``(numerator, denominator)`` pairs carry their own weight."""
    pairs = {}
    for key, value in report.items():
        numerator, denominator = value if isinstance(value, (tuple, list)) else (value * samples, samples)
        # Not times zero: what does not count may be NaN.
        pairs[key] = (numerator, denominator) if samples else (0, 0)
    return pairs


def _add(totals: dict[str, Tensor], reports: list[Report]) -> None:
    for key, value in merge_reports(reports).items():
        totals[key] = totals[key] + value if key in totals else value
