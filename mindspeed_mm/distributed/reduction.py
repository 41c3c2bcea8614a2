"""How FSDP2 combines the gradients of the ranks."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group


def sum_gradients(module: nn.Module) -> None:
    """Let every wrapped unit of ``module`` add the gradients of the ranks up, where FSDP2 by itself averages.

    A plain sum is what every collective library has. gloo and HCCL have no PREMUL_SUM, and gloo has no AVG: its
    reduce-scatter may then sum without an error.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        _sum_in_torch_2_7()
        return
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)


@functools.cache
def _sum_in_torch_2_7() -> None:
    """Do the same to torch 2.7, which has no switch for it, for all FSDP2 modules of the process."""
    # It asks for AVG unless it has factors to divide by itself, before and after a SUM.
    _fsdp_collectives._get_gradient_divide_factors = lambda *_: (1.0, 1.0)
    reduce = _fsdp_param_group.foreach_reduce

    @functools.wraps(reduce)
    def foreach_reduce(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        *others, all_reduce_input, all_reduce_event, partial_output = reduce(*args, **kwargs)
        # HSDP keeps this buffer alive until the event, and insists on one. A CPU has no events and needs neither.
        if all_reduce_event is None:
            all_reduce_input = None
        return (*others, all_reduce_input, all_reduce_event, partial_output)

    _fsdp_param_group.foreach_reduce = foreach_reduce
