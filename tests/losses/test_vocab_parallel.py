"""Cross entropy over a divided vocabulary is torch's over the whole one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.losses import vocab_parallel_token_losses
from tests.ranks import RankPool


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits with a large offset, targets of which some are none, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 3, 12, generator=generator) * 4 + 300).to(dtype)
    targets = torch.randint(0, 12, (5, 3), generator=generator)
    targets[1], targets[2, 0] = -100, -1
    return logits, targets, torch.randn(5, 3, generator=generator)


def divided(dtype: torch.dtype) -> tuple[Tensor, Tensor, bool]:
    logits, targets, gradient = data(dtype)
    mine = logits.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()].contiguous().requires_grad_()
    before = mine.detach().clone()
    losses = vocab_parallel_token_losses(mine, targets, dist.group.WORLD)
    losses.backward(gradient.to(losses.dtype))
    assert mine.grad is not None
    return losses.detach(), mine.grad, torch.equal(mine, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_losses_and_gradients(ranks2: RankPool, dtype: torch.dtype) -> None:
    answers = ranks2.run(divided, dtype)
    logits, targets, gradient = data(dtype)
    logits.requires_grad_()
    wide = logits if dtype == torch.float64 else logits.float()
    right = F.cross_entropy(wide.flatten(0, 1), targets.clamp(min=-1).flatten(), ignore_index=-1, reduction="none")
    right = right.view(targets.shape)
    right.backward(gradient.to(right.dtype))
    assert logits.grad is not None
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for losses, _, kept in answers:
        assert kept and losses.dtype == right.dtype
        torch.testing.assert_close(losses, right.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([a[1] for a in answers], -1), logits.grad, rtol=tolerance, atol=tolerance)
