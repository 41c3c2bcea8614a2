"""Assembling a run from the command line and the callbacks, in the order the parts need each other."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_mm import accelerator
from mindspeed_mm.arguments import parse_args, report_inert_flags, road_of, set_args, validate_args
from mindspeed_mm.checkpoint.disks import keeps
from mindspeed_mm.checkpoint.publish import folder_name
from mindspeed_mm.configs.config import merge_mm_args
from mindspeed_mm.data import quarantine
from mindspeed_mm.data.iterators import CyclicIterator
from mindspeed_mm.distributed import phases, state
from mindspeed_mm.distributed.phases import phase
from mindspeed_mm.engine import Engine
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.plugins import load_plugin
from mindspeed_mm.optimizer import ParameterGroup
from mindspeed_mm.optimizer.schedule import Schedule
from mindspeed_mm.tools.mem_profiler import memory_profiler
from mindspeed_mm.tools.profiler import Profiler
from mindspeed_mm.training import model_setup
from mindspeed_mm.training.callbacks import Iterators, call_dataset_provider, other_batch_size
from mindspeed_mm.training.checkpointing import Checkpointer
from mindspeed_mm.training.evaluation import FULL_PASS, check_full_pass
from mindspeed_mm.training.exits import ExitWatch
from mindspeed_mm.training.failures import StoreSlot, end_hanging_job
from mindspeed_mm.training.generation import GenerationCheck
from mindspeed_mm.training.loop import Cadence, Progress, Trainer
from mindspeed_mm.training.manifest import describe_effective, describe_run, write_manifest
from mindspeed_mm.training.megatron_layout import apply_layout, parallel_sizes
from mindspeed_mm.training.nonfinite import NonFinitePolicy
from mindspeed_mm.training.optimizer_setup import schedule_from
from mindspeed_mm.training.reporting import TrainingLog
from mindspeed_mm.training.saving import Saver
from mindspeed_mm.training.sinks import Sink, open_sinks
from mindspeed_mm.training.step_feed import LeftOut, StepFeed
from mindspeed_mm.training.token_check import TokenCheck
from mindspeed_mm.training.watch import Limits, Watch

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
    phases.prepare()
    args, notes = _prepare_args(extra_args_provider, args_defaults)
    with ExitWatch(args.exit_duration_in_mins, args.exit_interval) as exits:
        _run(args, notes, exits, dataset_provider, model_provider, forward_step, store_slot)


def _run(
    args: Namespace,
    notes: list[str],
    exits: ExitWatch,
    dataset_provider: Callable[..., Any],
    model_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    store_slot: StoreSlot,
) -> None:
    start = time.monotonic()
    if args.use_deter_comp:  # before the device and the collective library are first used
        notes += [f"--use-deter-comp: {limit}" for limit in accelerator.determinism_limits()]
        accelerator.use_deterministic_algorithms()
    watch = _join_job(args, store_slot, notes)
    state.print_rank_0(f"time to initialize megatron (seconds): {time.monotonic() - start:.3f}")
    keeper = bool(args.save) and keeps(args.save)
    sinks = open_sinks(args)
    for plugin in args.plugin:
        load_plugin(plugin)
    profiler = Profiler(args.mm.tool.profile)
    memory_profiler.reset(args.mm.tool.memory_profile)

    if args.allow_tf32:
        accelerator.allow_tf32()
    accelerator.seed_all(args.seed)
    with phase("building the model"):
        engine, groups = _build_engine(args, model_provider)
    schedule = schedule_from(args, engine.optimizer)
    checkpointer = _build_checkpointer(args, engine, schedule, keeper)
    if args.export_hf:
        checkpointer.check_export(args.export_hf)
    with phase("loading"):
        args.iteration, args.consumed_train_samples = checkpointer.load()
    bad_samples = _bad_samples_folder(args)
    if bad_samples and not checkpointer.resumes_itself and dist.get_rank() == 0:
        quarantine.start_over(bad_samples)
    dist.barrier()  # nobody reads or writes the list of bad samples before
    with phase("preparing the data"):
        train, valid, test = _build_iterators(args, dataset_provider)
        checkpointer.restore_iterators(_named_iterators(train, valid))
    manifest = None
    if args.save or _records_precision(args):
        manifest = {**describe_run(args, groups), "effective": describe_effective(args, engine, schedule)}
    if args.save and manifest:
        write_manifest(args.save, manifest)
    # Dropout differs between data-parallel ranks; a resumed run continues its own streams instead.
    engine.seed(args.seed + dist.get_rank(state.data_parallel_group()))
    checkpointer.restore_rng()
    state.print_rank_0("done with setup ...")

    trainer = _build_trainer(args, engine, schedule, forward_step, train, valid, checkpointer, sinks)
    if args.eval_generate:
        check = GenerationCheck(engine.module, valid, args.eval_generate, args.params_dtype)
        trainer.generate = lambda: check.run(trainer.progress, trainer.log)
    trainer.observers = [profiler.step, memory_profiler.step]
    if manifest and _records_precision(args):
        from mindspeed_mm.training.alignment import attach

        attach(args, trainer, manifest)
    if args.export_hf_interval:
        trainer.observers.append(lambda: _export_now_and_then(args, checkpointer))
    if checkpointer.saver:
        trainer.observers.append(checkpointer.saver.check)
    if args.nan_policy == "rollback" and not args.skip_train:
        _prepare_rollback(trainer, checkpointer, train)
    profiler.start()
    try:
        stopped = _train_and_evaluate(args, trainer, exits, valid, test, checkpointer.saver)
    finally:
        for watcher in trainer.watchers:
            watcher.stop()
        profiler.stop()
        memory_profiler.stop()
        trainer.log.stop_progress()
    if args.export_hf and not stopped:
        with phase("export", patient=True):
            checkpointer.export_hf(args.export_hf)
    trainer.log.close()
    dist.barrier()  # what the others have quarantined is on the list
    if bad_samples and dist.get_rank() == 0 and (summary := quarantine.summarise(bad_samples)):
        state.print_rank_0(summary)
    if watch:
        watch.stop()
    state.shutdown()


def _bad_samples_folder(args: Namespace) -> str | None:
    """Return where the list of bad samples lies, None if there is none."""
    param = args.mm.data.dataset_param if getattr(args, "mm_data", None) else None
    return param.quarantine_folder if param else None


def _records_precision(args: Namespace) -> bool:
    asked = args.precision_capture or args.precision_mode or args.precision_on_anomaly or args.precision_perturb
    return bool(asked or args.log_local_norm)


def _build_engine(args: Namespace, provider: Callable[..., Any]) -> tuple[Engine, list[ParameterGroup]]:
    if road_of(args) == "fsdp2":
        return model_setup.build_engine(args, provider)
    from mindspeed_mm.training import megatron_setup

    return megatron_setup.build_engine(args, provider)


def _build_checkpointer(args: Namespace, engine: Any, schedule: Schedule, keeper: bool) -> Checkpointer:
    if road_of(args) == "fsdp2":
        return Checkpointer(args, engine.module, engine.optimizer, schedule, keeper=keeper)
    from mindspeed_mm.training.megatron_checkpointing import MegatronCheckpointer

    return MegatronCheckpointer(args, engine, schedule, keeper=keeper)


def _export_now_and_then(args: Namespace, checkpointer: Checkpointer) -> None:
    if args.iteration % args.export_hf_interval == 0:
        with phase("export", patient=True):
            try:
                checkpointer.export_hf(f"{args.export_hf.rstrip('/')}-{folder_name(args.iteration)}")
            except UserError as error:  # on all ranks; the last export decides how the run ends
                state.warn_rank_0(f"{error}; training goes on, and exports again at the next interval")


def _prepare_args(provider: Callable[..., Any] | None, defaults: dict[str, Any]) -> tuple[Namespace, list[str]]:
    """Return the arguments, and lines about settings that the user wrote and that do not count."""
    args = parse_args(provider, defaults)
    validate_args(args, state.RankInfo.from_environment().world_size)
    notes = merge_mm_args(args) + report_inert_flags(args, road_of(args))
    # model.json may choose the loss as well; from here on there is one place to ask.
    model_loss = args.mm.model.get("loss_cfg", {}) if args.mm_model else {}
    args.calculate_per_token_loss |= model_loss.get("loss_type") == "per_token_loss"
    args.calculate_per_sample_loss |= model_loss.get("loss_type") == "per_sample_loss"
    args.params_dtype = _DTYPES[args.params_dtype_name]
    if road_of(args) == "megatron" and args.mm_model:
        apply_layout(args, args.mm.model)
    set_args(args)
    return args, notes


def _join_job(args: Namespace, store_slot: StoreSlot, notes: list[str]) -> Watch | None:
    """Join the other ranks; return what watches over them, None where there are none or the job is another's."""
    info = state.RankInfo.from_environment()
    requested = args.distributed_backend if "distributed_backend" in args.explicit else None
    backend, warning = accelerator.resolve_backend(requested)
    store_slot.store = state.connect_store(info)
    limits = Limits(60 * args.distributed_timeout_minutes, 60 * args.preparation_timeout_minutes)
    # The libraries' own timeout comes after ours, which tells a slow preparation from a rank that hangs.
    timeout = timedelta(seconds=limits.training + limits.preparing)
    state.initialize(store_slot.store, info, backend=backend, timeout=timeout, sizes=parallel_sizes(args))
    if warning:
        state.warn_rank_0(warning)
    for note in notes:
        state.print_rank_0(note)
    if info.world_size == 1 or not state.owns_process_group():
        return None
    store = state.reconnect_store(info, timedelta(seconds=30))
    watch = Watch(store, info.rank, info.world_size, info.ranks_of_host, limits, end_hanging_job)
    watch.start()
    store_slot.lost_ranks = watch.lost
    return watch


def _build_iterators(args: Namespace, provider: Callable[..., Any]) -> Iterators:
    evaluations = args.train_iters // args.eval_interval + 1
    counts = [args.train_iters, evaluations * args.eval_iters, args.eval_iters]
    if args.eval_iters == FULL_PASS:  # who asks for all samples knows how many there are
        counts[1:] = [0, 0]
    train, valid, test = call_dataset_provider(provider, [n * args.global_batch_size for n in counts])
    if warning := other_batch_size(train, args.micro_batch_size):
        state.warn_rank_0(warning)
    if args.eval_iters == FULL_PASS:
        check_full_pass(valid, "validation")
        check_full_pass(test, "test")
    return train, valid, test


def _named_iterators(train: Iterator[Any] | None, valid: Mapping[str, Iterator[Any]]) -> dict[str, Any]:
    """Return the iterators whose position a checkpoint keeps, by their names in it."""
    return {"train": train, **{f"valid {name}".strip(): iterator for name, iterator in valid.items()}}


def _build_trainer(
    args: Namespace,
    engine: Engine,
    schedule: Schedule,
    forward_step: Callable[..., Any],
    train: Iterator[Any] | None,
    valid: dict[str, Iterator[Any]],
    checkpointer: Checkpointer,
    sinks: list[Sink],
) -> Trainer:
    def publish(iteration: int, consumed: int) -> None:
        args.iteration, args.consumed_train_samples = iteration, consumed

    progress = Progress(args.iteration, args.consumed_train_samples, publish)
    iterators = _named_iterators(train, valid)
    save = None
    if args.save:
        save = lambda: checkpointer.save(  # noqa: E731
            progress.iteration, progress.consumed_samples, iterators, progress.validation_loss
        )
    # 6 x parameters is the usual estimate for forward and backward of a token (Kaplan et al., 2020).
    parameters = engine.parameter_count
    log = TrainingLog(
        train_iters=args.train_iters,
        log_interval=args.log_interval,
        global_batch_size=args.global_batch_size,
        metrics_path=Path(args.save) / "metrics.jsonl" if args.save else None,
        start_iteration=progress.iteration,
        sinks=sinks,
        sink_interval=args.tensorboard_log_interval,
        flops_per_token=6.0 * parameters if args.log_throughput else None,
    )
    feed = StepFeed(
        train if train is not None else CyclicIterator([None]),
        stride=args.micro_batch_size * args.data_parallel_size,
        left_out=LeftOut(
            Path(args.save) if args.save else None, checkpointer.newest.parent if checkpointer.newest else None
        ),
        check=TokenCheck(engine.module),
    )
    return Trainer(
        engine=engine,
        schedule=schedule,
        forward_step=forward_step,
        feed=feed,
        valid_iterators=valid,
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
        log=log,
        nonfinite=NonFinitePolicy(
            args.nan_policy,
            args.nan_limit,
            engine=engine,
            schedule=schedule,
            forward_step=forward_step,
            log=log,
            num_microbatches=args.num_microbatches,
            samples=args.global_batch_size,
            samples_at=feed.samples_at,
            where_to_resume=checkpointer.where_to_resume,
        ),
        save=save,
        go_back=lambda: checkpointer.go_back(iterators),
        generate=None,
        observers=[],
    )


def _prepare_rollback(trainer: Trainer, checkpointer: Checkpointer, train: Iterator[Any] | None) -> None:
    """See to it that there is a checkpoint to go back to, and that the data can go back too."""
    if train is not None and not hasattr(train, "load_state_dict"):
        raise UserError(
            f"--nan-policy rollback: the training data is a {type(train).__name__} without a position, which cannot go "
            "back; return a DataLoader or another iterable from train_valid_test_datasets_provider, or use skip."
        )
    if trainer.save and not checkpointer.can_go_back:
        trainer.save()


def _train_and_evaluate(
    args: Namespace,
    trainer: Trainer,
    exits: ExitWatch,
    valid: dict[str, Iterator[Any]],
    test: dict[str, Iterator[Any]],
    saver: Saver | None,
) -> bool:
    """Return whether the run was stopped early."""
    if not args.skip_train:
        state.print_rank_0("training ...")
        exits.begin()
        reason = trainer.train(exits)
        if saver:
            with phase("save", patient=True):
                saver.finish()
        if reason is not None:
            return True
        exits.end()
        state.print_rank_0("after training is done")
    for iterators, name in ((valid, "validation"), (test, "test")):
        if iterators and args.eval_iters:
            trainer.evaluate(iterators, name, f"iteration {trainer.progress.iteration} on {name} set")
    return False
