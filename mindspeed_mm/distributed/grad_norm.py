"""Norm and scaling of gradients that live on several device meshes, or on none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_mm import accelerator


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return this rank's part of every gradient that exists, as plain tensors that share its memory."""
    return [_local(p.grad) for p in parameters if p.grad is not None]


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float | Tensor) -> None:
    """Multiply every gradient in place. A tensor factor is applied without a host synchronisation.

    16-bit gradients are multiplied in the factor's precision: a factor rounded to 8 bits would be wrong by up to
    0.4 % for all of them alike. Only gradients that live on the host under ``offload_to_cpu`` have to wait for a
    factor from the device.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient in local_gradients(parameters):
        groups[gradient.device, gradient.dtype].append(gradient)
    for (device, dtype), same_kind in groups.items():
        if isinstance(factor, float):
            torch._foreach_mul_(same_kind, factor)
        elif dtype.itemsize < 4:
            near = factor.to(device)
            for gradient in same_kind:
                gradient.copy_(gradient.to(near.dtype) * near)
        else:
            torch._foreach_mul_(same_kind, factor.to(device, dtype))


def total_grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the L2 norm of all gradients together, the same scalar on every rank.

    A sharded gradient contributes the squares of its shards, summed over the mesh dimensions it is sharded on
    and over no others, so that a replicated dimension (HSDP) or a replicated parameter is counted once.
    Accumulates in float32, in float64 for float64 gradients. Does not synchronise with the host.

    All ranks must pass their parameters in the same order: there is one collective for each kind of placement.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            is_sharded = isinstance(gradient, DTensor)
            groups[(gradient.device_mesh, gradient.placements) if is_sharded else None].append(gradient)
    total: Tensor | None = None
    for placement, gradients in groups.items():
        squares = sum_of_squares([_local(g) for g in gradients])
        if placement is not None:
            mesh, placements = placement
            for dimension, kind in enumerate(placements):
                if kind.is_shard():
                    dist.all_reduce(squares, group=mesh.get_group(dimension))
        total = squares if total is None else total + squares
    return torch.zeros(()) if total is None else total.sqrt()


def parameter_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the L2 norm of each gradient, (N,), the same on every rank; 0 where there is none.

    Counts and accumulates as :func:`total_grad_norm` does, with as many collectives.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, parameter in enumerate(parameters):
        gradient = parameter.grad
        if gradient is not None:
            is_sharded = isinstance(gradient, DTensor)
            groups[(gradient.device_mesh, gradient.placements) if is_sharded else None].append(number)
    norms: dict[int, Tensor] = {}
    for placement, numbers in groups.items():
        local = [_local(parameters[number].grad) for number in numbers]
        dtype = torch.float64 if local[0].dtype == torch.float64 else torch.float32
        found = iter(torch._foreach_norm([t for t in local if t.numel()], 2, dtype=dtype) if local else [])
        nothing = torch.zeros((), dtype=dtype, device=local[0].device)
        squares = torch.stack([next(found) if t.numel() else nothing for t in local]).square()
        if placement is not None:
            mesh, placements = placement
            for dimension, kind in enumerate(placements):
                if kind.is_shard():
                    dist.all_reduce(squares, group=mesh.get_group(dimension))
        norms.update(zip(numbers, squares.sqrt().to(torch.float32).unbind(), strict=True))
    some = next(iter(norms.values()), torch.zeros(()))
    return torch.stack([norms.get(number, torch.zeros_like(some)) for number in range(len(parameters))])


def clip_by_norm(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``, as ``torch.nn.utils.clip_grad_norm_`` does."""
    scale_gradients(parameters, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares as a scalar; a rank that has nothing returns zero and takes part."""
    double = bool(tensors) and tensors[0].dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    filled = [t for t in tensors if t.numel()]
    if not filled:
        return torch.zeros((), dtype=dtype, device=tensors[0].device if tensors else accelerator.device())
    return torch.stack(torch._foreach_norm(filled, 2, dtype=dtype)).square().sum()
