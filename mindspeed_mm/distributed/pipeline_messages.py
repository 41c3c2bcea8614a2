"""The order of messages between pipeline stages that hold several chunks each."""

from __future__ import annotations

from functools import partial
from typing import Any


def exchange_in_turn() -> None:
    """Let the interleaved schedule exchange what goes forward before it exchanges what goes backward.

    megatron-core exchanges both at once: the lengths of activations and gradients, then the tensors. Two things go
    wrong there, and neither does if each is exchanged by itself, in the order of ``overlap_p2p_comm``:

    * With as many micro-batches as stages, the first half of the stages is warming up to the end of the step: it sends
      its last activation before it receives its first gradient, to a stage that does not take that activation until
      the length of the gradient has been received. Both wait forever.
    * Each of two stages is the other's next and previous one, and takes what was meant for its other side.

    (pipeline_parallel/schedules.py, get_pp_rank_microbatches; p2p_communication.py, _communicate.)
    """
    from megatron.core.pipeline_parallel import p2p_communication

    theirs: Any = p2p_communication
    if hasattr(theirs, "P2PCommunicator"):
        theirs.P2PCommunicator.send_forward_backward_recv_forward_backward = _in_turn
    else:  # 0.12.1
        theirs.send_forward_backward_recv_forward_backward = partial(_in_turn, theirs)


def _in_turn(
    communicator: Any, output_tensor: Any, input_tensor_grad: Any, *, recv_prev: bool, recv_next: bool, **how: Any
) -> tuple[Any, Any]:
    received = communicator.send_forward_recv_forward(output_tensor, recv_prev=recv_prev, **how)
    gradient = communicator.send_backward_recv_backward(input_tensor_grad, recv_next=recv_next, **how)
    return received, gradient
