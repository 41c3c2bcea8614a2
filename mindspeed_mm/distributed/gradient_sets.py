"""Whether all ranks are about to have gradients of the same parameters, asked before FSDP2 adds them up.

It pairs the gradients of the ranks by their place among the ones that exist, not by their names: those of different
parameters are added up without a word if they are as large, and otherwise the collective library ends the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.distributed.fsdp import FSDPModule

from mindspeed_mm.distributed.state import same_on_all
from mindspeed_mm.errors import UserError


class GradientSets:
    """Compares the ranks at the start of the backward pass that reduces.

    Args:
        module: sharded.
        parameters: of it, by name, that FSDP2 reduces.
        group: of the hosts; None for a single rank.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup | None
    ) -> None:
        self.module = module
        self.parameters = dict(parameters)
        self.group = group
        self._reached = bytearray(len(self.parameters))
        self._arrived = b""
        self._nodes: list[Node | None] = [None]

    def watch(self, loss: Tensor, last: bool) -> None:
        """Call it before the backward pass of each micro-batch; that of the last one is a collective.

        Raises:
            UserError: from the backward pass, if the ranks differ; it names a parameter.
        """
        if self.group is None:
            return

        def look(_: Tensor) -> None:
            # Autograd has just found out which nodes it is going to run, and has run none of them.
            if None in self._nodes:
                self._nodes = self._find_nodes()
            for position, node in enumerate(self._nodes):
                self._reached[position] |= node is not None and torch._C._will_engine_execute_node(node)
            if last:
                self._compare()

        loss.register_hook(look)

    def arrived(self) -> bool:
        """Return whether any gradient exists after the backward passes.

        A node that was run may have yielded none; if it did so on some ranks only, the next comparison tells.
        """
        self._arrived = bytes(p.grad is not None for p in self.parameters.values())
        return any(self._arrived)

    def _compare(self) -> None:
        assert self.group is not None
        sets = bytes(self._reached) + self._arrived
        self._reached = bytearray(len(self.parameters))
        if same_on_all(sets, self.group, torch.device("cpu")):
            return
        everywhere: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everywhere, sets, group=self.group)
        position = next(i for i, flags in enumerate(zip(*everywhere, strict=True)) if len(set(flags)) > 1)
        with_it = [rank for rank, flags in enumerate(everywhere) if flags[position]]
        without = [rank for rank, flags in enumerate(everywhere) if not flags[position]]
        raise UserError(
            f"'{list(self.parameters)[position % len(self.parameters)]}' got a gradient on rank {with_it[0]} and none "
            f"on rank {without[0]}: FSDP2 then adds up gradients of different parameters. Let every rank use the same "
            "parameters in a step: add 0 times the output of what a batch does not need to the loss."
        )

    def _find_nodes(self) -> list[Node | None]:
        """Return where autograd leaves the gradient of each parameter; None for one that no forward has gathered.

        A sharded parameter has a stand-in in forward, the same one in every step.
        """
        states = [unit._get_fsdp_state() for unit in self.module.modules() if isinstance(unit, FSDPModule)]
        sharded = [param for state in states if (group := state._fsdp_param_group) for param in group.fsdp_params]
        stand_ins = {id(param.sharded_param): getattr(param, "_unsharded_param", None) for param in sharded}
        found = [stand_ins.get(id(parameter)) for parameter in self.parameters.values()]
        return [None if parameter is None else get_gradient_edge(parameter).node for parameter in found]
