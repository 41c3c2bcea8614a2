"""What a command line must satisfy as a whole, and the values that follow from it."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Iterator

from mindspeed_mm.arguments.flag import Refused
from mindspeed_mm.arguments.groups import FLAGS
from mindspeed_mm.arguments.groups.finetuning import LORA
from mindspeed_mm.arguments.layout import layout_contradictions
from mindspeed_mm.errors import UserError


def road_of(args: Namespace) -> str:
    """Return "fsdp2" or "megatron"."""
    return "fsdp2" if args.use_torch_fsdp2 else "megatron"


def validate_args(args: Namespace, world_size: int) -> None:
    """Check ``args`` as a whole and fill in what follows from it, in place.

    Sets ``world_size``, ``rank``, ``local_rank`` and ``data_parallel_size``; ``global_batch_size`` in samples;
    ``params_dtype_name`` ("fp32", "bf16" or "fp16"); ``train_iters`` and ``lr_decay_iters`` in steps;
    ``start_weight_decay`` and ``end_weight_decay``; ``iteration`` and ``consumed_train_samples`` at zero.

    Args:
        args: The result of :func:`parse_args`.
        world_size: Number of ranks of the job.

    Raises:
        UserError: With one line for each problem found: the flag, its value and what to do.
    """
    road = road_of(args)
    if road == "megatron" and "ckpt_format" not in args.explicit:
        args.ckpt_format = "torch_dist"
    _stop_at(*_refusals(args, road), *_contradictions(args, road))

    args.world_size = world_size
    args.rank = int(os.environ.get("RANK", 0))
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    args.params_dtype_name = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    args.iteration = 0
    args.consumed_train_samples = 0
    _derive_batches(args)
    _derive_duration(args)
    if args.weight_decay_incr_style == "constant":
        args.start_weight_decay = args.end_weight_decay = args.weight_decay


def _stop_at(*problems: str) -> None:
    if problems:
        raise UserError("\n".join(f"command line: {problem}" for problem in problems))


def _refusals(args: Namespace, road: str) -> Iterator[str]:
    """Yield the flags whose value this road cannot honour, as their declarations say."""
    for flag in FLAGS.values():
        status, value = flag.status(road), getattr(args, flag.dest)
        if isinstance(status, Refused) and value != flag.default and value not in status.allowed:
            yield f"{flag.shown(value)}: {status.fix}"


def _contradictions(args: Namespace, road: str) -> Iterator[str]:
    """Yield the flags that contradict each other or the environment, and those that are missing."""
    if args.calculate_per_sample_loss and args.calculate_per_token_loss:
        yield "--calculate-per-sample-loss and --calculate-per-token-loss are two different losses; remove one"
    if args.bf16 and args.fp16:
        yield "--bf16 and --fp16 are two different types; remove one"
    if road == "megatron":
        yield from layout_contradictions(args)
        if args.ckpt_format == "torch_dcp":
            yield "--ckpt-format torch_dcp: it needs --use-torch-fsdp2; add that flag, or use torch_dist"
    if road == "fsdp2" and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        yield (
            "environment: CUDA_DEVICE_MAX_CONNECTIONS=1 keeps FSDP2 from overlapping communication with "
            "--use-torch-fsdp2; export CUDA_DEVICE_MAX_CONNECTIONS=2, or unset it"
        )
    unread = [flag.name for flag in LORA.flags if flag.dest in args.explicit]
    if unread and not (args.lora_target_modules or args.lora_target_parameters):
        yield f"{' '.join(unread)}: there is no LoRA without --lora-target-modules; add it, or remove them"
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler contradict each other; remove one"
        )
    if args.train_iters is not None and args.train_samples is not None:
        yield (
            f"--train-iters {args.train_iters} and --train-samples {args.train_samples} both say how long to train; "
            "remove one"
        )
    if not args.skip_train:
        if args.train_iters is None and args.train_samples is None:
            yield "--train-iters is missing; give the number of steps, or --train-samples"
        if args.lr is None:
            yield "--lr is missing; give the highest learning rate, for example --lr 1e-5"
        else:
            yield from _learning_rate(args)
    yield from _weight_decay(args)
    if args.keep_best and (not args.eval_iters or not args.save_interval or args.save_interval % args.eval_interval):
        yield (
            f"--keep-best {args.keep_best}: --save-interval {args.save_interval} must be a multiple of --eval-interval "
            f"{args.eval_interval}, with --eval-iters above 0, so that what is saved has been evaluated"
        )
    if args.nan_policy == "rollback":
        if not args.save:
            yield "--nan-policy rollback goes back to a checkpoint of --save; add --save, or use --nan-policy skip"
        for dest in ("no_save_optim", "no_save_rng"):
            if getattr(args, dest):
                flag = f"--{dest.replace('_', '-')}"
                yield f"{flag}: --nan-policy rollback needs whole checkpoints to go back to; remove one of the two"


def _learning_rate(args: Namespace) -> Iterator[str]:
    if args.min_lr > args.lr:
        yield f"--min-lr {args.min_lr} is above --lr {args.lr}; lower it, or raise --lr"
    if args.lr_warmup_init > args.lr:
        yield f"--lr-warmup-init {args.lr_warmup_init} is above --lr {args.lr}; lower it, or raise --lr"
    if args.lr_warmup_fraction is not None and args.lr_warmup_iters:
        yield (
            f"--lr-warmup-fraction {args.lr_warmup_fraction} and --lr-warmup-iters {args.lr_warmup_iters} both set the "
            "length of the warm-up; remove one"
        )
    if args.lr_decay_style == "WSD" and args.lr_wsd_decay_iters is None:
        yield "--lr-decay-style WSD needs the length of its final fall; add --lr-wsd-decay-iters"


def _weight_decay(args: Namespace) -> Iterator[str]:
    start, end, style = args.start_weight_decay, args.end_weight_decay, args.weight_decay_incr_style
    ends = {"--start-weight-decay": start, "--end-weight-decay": end}
    if style == "constant":
        for name, value in ends.items():
            if value is not None:
                yield f"{name} {value}: weight decay is constant; add --weight-decay-incr-style linear or cosine"
        return
    for name, value in ends.items():
        if value is None:
            yield f"--weight-decay-incr-style {style} needs {name}; add it"
    if start is not None and end is not None and end < start:
        yield f"--end-weight-decay {end} is below --start-weight-decay {start}; weight decay can only grow"


def _derive_batches(args: Namespace) -> None:
    sizes = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        "--context-parallel-size": args.context_parallel_size,
    }
    split = math.prod(sizes.values())
    if args.world_size % split:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        _stop_at(f"{product} = {split} does not divide the {args.world_size} ranks; change it or --nproc_per_node")
    args.data_parallel_size = args.world_size // split

    experts = args.expert_model_parallel_size
    tensor = args.tensor_model_parallel_size
    share = args.expert_tensor_parallel_size or tensor
    ranks = args.world_size // args.pipeline_model_parallel_size
    if ranks % (experts * share):
        _stop_at(
            f"--expert-model-parallel-size {experts} x {share} ranks for each expert (--expert-tensor-parallel-size, "
            f"by default --tensor-model-parallel-size) does not divide the {ranks} ranks of a pipeline stage: "
            f"{args.data_parallel_size} data-parallel x {args.context_parallel_size} context-parallel x {tensor} "
            "tensor-parallel; change one"
        )

    step = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size is None:
        args.global_batch_size = step
    if args.global_batch_size % step:
        below = args.global_batch_size // step * step
        _stop_at(
            f"--global-batch-size {args.global_batch_size} is not a multiple of --micro-batch-size "
            f"{args.micro_batch_size} x {args.data_parallel_size} data-parallel ranks = {step}; use "
            + (f"{below} or {below + step}" if below else f"{step}")
        )
    args.num_microbatches = args.global_batch_size // step
    stages = args.pipeline_model_parallel_size
    if args.virtual_pipeline_model_parallel_size and args.num_microbatches % stages:
        _stop_at(
            f"--virtual-pipeline-model-parallel-size: the {args.num_microbatches} micro-batches of a step are not a "
            f"multiple of --pipeline-model-parallel-size {stages}; use a --global-batch-size that is a multiple of "
            f"{stages * step}"
        )


def _derive_duration(args: Namespace) -> None:
    if args.train_samples is not None:
        args.train_iters = args.train_samples // args.global_batch_size
        if not args.train_iters:
            _stop_at(
                f"--train-samples {args.train_samples} is less than one global batch of {args.global_batch_size}; "
                "raise it, or lower --global-batch-size"
            )
    if args.skip_train:  # nothing is scheduled, but an optimizer and its schedule are built all the same
        args.lr, args.min_lr, args.lr_warmup_init = 0.0, 0.0, 0.0
        args.train_iters, args.lr_decay_iters, args.lr_decay_style = 1, 1, "constant"
        return
    if args.lr_decay_iters is None:
        args.lr_decay_iters = args.train_iters

    decay, fraction, fall = args.lr_decay_iters, args.lr_warmup_fraction, args.lr_wsd_decay_iters
    warmup = args.lr_warmup_iters if fraction is None else fraction * decay
    shown = f"--lr-warmup-iters {warmup}" if fraction is None else f"--lr-warmup-fraction {fraction} ({warmup:g} steps)"
    if warmup >= decay:
        _stop_at(f"{shown} leaves no step of the {decay} of --lr-decay-iters or --train-iters; shorten the warm-up")
    if args.lr_decay_style == "WSD" and warmup + fall > decay:
        _stop_at(
            f"--lr-wsd-decay-iters {fall} and {shown} are together longer than the {decay} steps of --lr-decay-iters "
            "or --train-iters; shorten one"
        )
