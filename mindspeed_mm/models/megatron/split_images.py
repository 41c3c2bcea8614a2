"""Tensor-parallel ranks share the images of a micro-batch, in place of all computing all of them.

Each rank runs the vision tower on some images, and all gather the features. What a rank then has of the tower's
gradient is the part of its own images; the sum over the ranks is taken on the way back, before anybody sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call


def split_images(tower: nn.Module, blank: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Make ``tower(pixels, grid_thw=...)`` run on this rank's share of the images, and return the features of all.

    Args:
        tower: takes all patches of all images one below the other with ``grid_thw``, or (images, ...) without it;
            the tensors it returns are as long or shorter by a fixed factor.
        blank: arguments of ``get_image_features`` for the smallest image, run by a rank that gets none.
        group: the ranks; all of them have the same images.
    """
    call = _Call(tower)
    parameters = dict(tower.named_parameters())

    def forward(*args: Any, **kwargs: Any) -> Any:
        key = next((k for k in ("hidden_states", "pixel_values") if k in kwargs), None)
        pixels: Tensor = args[0] if key is None else kwargs.pop(key)
        grid: Tensor | None = kwargs.pop("grid_thw", args[1] if len(args) > 1 else None)
        sizes = [1] * len(pixels) if grid is None else grid.prod(-1).tolist()  # the host waits for the grid here
        shares = divide(sizes, dist.get_world_size(group))
        lengths = [sum(sizes[i] for i in share) for share in shares]
        rank = dist.get_rank(group)
        mine, start = shares[rank], sum(lengths[:rank])
        if mine:
            pixels = pixels[start : start + lengths[rank]]
            grid = None if grid is None else grid[mine.start : mine.stop]
        else:
            pixels = blank["pixel_values"].to(pixels)
            grid = None if grid is None else blank["image_grid_thw"].to(grid)
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        summed = dict(zip(trained, _SumOfGradients.apply(group, *trained.values()), strict=True)) if trained else {}
        if grid is not None:
            kwargs["grid_thw"] = grid
        if key is not None:
            kwargs[key] = pixels
        output = functional_call(
            call, {f"tower.{name}": p for name, p in summed.items()}, (pixels,) if key is None else (), kwargs
        )
        return _map(output, lambda part: _gather(part, lengths, len(pixels), group))

    tower.forward = forward


def divide(sizes: Sequence[int], ranks: int) -> list[range]:
    """Return which consecutive images each rank gets, so that they have about as many patches.

    Args:
        sizes: patches of each image.
        ranks: number of ranks.
    """
    total, shares, begin, done = sum(sizes), [], 0, 0
    for rank in range(ranks):
        end, goal = begin, total * (rank + 1) / ranks
        while end < len(sizes) and done + sizes[end] / 2 <= goal:
            done += sizes[end]
            end += 1
        shares.append(range(begin, len(sizes) if rank == ranks - 1 else end))
        begin = end
    return shares


class _Call(nn.Module):
    """The forward of a tower's class, whatever its instance has in that place."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.tower).forward(self.tower, *args, **kwargs)


def _map(output: Any, change: Any) -> Any:
    """Change every tensor of a model's output."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, (list, tuple)):
        return type(output)(_map(part, change) for part in output)
    if isinstance(output, MutableMapping):
        for key, part in list(output.items()):
            output[key] = _map(part, change)
    return output


def _gather(part: Tensor, lengths: Sequence[int], local: int, group: dist.ProcessGroup) -> Tensor:
    """Put the ranks' parts below one another; a rank without images has a part that counts for nothing."""
    rows = [length * len(part) // local for length in lengths]
    gathered: Tensor = _Gather.apply(part, rows, group)
    return gathered


class _Gather(torch.autograd.Function):
    """The gradient of what follows is the same on all ranks: each takes its own rows of it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: list[int], group: dist.ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.begin, ctx.rows, ctx.shape = sum(rows[:rank]), rows[rank], part.shape
        padded = part.new_zeros(max(rows), *part.shape[1:])
        padded[: rows[rank]] = part[: rows[rank]]
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        mine = gradient.new_zeros(ctx.shape)
        mine[: ctx.rows] = gradient[ctx.begin : ctx.begin + ctx.rows]
        return mine, None, None


class _SumOfGradients(torch.autograd.Function):
    """Parameters as they are; their gradients added up over ranks, all in one message."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.likes = [(p.shape, p.dtype, p.device) for p in parameters]
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        full = [
            torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient
            for gradient, (shape, dtype, device) in zip(gradients, ctx.likes, strict=True)
        ]
        flat = torch.cat([gradient.flatten().float() for gradient in full])
        dist.all_reduce(flat, group=ctx.group)
        parts = flat.split([gradient.numel() for gradient in full])
        return None, *(part.view_as(gradient).to(gradient.dtype) for part, gradient in zip(parts, full, strict=True))
