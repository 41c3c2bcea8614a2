"""Tiny models whose dimensions two ranks cannot divide, and a way to compare a sharded one with a plain one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.configs.fsdp2 import Fsdp2Config
from mindspeed_mm.distributed.fsdp2 import apply_fsdp2
from mindspeed_mm.distributed.shard_plan import ShardPlan


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0
        self.seen: list[torch.dtype] = []

    def forward(self, *, hidden: torch.Tensor, cache: list[int] | None = None) -> torch.Tensor:
        self.calls += 1
        self.seen = [hidden.dtype, self.linear.weight.dtype]
        return hidden + self.dropout(torch.tanh(self.linear(hidden)))


class Tiny(nn.Module):
    """Embedding, a frozen-able tower, blocks that are called by keyword only, and a head."""

    def __init__(self, width: int = 5, tied: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.build(width, tied, dropout)

    def build(self, width: int = 5, tied: bool = False, dropout: float = 0.0) -> None:
        self.tower = nn.Sequential(nn.Linear(3, width), nn.Linear(width, width))
        self.embed = nn.Embedding(7, width)
        self.layers = nn.ModuleList(Block(width, dropout) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids) + self.tower(image)
        for layer in self.layers:
            hidden = layer(hidden=hidden)
        return self.head(hidden * self.scale)


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(0, 7, (2, 4), generator=generator), torch.randn(2, 4, 3, generator=generator)) for _ in range(n)
    ]


def tiny(frozen: tuple[str, ...] = (), **kwargs: Any) -> Tiny:
    torch.manual_seed(1)
    model = Tiny(**kwargs)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return model


def shard(model: nn.Module, **keys: Any) -> ShardPlan:
    return apply_fsdp2(model, Fsdp2Config(**keys))


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return model(*batch).float().square().sum()


def full(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(model: nn.Module, reference: nn.Module) -> None:
    """Both models see the batches of all ranks, ``model`` one on each rank; gradients must agree to the bit."""
    world = dist.get_world_size()
    todo = batches(world)
    for batch in todo:
        (loss_of(reference, batch) / world).backward()
    (loss_of(model, todo[dist.get_rank()]) / world).backward()
    expected = {name: param.grad for name, param in reference.named_parameters()}
    for name, param in model.named_parameters():
        assert (param.grad is None) == (expected[name] is None), name
        if param.grad is not None:
            assert torch.equal(full(param.grad), expected[name]), name
