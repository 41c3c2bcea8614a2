"""The values that the optimizer updates on the Megatron road, and their gradients.

megatron-core's DDP reduces gradients into buffers. This module finds in these buffers what belongs to this rank: whole
parameters, or under the distributed optimizer the range of each that lies in this rank's part of a buffer. An
optimizer of torch works on them as on any parameter: in place where the model is in fp32, else on an fp32 copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.grad_norm import sum_of_squares


@dataclass(frozen=True)
class MainParameter:
    """What the optimizer sees of a model parameter.

    Attributes:
        name: of the model parameter, with the numbers that layers have in the whole model.
        chunk: index of the pipeline chunk that holds it.
        parameter: of the model.
        value: what is updated: a leaf tensor of the parameter's shape, or flat if it is a range.
        gradient: of ``value``, reduced; memory of DDP's buffer.
        start: where the range begins in the flattened parameter.
        whole: whether ``value`` is all of the parameter.
        counts: whether this rank is the one of its tensor- and pipeline-parallel group that counts its gradient.
        expert: whether it is split over the expert-parallel groups instead of the dense ones.
    """

    name: str
    chunk: int
    parameter: nn.Parameter
    value: nn.Parameter
    gradient: Tensor
    start: int
    whole: bool
    counts: bool
    expert: bool

    @property
    def target(self) -> Tensor:
        """The part of the model parameter that ``value`` is of, in its shape."""
        if self.whole:
            return self.parameter.detach()
        return self.parameter.detach().view(-1)[self.start : self.start + self.value.numel()]

    @property
    def is_copy(self) -> bool:
        """Whether ``value`` has memory of its own."""
        return self.value.data_ptr() != self.target.data_ptr()


class MainParameters:
    """All main parameters of this rank.

    Args:
        chunks: the pipeline chunks of this rank, each in megatron-core's DDP.
        sharded: whether the optimizer is distributed over data-parallel ranks.
    """

    def __init__(self, chunks: Sequence[nn.Module], *, sharded: bool) -> None:
        self.chunks: list[Any] = list(chunks)
        self.sharded = sharded
        self.all: list[MainParameter] = []
        for index, chunk in enumerate(self.chunks):
            names = {id(parameter): name for name, parameter in named_globally(chunk)}
            found = _ranges(chunk) if sharded else _whole_parameters(chunk)
            for parameter, data, gradient, start in found:
                whole = data.shape == parameter.shape
                self.all.append(
                    MainParameter(
                        name=names[id(parameter)],
                        chunk=index,
                        parameter=parameter,
                        value=nn.Parameter(data if data.dtype == torch.float32 else data.float()),
                        gradient=gradient,
                        start=start,
                        whole=whole,
                        counts=_counts(parameter),
                        expert=is_expert(parameter),
                    )
                )

    @property
    def values(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [main.value for main in self.all]

    def take_gradients(self) -> None:
        """Let every value have its gradient, which must be reduced by now."""
        for main in self.all:
            main.value.grad = main.gradient.to(main.value.dtype)

    def gradient_norm(self) -> Tensor:
        """Return the L2 norm of the whole model's gradient, a scalar that is the same on all ranks.

        Every element is counted once, wherever it lies and however often; the sum of squares is in float32. Does not
        synchronise with the host.
        """
        from megatron.core import parallel_state

        dense, expert = (
            sum_of_squares([main.value.grad for main in self.all if main.counts and main.expert == kind])
            for kind in (False, True)
        )
        if self.sharded:  # nothing lies twice
            total = dense + expert
            dist.all_reduce(total)
            return total.sqrt()
        dist.all_reduce(dense, group=parallel_state.get_model_parallel_group())
        dist.all_reduce(expert, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
        return (dense + expert).sqrt()

    @torch.no_grad()
    def publish(self, *, wait: bool = True) -> None:
        """Write the values into the model, on all ranks.

        Args:
            wait: gather the ranges of other ranks now; otherwise the modules' next forward does (DDP's
                ``overlap_param_gather``).
        """
        for main in self.all:
            if main.is_copy:
                main.target.copy_(main.value)
        if self.sharded and wait:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    @torch.no_grad()
    def adopt(self) -> None:
        """Take the model's values, after somebody else has written them."""
        for main in self.all:
            if main.is_copy:
                main.value.copy_(main.target)


def is_expert(parameter: nn.Parameter) -> bool:
    """Return whether a parameter belongs to an expert, by megatron-core's mark."""
    return not getattr(parameter, "allreduce", True)


def named_globally(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a chunk with the names they have in a model that is not split into stages."""
    inner = unwrap(chunk)
    renamed = {
        path: f"{path.rpartition('.')[0]}.{module.layer_number - 1}"
        for path, module in inner.named_modules()
        if isinstance(getattr(module, "layer_number", None), int) and path.rpartition(".")[2].isdigit()
    }
    for name, parameter in inner.named_parameters():
        path = next((path for path in renamed if name.startswith(f"{path}.")), None)
        yield (name if path is None else renamed[path] + name[len(path) :]), parameter


def unwrap(chunk: nn.Module) -> nn.Module:
    """Return the model inside megatron-core's wrappers."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def mark_split_parameters(chunk: nn.Module) -> None:
    """Mark the parameters that tensor parallelism splits, where megatron-core has not.

    It marks them while it initialises them, and not under ``perform_initialization=False``. Without the mark they count
    as copies, and the gradient norm leaves out what lies on other ranks than the first.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            split = [module.weight]
            if isinstance(module, ColumnParallelLinear):
                split.append(module.bias)
            for parameter in split:
                if parameter is not None:
                    parameter.tensor_model_parallel = True


def mark_experts(chunk: nn.Module) -> None:
    """Mark the parameters of experts that other ranks share than those of the dense layers, unless they are marked.

    It marks them only where there are several expert-parallel ranks (``allreduce`` in `ColumnParallelLinear`). Without
    the mark gradients are added up over the ranks that hold the same part of the dense layers: over those that hold
    other parts of an expert, or over too few.
    """
    if parallel.sizes().splits_experts == parallel.sizes().tensor:
        return
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False
    for name, module in chunk.named_modules():
        if ".experts." in name and hasattr(module, "explicit_expert_comm"):
            module.explicit_expert_comm = True  # or 0.12 scatters the output of a whole expert over the dense ranks


def _counts(parameter: nn.Parameter) -> bool:
    from megatron.core import parallel_state

    if getattr(parameter, "shared", False):  # the last stage's copy of a tied embedding
        return False
    if getattr(parameter, "tensor_model_parallel", False):
        return True
    rank: int = (
        parallel_state.get_expert_tensor_parallel_rank()
        if is_expert(parameter)
        else parallel_state.get_tensor_model_parallel_rank()
    )
    return rank == 0


def _whole_parameters(chunk: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor, Tensor, int]]:
    for parameter in chunk.parameters():
        if parameter.requires_grad:
            yield parameter, parameter.detach(), parameter.main_grad, 0


def _ranges(chunk: Any) -> Iterator[tuple[nn.Parameter, Tensor, Tensor, int]]:
    """Yield parameter, this rank's part of its data and of its gradient, and where that begins in the parameter."""
    for buffer in chunk.buffers + chunk.expert_parallel_buffers:
        rank, size = dist.get_rank(buffer.data_parallel_group), dist.get_world_size(buffer.data_parallel_group)
        for parameter, (begin, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // size
            first = max(begin - bucket.offset, rank * share)
            last = min(end - bucket.offset, (rank + 1) * share)
            if first < last:
                yield (
                    parameter,
                    bucket.param_data.detach()[first:last],
                    bucket.grad_data[first:last],
                    first + bucket.offset - begin,
                )
