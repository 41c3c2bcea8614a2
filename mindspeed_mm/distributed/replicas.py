"""Copies of a parameter on several ranks start with the same values."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def start_alike(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Give every copy of a parameter the values of the first rank that holds one. A collective.

    Ranks that draw random weights from different seeds build different models. Shards of those make one model, but
    copies would stay apart for the whole run, because only gradients are reduced. Parameters without values yet (meta)
    are left alone; they get the same ones everywhere.

    Args:
        module: sharded by ``fully_shard``; what is no DTensor is whole on every rank.
        group: the data-parallel ranks; default all.
    """
    for param in module.parameters():
        if param.is_meta:
            continue
        if not isinstance(param, DTensor):
            dist.broadcast(param.data, group=group, group_src=0)
            continue
        local, mesh = param.to_local(), param.device_mesh
        for dimension, placement in enumerate(param.placements):
            if placement.is_replicate() and mesh.size(dimension) > 1 and local.numel():
                dist.broadcast(local, group=mesh.get_group(dimension), group_src=0)
