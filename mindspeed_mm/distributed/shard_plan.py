"""What sharding did to a model: the table printed at start, and the facts the engine needs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mindspeed_mm.distributed.patterns import summarise


@dataclass(frozen=True)
class Row:
    """Wrapped modules whose paths differ only in numbers."""

    pattern: str
    modules: int
    parameters: int
    """Elements of the full tensors, over all these modules, without those of wrapped modules inside them."""


@dataclass
class ShardPlan:
    """How a model is sharded.

    Attributes:
        rows: the wrapped modules below the root.
        root_parameters: elements left to the root unit.
        ignored_names: parameters outside FSDP. Their gradients are not reduced by it: the engine all-reduces them.
        shard_device: where sharded parameters, gradients and optimizer states live between steps.
        mesh: the device mesh in words.
        notes: one line for each decision a user should know about.
    """

    module: nn.Module
    rows: list[Row]
    root_parameters: int
    ignored_names: list[str]
    shard_device: torch.device
    mesh: str
    notes: list[str] = field(default_factory=list)

    @property
    def ignored(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters outside FSDP, in ``named_parameters()`` order, which is the same on every rank."""
        names = set(self.ignored_names)
        return [(name, param) for name, param in self.module.named_parameters() if name in names]

    def lines(self) -> list[str]:
        """The plan as text, one entry per line."""
        table = [(row.pattern, str(row.modules), row.parameters) for row in self.rows]
        table.append(("left to the root", "", self.root_parameters))
        if self.ignored_names:
            table.append(("not sharded", "", sum(param.numel() for _, param in self.ignored)))
        width = max(len(name) for name, _, _ in table)
        return [
            f"FSDP2 over {self.mesh}",
            f"  {'wrapped':<{width}} {'modules':>8} {'parameters':>18}",
            *(f"  {name:<{width}} {modules:>8} {parameters:>18,}" for name, modules, parameters in table),
            *(f"  {note}" for note in self.notes),
        ]


def describe(module: nn.Module, *, shard_device: torch.device, mesh: str, notes: list[str]) -> ShardPlan:
    """Read the plan off a module that has just been sharded, whoever sharded it."""
    units = [path for path, submodule in module.named_modules() if isinstance(submodule, FSDPModule)]
    roots = [path for path in units if not any(_inside(path, other) for other in units)]
    sizes = dict.fromkeys(units, 0)
    ignored = []
    for name, param in module.named_parameters():
        unit = max((path for path in units if _inside(name, path)), key=len, default=None)
        if unit is None or not isinstance(param, DTensor):
            ignored.append(name)
        else:
            sizes[unit] += param.numel()
    inner = [path for path in units if path not in roots]
    # Written as the yaml writes them: from the model that was sharded, which may be a part of this one.
    prefix = f"{roots[0]}." if len(roots) == 1 and roots[0] else ""
    rows = [
        Row(pattern, len(paths), sum(sizes[prefix + path] for path in paths))
        for pattern, paths in summarise(path.removeprefix(prefix) for path in inner).items()
    ]
    return ShardPlan(
        module=module,
        rows=rows,
        root_parameters=sum(sizes[path] for path in roots),
        ignored_names=ignored,
        shard_device=shard_device,
        mesh=mesh,
        notes=notes,
    )


def _inside(path: str, unit: str) -> bool:
    return path != unit and (unit == "" or path.startswith(f"{unit}."))
