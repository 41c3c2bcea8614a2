"""megatron-core's groups of ranks: how many ways a model is split, and who this rank is in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_mm import accelerator


@dataclass(frozen=True)
class ParallelSizes:
    """The number of ranks in each kind of group; what they leave over is data parallel.

    Attributes:
        tensor: share each layer.
        pipeline: stages of consecutive layers.
        virtual: chunks of each stage under the interleaved schedule; None is one.
        context: share each sequence.
        expert: share the experts of a layer.
        expert_tensor: share each expert; None is as ``tensor``.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None

    @property
    def splits_experts(self) -> int:
        """How many ranks share each expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor


_sizes: ParallelSizes | None = None


def create_groups(sizes: ParallelSizes, timeout: timedelta | None = None) -> None:
    """Create the groups; a collective of all ranks. Groups that exist with these sizes stay as they are."""
    global _sizes
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        if sizes == (_sizes or ParallelSizes()):
            return
        destroy_groups()
    minutes = {} if timeout is None else {"distributed_timeout_minutes": timeout.total_seconds() / 60}
    with _one_group_of_the_same_ranks() if accelerator.is_cpu() else nullcontext():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor,
            pipeline_model_parallel_size=sizes.pipeline,
            virtual_pipeline_model_parallel_size=sizes.virtual,
            context_parallel_size=sizes.context,
            expert_model_parallel_size=sizes.expert,
            expert_tensor_parallel_size=sizes.splits_experts,
            **minutes,
        )
    _sizes = sizes


@contextmanager
def _one_group_of_the_same_ranks() -> Iterator[None]:
    """Let megatron-core make one group where it makes several of the same ranks, a score of them on a single rank.

    A gloo group has a thread that wakes 100 times a second: a score of them took 3 % of a step on two cores. The
    groups of other libraries work side by side, on streams of their own: those stay as they are.
    """
    from megatron.core import parallel_state

    made: dict[Any, dist.ProcessGroup] = {}
    create = parallel_state.create_group

    def create_once(ranks: Sequence[int], *args: Any, backend: str | None = None, **kwargs: Any) -> dist.ProcessGroup:
        key = tuple(ranks), backend  # those it asks gloo for it destroys, and DTensor keeps the others in its caches
        if key not in made:
            made[key] = create(ranks, *args, backend=backend, **kwargs)
        return made[key]

    parallel_state.create_group = create_once
    try:
        yield
    finally:
        parallel_state.create_group = create


def destroy_groups() -> None:
    """Forget the groups, so that others can be created."""
    global _sizes
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # 0.12 keeps these, and the next layout fails on the ranks that are not in them.
    for name in ("_POSITION_EMBEDDING_GLOBAL_RANKS", "_EMBEDDING_GLOBAL_RANKS"):
        setattr(parallel_state, name, None)
    _sizes = None


def sizes() -> ParallelSizes:
    """Return the sizes that the groups were created with."""
    return _sizes or ParallelSizes()


def replica_group() -> dist.ProcessGroup:
    """Return the ranks that hold the same parts of the model and see different samples, or parts of sequences."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def loader_group() -> dist.ProcessGroup:
    """Return the ranks that read different samples; all others read the same as one of these."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=False)


def is_first_stage() -> bool:
    """Return whether this rank holds the first layers."""
    from megatron.core import parallel_state

    return bool(parallel_state.get_pipeline_model_parallel_rank() == 0)


def is_last_stage() -> bool:
    """Return whether this rank holds the last layers, and so the loss."""
    from megatron.core import parallel_state

    return bool(parallel_state.get_pipeline_model_parallel_rank() == sizes().pipeline - 1)


def last_stage_rank() -> int:
    """Return the global rank of this pipeline's last stage."""
    from megatron.core import parallel_state

    return int(parallel_state.get_pipeline_model_parallel_last_rank())


def seed_stages(seed: int) -> None:
    """Seed all random generators, megatron-core's tracker included.

    Ranks that share a layer draw the same numbers outside of what they split and others inside; stages draw their own.
    Data-parallel ranks draw alike: give them different seeds for different dropout.
    """
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * int(parallel_state.get_pipeline_model_parallel_rank())
    accelerator.seed_all(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def tracker_state() -> dict[str, torch.Tensor]:
    """Return the random states that megatron-core switches to inside of what ranks split."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}


def set_tracker_state(states: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`tracker_state` returned."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    get_cuda_rng_tracker().set_states(dict(states))


def set_chunk(index: int | None) -> None:
    """Say which chunk of its stage this rank is about to build; megatron-core before 0.13 asks the global state."""
    from megatron.core import parallel_state

    parallel_state.set_virtual_pipeline_model_parallel_rank(index)


def chunk_is_first(index: int | None) -> bool:
    """Return whether the ``index``-th chunk of this stage has the first layers of the model."""
    return is_first_stage() and not index


def chunk_is_last(index: int | None) -> bool:
    """Return whether the ``index``-th chunk of this stage has the last layers of the model."""
    return is_last_stage() and (index is None or index == (sizes().virtual or 1) - 1)


def place_in_pipeline(number: int) -> int:
    """Return how many chunks of the pipeline come before the ``number``-th one of this stage."""
    from megatron.core import parallel_state

    return number * sizes().pipeline + int(parallel_state.get_pipeline_model_parallel_rank())


def chunk_indices() -> list[int | None]:
    """Return the index of every chunk of this stage, as megatron-core wants to have it: None where there is one."""
    return [None] if sizes().virtual is None else list(range(sizes().virtual or 1))


def broadcast_from_last_stage(tensor: torch.Tensor) -> None:
    """Give ``tensor`` the value that it has on the last stage of this pipeline, in place."""
    from megatron.core import parallel_state

    if sizes().pipeline > 1:
        dist.broadcast(tensor, src=last_stage_rank(), group=parallel_state.get_pipeline_model_parallel_group())
