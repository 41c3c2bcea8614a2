"""A small model with everything that makes a checkpoint hard, and the functions ranks run on it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mindspeed_mm.checkpoint import store
from mindspeed_mm.distributed.reduction import sum_gradients
from mindspeed_mm.optimizer.selection import EMAAdamW


class Small(nn.Module):
    """Tied, frozen, unused and ignored parameters, dimensions that 2 does not divide, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.body = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.body:
            x = layer(x).tanh()
        self.seen += 1
        return self.head(self.frozen(x)) * self.scale


def build(seed: int, optimizer: str = "adamw", replicas: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model, sharded when there are ranks, and an optimizer with two parameter groups.

    With ``replicas`` it is sharded over so many groups of ranks, each of which has all of it (HSDP).
    """
    torch.manual_seed(seed)
    model = Small()
    if dist.is_initialized():
        world = dist.get_world_size()
        shape, names = ((replicas, world // replicas), ("replicate", "shard")) if replicas else ((world,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        ignored = {model.scale}
        for layer in model.body:
            fully_shard(layer, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        sum_gradients(model)  # older versions of torch ask gloo for an average, which it does not have
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if optimizer == "sgd":
        return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    if optimizer == "ema":
        return model, EMAAdamW(groups, lr=0.01, ema_decay=0.9)
    return model, torch.optim.AdamW(groups, lr=0.01, fused=optimizer == "fused")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Run the given steps on the same data on all ranks and return their losses."""
    losses = []
    for step in steps:
        tokens = torch.arange(6).view(2, 3).add(step).remainder(7)
        loss = model(tokens).square().mean()
        (loss / (dist.get_world_size() if dist.is_initialized() else 1)).backward()
        if dist.is_initialized():
            model.scale.grad.mul_(dist.get_world_size())  # not sharded, so not summed
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return every tensor of a run, gathered, and the optimizer's hyperparameters."""

    def gather(value: Any) -> Any:
        value = value.full_tensor() if isinstance(value, DTensor) else value
        return value.clone() if isinstance(value, torch.Tensor) else value

    state = {name: gather(tensor.detach()) for name, tensor in model.state_dict().items()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            state[f"{name}.{key}"] = gather(value)
    state["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return state


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Check that two `full_state` results are bitwise equal."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
        assert same, key


def rank_state() -> dict[str, Any]:
    """Return random state of every kind and a value that differs between ranks."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "position": np.int64(10 + (dist.get_rank() if dist.is_initialized() else 0)),
    }


def save_after(folder: Path, steps: int, optimizer: str = "adamw") -> dict[str, Any]:
    """Train, save, and return what was saved."""
    model, optim = build(0, optimizer)
    train(model, optim, range(steps))
    store.save(folder, steps, model=model, optimizer=optim, extra={"samples": 4 * steps}, rank_state=rank_state())
    return full_state(model, optim)


def load_into_fresh(folder: Path, optimizer: str = "adamw") -> tuple[dict[str, Any], store.LoadedCheckpoint]:
    """Load into a model and an optimizer that have seen nothing of the saved run."""
    model, optim = build(1, optimizer)
    loaded = store.load(folder, model=model, optimizer=optim)
    assert model.head.weight is model.embed.weight
    return full_state(model, optim), loaded


def resume(folder: Path, optimizer: str, steps: int, more: int) -> None:
    """Check that save, load and go on equals going on, bit for bit, and that saving again gives the same bytes."""
    saved = save_after(folder / "a", steps, optimizer)
    straight, optim = build(0, optimizer)
    train(straight, optim, range(steps + more))

    resumed, resumed_optim = build(1, optimizer)
    loaded = store.load(folder / "a", model=resumed, optimizer=resumed_optim)
    assert (loaded.iteration, loaded.extra, loaded.warnings) == (steps, {"samples": 4 * steps}, [])
    assert loaded.rank_state is not None
    assert loaded.rank_state["position"] == 10 + (dist.get_rank() if dist.is_initialized() else 0)
    assert_same(saved, full_state(resumed, resumed_optim))
    again = store.save(
        folder / "b",
        steps,
        model=resumed,
        optimizer=resumed_optim,
        extra=loaded.extra,
        rank_state=loaded.rank_state,
    )
    for file in loaded.path.iterdir():
        if file.name not in (".metadata", "manifest.json"):
            assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    train(resumed, resumed_optim, range(steps, steps + more))
    assert_same(full_state(straight, optim), full_state(resumed, resumed_optim))


def failing_save(folder: Path, failing_rank: int) -> str:
    """Save with a write error on one rank and return the error every rank sees."""
    model, optim = build(0)
    bad = {"handle": object()} if dist.get_rank() == failing_rank else {}
    try:
        store.save(folder, 2, model=model, optimizer=optim, extra={}, rank_state=bad)
    except RuntimeError as error:
        return str(error)
    return ""
