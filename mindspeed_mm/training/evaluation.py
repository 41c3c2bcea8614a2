"""Evaluation: the mean loss of a fixed number of global batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from mindspeed_mm.distributed.state import print_rank_last
from mindspeed_mm.engine import Engine
from mindspeed_mm.engine.base import ForwardStep
from mindspeed_mm.training.reporting import merge_reports, read_quotients


def evaluate(
    engine: Engine, forward_step: ForwardStep, data_iterator: Iterator[Any], *, steps: int, num_microbatches: int
) -> dict[str, float]:
    """Return each reported value, averaged over ``steps`` global batches, without gradients and in eval mode."""
    was_training = engine.module.training
    engine.module.eval()
    totals: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for _ in range(steps):
                reports = engine.forward_backward(forward_step, data_iterator, num_microbatches, forward_only=True)
                for key, value in merge_reports(reports).items():
                    totals[key] = totals[key] + value if key in totals else value
    finally:
        engine.module.train(was_training)
    return dict(zip(totals, read_quotients(torch.stack(list(totals.values()))), strict=True))


def print_losses(where: str, losses: dict[str, float]) -> None:
    """Print Megatron's validation lines; ``where`` is ``iteration 100`` or ``iteration 100 on test set``."""
    text = f" validation loss at {where} | "
    for key, value in losses.items():
        perplexity = math.exp(min(20, value)) if not math.isnan(value) else math.nan
        text += f"{key} value: {value:.6E} | {key} PPL: {perplexity:.6E} | "
    rule = "-" * (len(text) + 1)
    print_rank_last(f"{rule}\n{text}\n{rule}")
