"""Norm and clipping of sharded gradients against ``torch.nn.utils.clip_grad_norm_`` in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from mindspeed_mm.distributed.grad_norm import total_grad_norm
from mindspeed_mm.engine.fsdp2 import FSDP2Engine
from tests.distributed.tiny import Tiny, batches, full, shard, tiny
from tests.ranks import RankPool

LAYERS = {"sharding_size": "auto", "sub_modules_to_wrap": ["layers.{*}"]}
FROZEN = {"frozen": ("tower", "layers.1")}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FSDP2": (LAYERS, {}),
    "HSDP, 2 replicas of 1 shard": ({**LAYERS, "sharding_size": 1}, {}),
    "HSDP, 1 replica of 2 shards": ({**LAYERS, "sharding_size": 2}, {}),
    "root only": ({"sharding_size": "auto", "sub_modules_to_wrap": []}, {}),
    "frozen, whole on every rank": (LAYERS, FROZEN),
    "frozen, sharded": ({**LAYERS, "replicate_frozen_mib": 0}, FROZEN),
    "frozen, HSDP": ({**LAYERS, "sharding_size": 1, "replicate_frozen_mib": 0}, FROZEN),
    "trained, whole on every rank": ({**LAYERS, "ignored_modules": ["tower", "layers.1.linear"]}, {}),
    "all of it whole": ({"ignored_modules": ["tower", "embed", "layers.{*}", "head"]}, {}),
    "tied": ({**LAYERS, "sub_modules_to_wrap": ["layers.{*}", "embed", "head"]}, {"tied": True}),
    "tied, in the root": (LAYERS, {"tied": True}),
    "recomputed": ({**LAYERS, "recompute_modules": ["layers.{*}"]}, {}),
    "offloaded": ({**LAYERS, "offload_to_cpu": True}, {}),
    "offloaded, frozen, tied": ({**LAYERS, "offload_to_cpu": True}, {**FROZEN, "tied": True}),
    "a rank without elements": (LAYERS, {"width": 1}),
}


class Keeping(torch.optim.SGD):
    """An optimizer that writes down the gradients it is given."""

    def step(self, closure: Any = None) -> None:
        self.given = [full(p.grad).clone() for group in self.param_groups for p in group["params"]]


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    ids, image = batch
    return model(ids, image.to(next(model.parameters()).dtype)).square().sum()


def one_process(model: Tiny, max_norm: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    todo = batches(2 * dist.get_world_size())
    for batch in todo:
        (loss_of(model, batch) / len(todo)).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
    return norm, [p.grad for p in trained]


def check(keys: dict[str, Any], kwargs: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    for factor in (0.1, 10.0):  # of the norm: clipped, and left alone
        reference = tiny(**kwargs).to(dtype)
        max_norm = factor * float(one_process(tiny(**kwargs).to(dtype), float("inf"))[0])
        norm, clipped = one_process(reference, max_norm)
        model = tiny(**kwargs).to(dtype)
        plan = shard(model, **keys)
        optimizer = Keeping([p for p in model.parameters() if p.requires_grad], lr=0.0)
        replicated = [p for _, p in plan.ignored]
        engine = FSDP2Engine(model, optimizer, group=dist.group.WORLD, clip_grad=max_norm, replicated=replicated)
        mine = iter(batches(2 * dist.get_world_size())[dist.get_rank() :: dist.get_world_size()])
        engine.forward_backward(lambda it, m: (loss_of(m, next(it)), lambda loss: loss), mine, 2)
        found = engine.optimizer_step().grad_norm
        assert not isinstance(found, DTensor) and found.shape == ()
        torch.testing.assert_close(found.to(norm.dtype), norm, rtol=tolerance, atol=0)
        assert len(optimizer.given) == len(clipped)
        for a, b in zip(optimizer.given, clipped, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(max_norm))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pain_15_norm_and_clipping_equal_one_process(ranks1: RankPool, ranks2: RankPool, layout: str) -> None:
    keys, kwargs = LAYOUTS[layout]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        ranks2.run(check, keys, kwargs, dtype, tolerance)
    if keys.get("sharding_size") != 2:
        ranks1.run(check, keys, kwargs, torch.float32, 1e-6)


def norm_on_two_meshes() -> float:
    """One gradient sharded over both ranks, one replicated, one plain: 1 + 4 + 2 squares."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (1, 4, 2)]
    parameters[0].grad = torch.ones(1)
    model = torch.nn.Linear(4, 1, bias=False)
    shard(model, sharding_size="auto")
    model.weight.grad = torch.distributed.tensor.distribute_tensor(torch.ones(1, 4), mesh)
    twice = torch.nn.Parameter(DTensor.from_local(torch.zeros(2), mesh, [Replicate()]))
    twice.grad = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
    return float(total_grad_norm([parameters[0], model.weight, twice])) ** 2


def test_a_replicated_gradient_counts_once(ranks2: RankPool) -> None:
    assert ranks2.run(norm_on_two_meshes) == pytest.approx([7.0, 7.0])
