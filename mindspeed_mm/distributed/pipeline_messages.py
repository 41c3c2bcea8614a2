"""The order of messages between two pipeline stages that are each other's next and previous one."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from mindspeed_mm.accelerator.stand_in import StandIn


def keep_messages_apart() -> None:
    """Let the interleaved schedule run on two stages with micro-batches of different lengths.

    megatron-core sends to the previous stage, then to the next, and receives in the same order. Of two stages that are
    both to each other, each then takes what was meant for its other side. Lengths are always sent like that.
    (pipeline_parallel/p2p_communication.py:206..229, :32..90 in 0.16.1; _communicate_shapes in 0.12.1.)
    """
    from megatron.core.pipeline_parallel import p2p_communication

    theirs: Any = p2p_communication.torch
    if not isinstance(getattr(theirs, "distributed", None), StandIn):
        ours = StandIn(theirs.distributed, batch_isend_irecv=_next_first)
        vars(p2p_communication)["torch"] = StandIn(theirs, distributed=ours)


def _next_first(operations: list[Any]) -> list[Any]:
    """Send to the next stage first: it receives from its previous one first."""
    sends = [one for one in operations if one.op is dist.isend]
    receives = [one for one in operations if one.op is not dist.isend]
    return list(dist.batch_isend_irecv(sends[::-1] + receives))
