"""Which ways of splitting a model go together, as far as the command line alone tells."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator


def layout_contradictions(args: Namespace) -> Iterator[str]:
    """Yield the flags of the Megatron road that contradict each other."""
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        yield (
            "--sequence-parallel: it shares activations between the ranks of --tensor-model-parallel-size, which is 1; "
            "raise that, or remove it"
        )
    stages, chunks = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    if chunks is not None and stages == 1:
        yield (
            f"--virtual-pipeline-model-parallel-size {chunks}: there is one stage; raise "
            "--pipeline-model-parallel-size, or remove it"
        )
    if chunks == 1:
        yield "--virtual-pipeline-model-parallel-size 1: one chunk is not interleaved; use 2 or more, or remove it"
    if chunks is not None and args.eval_iters == -1:
        yield (
            "--eval-iters -1 takes micro-batches one by one, which --virtual-pipeline-model-parallel-size cannot; give "
            "the number of global batches"
        )
    if args.overlap_p2p_communication and chunks is None:
        yield "--overlap-p2p-communication needs --virtual-pipeline-model-parallel-size; add it, or remove this one"
    if args.overlap_param_gather and not (args.use_distributed_optimizer and args.overlap_grad_reduce):
        yield "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; add them"
    if args.recompute_granularity != "full":
        for dest in ("recompute_method", "recompute_num_layers"):
            if getattr(args, dest) is not None:
                yield f"--{dest.replace('_', '-')} is for --recompute-granularity full; add that, or remove it"
    elif args.recompute_method is None:
        yield "--recompute-granularity full needs --recompute-method uniform or block; add it"
    elif args.recompute_num_layers is None:
        yield f"--recompute-method {args.recompute_method} needs --recompute-num-layers; add it"
