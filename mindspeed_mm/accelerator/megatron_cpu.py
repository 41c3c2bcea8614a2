"""What megatron-core takes from CUDA, answered by the CPU.

megatron-core asks CUDA for the current device, for streams and for random states, and creates tensors on ``"cuda"``.
Here the modules that do so are given a stand-in for the name ``torch``: it is torch, but for the few functions that a
CPU has to answer for, and the collectives that NCCL has and gloo has not. Other names are replaced where a function as
a whole is about CUDA. Outside megatron-core's modules one thing changes: ``Tensor.cuda()`` returns the tensor, instead
of failing.

Everything replaced is listed in `STAND_INS` and `NAMES` with the line of megatron-core that needs it (0.16.1; 0.12.1
where that is the only one). What the list does not hold does not run on a CPU: CUDA graphs, TransformerEngine, the
fine-grained offloading of activations.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_mm.accelerator.stand_in import StandIn

_CPU = torch.device("cpu")

STAND_INS: dict[str, frozenset[str]] = {
    # :91, :141: output = torch.empty(..., device=torch.cuda.current_device())
    # :150, :193: tokens of experts that are split over ranks, as many from each rank as its router chose. NCCL takes
    # shares of different sizes; gloo gathers equal ones only, and reduce-scatters none in torch 2.7
    "tensor_parallel.mappings": frozenset({"current_device", "all_gather", "reduce_scatter"}),
    # :552: grad_input of the linear layers under sequence parallelism; :261, :873: weights when not initialised on CPU
    "tensor_parallel.layers": frozenset({"current_device"}),
    # :235, :237, :238, :422: the tracker of the random states
    "tensor_parallel.random": frozenset({"get_rng_state", "manual_seed"}),
    # :631: GlobalMemoryBuffer, for gathers under sequence parallelism
    "utils": frozenset({"current_device"}),
    # :800, :806: the buffers of parameters and gradients
    "distributed.param_and_grad_buffer": frozenset({"current_device"}),
    # :596, :983, :2138: total_num_tokens
    "pipeline_parallel.schedules": frozenset({"zeros"}),
    # :190, :313: shapes and tensors of the neighbours; :242, :398: synchronize after batched sends
    "pipeline_parallel.p2p_communication": frozenset({"current_device", "synchronize"}),
    # :61: the slices of context parallelism, torch.tensor(..., pin_memory=True)
    "models.common.embeddings.rope_utils": frozenset({"tensor"}),
    # :162: the frequencies, when they were made on the CPU
    "models.common.embeddings.rotary_pos_embedding": frozenset({"current_device"}),
    # :90: weights of the router; :169: the biases of its experts
    "transformer.moe.router": frozenset({"current_device"}),
    # :445, :871: the copies of the splits, on a stream of their own
    "transformer.moe.token_dispatcher": frozenset({"Stream", "current_stream"}),
}
"""Modules of megatron-core and what of torch, torch.cuda or torch.distributed they use of it."""


class _Stream:
    """The CPU's only stream: everything on it is over when it returns."""

    def wait_stream(self, stream: _Stream) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def record_event(self) -> _Stream:
        """Return what can be waited for."""
        return self


_STREAM = _Stream()
CUDA: dict[str, Any] = {
    "current_device": lambda: _CPU,
    "synchronize": lambda *_: None,
    "Stream": lambda *_, **__: _STREAM,
    "current_stream": lambda *_: _STREAM,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "manual_seed": torch.manual_seed,
}


def _all_gather(shares: list[torch.Tensor], mine: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fill ``shares``, contiguous tensors of any lengths, each from its rank of the group."""
    shares[dist.get_rank(group)].copy_(mine)
    for rank, share in enumerate(shares):
        dist.broadcast(share, group=group, group_src=rank)


def _reduce_scatter(mine: torch.Tensor, shares: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Fill ``mine`` with the sum over the group of this rank's one of ``shares``, which may differ in length."""
    everything = torch.cat(shares)
    dist.all_reduce(everything, group=group)
    mine.copy_(everything.split([len(share) for share in shares])[dist.get_rank(group)])


COLLECTIVES: dict[str, Any] = {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter}


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let ``factory`` create on the CPU what is to lie on CUDA."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _get_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _stay(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


TENSOR_CUDA = "Tensor.cuda"
"""language_module.py:244: tied weights of the last stage; rope_utils.py:62; 0.12.1 schedules.py:765, :1828."""

NAMES: dict[str, dict[str, Any]] = {
    # :120, :125: a fork of the tracked random state (dropout); both are about CUDA generators alone
    "tensor_parallel.random": {"_get_cuda_rng_state": _get_state, "_set_cuda_rng_state": _set_state},
    # :876..892: makes the splits lists of numbers, but only of tensors that lie on CUDA
    "transformer.moe.token_dispatcher": {"maybe_move_tensor_to_cpu": _to_host},
    # :1192, :1225: never defined without TransformerEngine, and read by every router; 0.12.1 has no such name
    "transformer.moe.moe_utils": {"te_general_gemm": None},
}
"""Names of megatron-core's modules that are replaced as a whole."""


def answer_for_cuda(leave_out: str | None = None) -> None:
    """Make megatron-core run on a CPU; doing it twice changes nothing.

    Args:
        leave_out: a module of the lists, or `TENSOR_CUDA`, that stays as it is, for the tests of the lists.
    """
    for name in (STAND_INS.keys() | NAMES.keys()) - {leave_out}:
        module = importlib.import_module(f"megatron.core.{name}")
        if names := STAND_INS.get(name):
            own = {key: _on_cpu(getattr(torch, key)) for key in names - CUDA.keys() - COLLECTIVES.keys()}
            cuda = StandIn(torch.cuda, **{key: CUDA[key] for key in names & CUDA.keys()})
            distributed = StandIn(dist, **{key: COLLECTIVES[key] for key in names & COLLECTIVES.keys()})
            vars(module)["torch"] = StandIn(torch, **own, cuda=cuda, distributed=distributed)
        vars(module).update(NAMES.get(name, {}))
    if leave_out != TENSOR_CUDA:
        torch.Tensor.cuda = _stay
    # Every fork of the CPU's only generator is reported as a mistake.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
