"""What a ``loss_func`` of a user's own makes FSDP2 optimise, against the formulas of docs/en/losses.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import RankPool

# Of each rank, what its two micro-batches return: the numerator of a sum of weights and its number, or a mean.
WHOLE_ON_ONE_RANK: list[list[tuple[float, Any]]] = [[(2.0, 0.75), (3.0, 1.5)], [(5.0, 4), (0.0, 0)]]
A_MEAN_AMONG_SUMS: list[list[tuple[float, Any]]] = [[(2.0, 3), (3.0, None)], [(5.0, None), (4.0, 2)]]


def slope(shares: list[list[tuple[float, Any]]], flag: str) -> tuple[float, float]:
    """Return the gradient of a step, and the loss that is logged, where a micro-batch's loss is its number times x."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from mindspeed_mm.distributed import state
    from mindspeed_mm.distributed.reduction import sum_gradients
    from mindspeed_mm.engine.fsdp2 import FSDP2Engine
    from mindspeed_mm.training.reporting import merge_reports, read_quotients

    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    fully_shard(model)
    sum_gradients(model)
    engine = FSDP2Engine(
        model, torch.optim.SGD(model.parameters(), lr=1.0), group=dist.group.WORLD, clip_grad=0.0, **{flag: True}
    )

    def forward_step(iterator: Any, model: nn.Module) -> Any:
        factor, number = next(iterator)

        def loss_func(x: Tensor) -> Any:
            loss = factor * x.sum()
            return loss if number is None else (loss, number, {})

        return model(torch.ones(1, 1)), loss_func

    reports = engine.forward_backward(forward_step, iter(shares[dist.get_rank()]), 2)
    return model.weight.grad.full_tensor().item(), read_quotients(merge_reports(reports)["loss"])


@pytest.mark.parametrize(
    ("shares", "flag", "expected"),
    [
        (WHOLE_ON_ONE_RANK, "per_token_loss", (2 + 3 + 5 + 0) / (0.75 + 1.5 + 4 + 0)),
        (A_MEAN_AMONG_SUMS, "per_sample_loss", (2 + 3 + 5 + 4) / (3 + 1 + 1 + 2)),
    ],
)
def test_what_is_logged_is_what_is_optimised(
    ranks2: RankPool, shares: list[list[tuple[float, Any]]], flag: str, expected: float
) -> None:
    for found in ranks2.run(slope, shares, flag, timeout=60):
        assert found == pytest.approx((expected, expected), rel=1e-6)
