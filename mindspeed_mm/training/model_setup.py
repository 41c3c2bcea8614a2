"""The model of a run: provided by the user's callback, frozen, given adapters, sharded and filled with values."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint.hf_boxes import load_hf_boxes
from mindspeed_mm.distributed import state
from mindspeed_mm.distributed.frozen import freeze
from mindspeed_mm.distributed.fsdp2 import ShardPlan, prepare_model
from mindspeed_mm.distributed.meta import materialize, meta_init, module_init
from mindspeed_mm.distributed.replicas import start_alike
from mindspeed_mm.engine.fsdp2 import FSDP2Engine
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.strict_forward import leave_out_what_it_does_not_take
from mindspeed_mm.models.lora import LoraSettings, add_adapters, initialize_adapters
from mindspeed_mm.models.transformers.families import family_of
from mindspeed_mm.models.transformers.freeze import frozen_line
from mindspeed_mm.models.transformers_model import TransformersModel
from mindspeed_mm.optimizer import ParameterGroup, muon_matrices
from mindspeed_mm.training.callbacks import call_model_provider
from mindspeed_mm.training.checkpointing import base_folder, hf_model
from mindspeed_mm.training.optimizer_setup import optimizer_from, parameter_groups


def build_engine(args: Namespace, provider: Callable[..., Any]) -> tuple[FSDP2Engine, list[ParameterGroup]]:
    """Return the engine over the sharded model, and the groups of its parameters."""
    model, plan = build_model(args, provider)
    muon = muon_matrices(model) if args.optimizer == "muon" else ()
    groups = parameter_groups(args, model.named_parameters(remove_duplicate=False), muon)
    engine = FSDP2Engine(
        model,
        optimizer_from(args, groups),
        group=state.data_parallel_group(),
        clip_grad=args.clip_grad,
        per_token_loss=args.calculate_per_token_loss,
        per_sample_loss=args.calculate_per_sample_loss,
        replicated=[parameter for _, parameter in plan.ignored],
    )
    return engine, groups


def build_model(args: Namespace, provider: Callable[..., Any]) -> tuple[nn.Module, ShardPlan]:
    """Return the sharded model and how it was sharded; says on rank 0 what became of it.

    Under ``--init-model-with-meta-device`` its weights may still have to be read.
    """
    with meta_init() if args.init_model_with_meta_device else nullcontext():
        model = call_model_provider(provider)
        leave_out_what_it_does_not_take(model)
        if args.mm_model:
            freeze_patterns(model, args.mm.model.get("freeze", []))
        if line := frozen_line(hf_model(model)):
            state.print_rank_0(line)
        lora = _add_adapters(args, model)
    _fill_megatron_layers(args, model)
    param_dtype = None if args.params_dtype_name == "fp32" else args.params_dtype_name
    plan = prepare_model(model, state.data_parallel_group(), args.fsdp2_config_path, param_dtype=param_dtype)
    start_alike(model, state.data_parallel_group())
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
        source = args.load or args.load_base_model or getattr(model, "weights_source", None)
        weights_follow = args.load_strict and source
        init = None if weights_follow else module_init(model)
        materialize(model, accelerator.device(), init, args.seed, shard_device=plan.shard_device)
    if lora:
        initialize_adapters(hf_model(model), args.seed)
    return model, plan


def freeze_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze what the patterns of model.json name."""
    if not hasattr(model, "blueprint"):
        freeze(hf_model(model), patterns)
        return
    from mindspeed_mm.training.megatron_setup import freeze_parts

    freeze_parts([model], patterns)


def _fill_megatron_layers(args: Namespace, model: Any) -> None:
    """Read a ``VLMModel``'s Hugging Face weights, while its parameters still are in one piece."""
    if not hasattr(model, "blueprint"):
        return
    if args.init_model_with_meta_device:
        raise UserError(f"--init-model-with-meta-device: {type(model).__name__} is built with its weights; remove it.")
    if model.router_losses is not None:
        raise UserError(
            f"model.json: the load-balancing loss of experts is not computed for {type(model).__name__} under FSDP2; "
            "remove --use-torch-fsdp2, or the loss (moe_aux_loss_coeff, loss_cfg.router_aux_loss_coef), or use "
            "pretrain_transformers.py."
        )
    if model.weights_source and not args.load:
        from mindspeed_mm.models.megatron.layout import boxes

        state.print_rank_0(f" loading weights from {model.weights_source}")
        load_hf_boxes(model.blueprint.model, model.weights_source, boxes(model), strict=args.load_strict)
    model.weights_source = None  # there is nothing left to read from it


def _add_adapters(args: Namespace, model: nn.Module) -> bool:
    """Return whether the command line asks for LoRA, and the model has got it."""
    settings = lora_settings(args)
    if settings is None:
        return False
    if hasattr(model, "blueprint"):
        raise UserError(
            f"--lora-target-modules: {type(model).__name__} takes no adapters under FSDP2; remove --use-torch-fsdp2, "
            "or use pretrain_transformers.py."
        )
    family = family_of(model.transformer_config) if isinstance(model, TransformersModel) else None
    for line in add_adapters(hf_model(model), settings, family, base_folder(args, model)):
        state.print_rank_0(line)
    return True


def lora_settings(args: Namespace) -> LoraSettings | None:
    """Return what the command line says about adapters, None if it asks for none."""
    if not (args.lora_target_modules or args.lora_target_parameters):
        return None
    return LoraSettings(
        target_modules=tuple(args.lora_target_modules),
        target_parameters=tuple(args.lora_target_parameters),
        apply_modules=tuple(args.lora_apply_modules),
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
    )
