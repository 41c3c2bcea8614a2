"""Assembling a run from the command line and the callbacks, in the order the parts need each other."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm import accelerator
from mindspeed_mm.arguments import parse_args, report_inert_flags, set_args, validate_args
from mindspeed_mm.configs.config import merge_mm_args
from mindspeed_mm.data.iterators import CyclicIterator
from mindspeed_mm.distributed import state
from mindspeed_mm.distributed.fsdp2 import ShardPlan, prepare_model
from mindspeed_mm.distributed.meta import materialize, meta_init, module_init
from mindspeed_mm.engine.fsdp2 import FSDP2Engine
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.plugins import load_plugin
from mindspeed_mm.optimizer import build_optimizer, build_param_groups, build_schedule, param_group_table
from mindspeed_mm.tools.mem_profiler import memory_profiler
from mindspeed_mm.tools.profiler import Profiler
from mindspeed_mm.training.callbacks import Iterators, call_dataset_provider, call_model_provider
from mindspeed_mm.training.checkpointing import Checkpointer, hf_model
from mindspeed_mm.training.exits import ExitWatch
from mindspeed_mm.training.failures import StoreSlot
from mindspeed_mm.training.loop import Cadence, Progress, Trainer
from mindspeed_mm.training.reporting import TrainingLog
from mindspeed_mm.training.saving import Saver
from mindspeed_mm.training.sinks import Sink, open_sinks

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(
    dataset_provider: Callable[..., Any],
    model_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    extra_args_provider: Callable[..., Any] | None,
    args_defaults: dict[str, Any],
    store_slot: StoreSlot,
) -> None:
    """Train as :func:`mindspeed_mm.training.pretrain` describes."""
    start = time.monotonic()
    args, notes = _prepare_args(extra_args_provider, args_defaults)
    _join_job(args, store_slot, notes)
    state.print_rank_0(f"time to initialize megatron (seconds): {time.monotonic() - start:.3f}")
    sinks = open_sinks(args)
    for plugin in args.plugin:
        load_plugin(plugin)
    profiler = Profiler(args.mm.tool.profile)
    memory_profiler.reset(args.mm.tool.memory_profile)

    if args.allow_tf32:
        accelerator.allow_tf32()
    if args.use_deter_comp:
        accelerator.use_deterministic_algorithms()
    accelerator.seed_all(args.seed)
    model, plan = _build_model(args, model_provider)
    engine = _build_engine(args, model, plan)
    schedule = _build_schedule(args, engine.optimizer)
    checkpointer = Checkpointer(args, model, engine.optimizer, schedule)
    args.iteration, args.consumed_train_samples = checkpointer.load()
    train, valid, test = _build_iterators(args, dataset_provider)
    checkpointer.restore_iterators({"train": train, "valid": valid})
    # Dropout differs between data-parallel ranks; a resumed run continues its own streams instead.
    accelerator.seed_all(args.seed + dist.get_rank(state.data_parallel_group()))
    checkpointer.restore_rng()
    state.print_rank_0("done with setup ...")

    trainer = _build_trainer(args, engine, schedule, forward_step, train, valid, checkpointer, sinks)
    trainer.observers = [profiler.step, memory_profiler.step]
    if checkpointer.saver:
        trainer.observers.append(checkpointer.saver.check)
    profiler.start()
    try:
        with ExitWatch(args.exit_duration_in_mins, args.exit_interval) as exits:
            stopped = _train_and_evaluate(args, trainer, exits, valid, test, checkpointer.saver)
    finally:
        profiler.stop()
        memory_profiler.stop()
        trainer.log.stop_progress()
    if args.export_hf and not stopped:
        checkpointer.export_hf(args.export_hf)
    trainer.log.close()
    state.shutdown()


def _prepare_args(provider: Callable[..., Any] | None, defaults: dict[str, Any]) -> tuple[Namespace, list[str]]:
    """Return the arguments, and lines about settings that the user wrote and that do not count."""
    args = parse_args(provider, defaults)
    if not args.use_torch_fsdp2:
        raise UserError("--use-torch-fsdp2 is missing: this version trains under FSDP2; add the flag.")
    validate_args(args, state.RankInfo.from_environment().world_size)
    notes = merge_mm_args(args) + report_inert_flags(args, "fsdp2")
    # model.json may choose the loss as well; from here on there is one place to ask.
    model_loss = args.mm.model.get("loss_cfg", {}) if args.mm_model else {}
    args.calculate_per_token_loss |= model_loss.get("loss_type") == "per_token_loss"
    args.params_dtype = _DTYPES[args.params_dtype_name]
    set_args(args)
    return args, notes


def _join_job(args: Namespace, store_slot: StoreSlot, notes: list[str]) -> None:
    info = state.RankInfo.from_environment()
    requested = args.distributed_backend if "distributed_backend" in args.explicit else None
    backend, warning = accelerator.resolve_backend(requested)
    store_slot.store = state.connect_store(info)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    state.initialize(store_slot.store, info, backend=backend, timeout=timeout)
    if warning:
        state.warn_rank_0(warning)
    for note in notes:
        state.print_rank_0(note)


def _build_model(args: Namespace, provider: Callable[..., Any]) -> tuple[nn.Module, ShardPlan]:
    with meta_init() if args.init_model_with_meta_device else nullcontext():
        model = call_model_provider(provider)
    param_dtype = None if args.params_dtype_name == "fp32" else args.params_dtype_name
    plan = prepare_model(model, state.data_parallel_group(), args.fsdp2_config_path, param_dtype=param_dtype)
    for line in plan.lines():
        state.print_rank_0(line)
    if args.export_hf and not hasattr(hf_model(model), "save_pretrained"):
        raise UserError(
            f"--export-hf {args.export_hf}: {type(model).__name__} is no Hugging Face model; remove the flag. "
            "Its weights are in the checkpoints of --save."
        )
    total = sum(p.numel() for p in model.parameters())
    state.print_rank_0(f" > number of parameters: {total:,}")
    if args.init_model_with_meta_device:
        # Values that a strict load is about to replace are not computed first.
        weights_follow = args.load_strict and (args.load or getattr(model, "weights_source", None))
        init = None if weights_follow else module_init(model)
        materialize(model, accelerator.device(), init, args.seed, shard_device=plan.shard_device)
    return model, plan


def _build_engine(args: Namespace, model: nn.Module, plan: ShardPlan) -> FSDP2Engine:
    groups = build_param_groups(
        model.named_parameters(),
        weight_decay_exclude=args.weight_decay_exclude_modules,
        lr_scale=args.lr_scale_modules,
        lr_mult=args.lr_mult,
        decay_all=args.weight_decay_all,
    )
    for line in param_group_table(groups, args.lr, args.weight_decay):
        state.print_rank_0(line)
    optimizer = build_optimizer(
        groups,
        name=args.optimizer,
        selection=args.optimizer_selection,
        lr=args.lr,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        momentum=args.sgd_momentum,
        ema_decay=args.ema_decay,
    )
    return FSDP2Engine(
        model,
        optimizer,
        group=state.data_parallel_group(),
        clip_grad=args.clip_grad,
        per_token_loss=args.calculate_per_token_loss,
        replicated=[parameter for _, parameter in plan.ignored],
    )


def _build_schedule(args: Namespace, optimizer: torch.optim.Optimizer) -> Any:
    """Translate the command line's iterations into the samples the schedule counts in."""
    batch, wsd = args.global_batch_size, args.lr_wsd_decay_iters
    warmup = args.lr_warmup_iters
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * args.lr_decay_iters
    return build_schedule(
        optimizer,
        lr=args.lr,
        min_lr=args.min_lr,
        warmup_init=args.lr_warmup_init,
        warmup_samples=warmup * batch,
        decay_samples=args.lr_decay_iters * batch,
        decay_style=args.lr_decay_style,
        weight_decay=(args.start_weight_decay, args.end_weight_decay),
        weight_decay_style=args.weight_decay_incr_style,
        # A constant has no length, and then a longer --train-iters on resume changes nothing about it.
        weight_decay_samples=0 if args.weight_decay_incr_style == "constant" else args.train_iters * batch,
        wsd_decay_samples=None if wsd is None else wsd * batch,
        wsd_decay_style=args.lr_wsd_decay_style,
        use_checkpoint=args.use_checkpoint_opt_param_scheduler,
        override=args.override_opt_param_scheduler,
    )


def _build_iterators(args: Namespace, provider: Callable[..., Any]) -> Iterators:
    evaluations = args.train_iters // args.eval_interval + 1
    counts = [args.train_iters, evaluations * args.eval_iters, args.eval_iters]
    return call_dataset_provider(provider, [n * args.global_batch_size for n in counts])


def _build_trainer(
    args: Namespace,
    engine: FSDP2Engine,
    schedule: Any,
    forward_step: Callable[..., Any],
    train: Iterator[Any] | None,
    valid: Iterator[Any] | None,
    checkpointer: Checkpointer,
    sinks: list[Sink],
) -> Trainer:
    def publish(iteration: int, consumed: int) -> None:
        args.iteration, args.consumed_train_samples = iteration, consumed

    progress = Progress(args.iteration, args.consumed_train_samples, publish)
    save = None
    if args.save:
        iterators = {"train": train, "valid": valid}
        save = lambda: checkpointer.save(  # noqa: E731
            progress.iteration, progress.consumed_samples, iterators, progress.validation_loss
        )
    return Trainer(
        engine=engine,
        schedule=schedule,
        forward_step=forward_step,
        train_iterator=train if train is not None else CyclicIterator([None]),
        valid_iterator=valid,
        num_microbatches=args.num_microbatches,
        global_batch_size=args.global_batch_size,
        cadence=Cadence(
            train_iters=args.train_iters,
            eval_interval=args.eval_interval,
            eval_iters=args.eval_iters,
            save_interval=args.save_interval,
            gc_interval=args.manual_gc_interval if args.manual_gc else None,
            gc_before_evaluation=args.manual_gc and args.manual_gc_eval,
        ),
        progress=progress,
        log=TrainingLog(
            train_iters=args.train_iters,
            log_interval=args.log_interval,
            global_batch_size=args.global_batch_size,
            metrics_path=Path(args.save) / "metrics.jsonl" if args.save else None,
            start_iteration=progress.iteration,
            sinks=sinks,
            sink_interval=args.tensorboard_log_interval,
            flops_per_token=_flops_per_token(engine.module) if args.log_throughput else None,
        ),
        save=save,
        observers=[],
    )


def _flops_per_token(model: nn.Module) -> float:
    """Return 6 x parameters, the usual estimate for forward and backward of a token (Kaplan et al., 2020)."""
    return 6.0 * sum(p.numel() for p in model.parameters())


def _train_and_evaluate(
    args: Namespace,
    trainer: Trainer,
    exits: ExitWatch,
    valid: Iterator[Any] | None,
    test: Iterator[Any] | None,
    saver: Saver | None,
) -> bool:
    """Return whether the run was stopped early."""
    if not args.skip_train:
        state.print_rank_0("training ...")
        reason = trainer.train(exits)
        if saver:
            saver.finish()
        if reason is not None:
            return True
        state.print_rank_0("after training is done")
    for iterator, name in ((valid, "validation"), (test, "test")):
        if iterator is not None and args.eval_iters:
            trainer.evaluate(iterator, name, f"iteration {trainer.progress.iteration} on {name} set")
    return False
