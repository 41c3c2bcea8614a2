"""The pipeline chunks of a rank: building them in order, and reducing their gradients with megatron-core's DDP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.main_parameters import mark_experts, mark_split_parameters


def build_chunks(build: Callable[[bool, bool, int | None], nn.Module]) -> list[nn.Module]:
    """Build the chunks of this stage, in order.

    Args:
        build: ``build(pre_process, post_process, vp_stage)`` returns the chunk with the first layers of the model, the
            last, both or neither; ``vp_stage`` is its index in the stage, None where the stage is not interleaved.
    """
    from megatron.core.enums import ModelType

    chunks = []
    for index in parallel.chunk_indices():
        if index is not None:
            parallel.set_chunk(index)
        chunk: Any = build(parallel.chunk_is_first(index), parallel.chunk_is_last(index), index)
        chunk.model_type = ModelType.encoder_or_decoder  # read by the schedules of megatron-core 0.12
        mark_split_parameters(chunk)
        mark_experts(chunk)
        chunks.append(chunk)
    if parallel.sizes().virtual is not None:
        parallel.set_chunk(0)
    return chunks


def reduce_gradients(
    chunks: Sequence[nn.Module],
    *,
    sharded: bool,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
) -> list[nn.Module]:
    """Wrap the chunks so that their gradients are reduced over the data- and context-parallel ranks, in fp32.

    Args:
        chunks: on their device.
        sharded: prepare for an optimizer that is distributed over these ranks: every rank gets its part of the sum.
        overlap_grad_reduce: reduce during the backward pass of the last micro-batch.
        overlap_param_gather: gather the updated parameters during the forward pass; needs ``sharded`` and
            ``overlap_grad_reduce``.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    wrapped = []
    for index, chunk in enumerate(chunks):
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap_grad_reduce,
            overlap_param_gather=overlap_param_gather,
            use_distributed_optimizer=sharded,
            check_for_nan_in_grad=False,  # --nan-policy looks at the gradient norm
        )
        # Only the first chunk's last gradients are waited for: the others' reduction is hidden without buckets.
        wrapped.append(DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0))
    return wrapped
