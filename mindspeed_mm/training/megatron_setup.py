"""The engine of the Megatron road: chunks from the user's callback, their groups of parameters, their optimizer."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint.adapters import ADAPTER_NAME
from mindspeed_mm.checkpoint.coordination import gather
from mindspeed_mm.distributed import chunks, parallel, state
from mindspeed_mm.distributed.frozen import freeze
from mindspeed_mm.distributed.main_parameters import MainParameters, is_expert, named_globally
from mindspeed_mm.engine.megatron import MegatronEngine
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.lora import add_adapters, initialize_adapters, peft_config
from mindspeed_mm.optimizer import ParameterGroup
from mindspeed_mm.training.callbacks import call_model_provider
from mindspeed_mm.training.model_setup import lora_settings
from mindspeed_mm.training.optimizer_setup import optimizer_from, parameter_groups


def build_engine(args: Namespace, provider: Callable[..., Any]) -> tuple[MegatronEngine, list[ParameterGroup]]:
    """Return the engine of this rank, its weights still to be loaded, and the groups of all ranks' parameters.

    Says on rank 0 what became of it.
    """
    state.print_rank_0(accelerator.prepare_megatron_layers())
    parallel.seed_stages(args.seed)
    bare = chunks.build_chunks(lambda first, last, stage: _checked(call_model_provider(provider, first, last, stage)))
    if args.mm_model:
        freeze_parts(bare, args.mm.model.get("freeze", []))
    _add_adapters(args, bare)
    device = accelerator.device()
    wrapped = chunks.reduce_gradients(
        [chunk.to(device) for chunk in bare],
        sharded=args.use_distributed_optimizer,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
    )
    mains = MainParameters(wrapped, sharded=args.use_distributed_optimizer)
    whole = _whole_model(wrapped)
    count = sum(p.numel() for p in whole.values())
    state.print_rank_0(f" > number of parameters: {count:,}")
    groups = parameter_groups(args, [(name, p) for name, p in whole.items() if p.requires_grad])
    own = [replace(g, parameters=[main.value for main in mains.all if main.name in set(g.names)]) for g in groups]
    engine = MegatronEngine(
        wrapped,
        mains,
        optimizer_from(args, own),
        parameter_count=count,
        group_names=[group.names for group in groups],
        clip_grad=args.clip_grad,
        sequence_length=args.seq_length or 1,
        micro_batch_size=args.micro_batch_size,
        per_token_loss=args.calculate_per_token_loss,
        per_sample_loss=args.calculate_per_sample_loss,
    )
    return engine, groups


def _add_adapters(args: Namespace, bare: Sequence[Any]) -> None:
    """Put adapters into the chunks, if the command line asks for them."""
    settings = lora_settings(args)
    if settings is None:
        return
    if not hasattr(bare[0], "blueprint"):
        raise UserError(
            f"--lora-target-modules: {type(bare[0]).__name__} is no VLMModel, the only one that takes them."
        )
    blueprint, base = bare[0].blueprint, args.load_base_model or bare[0].weights_source
    config = peft_config(blueprint.model, blueprint.decoder_path, settings, base)
    for chunk in bare:
        for line in add_adapters(chunk, settings):
            state.print_rank_0(line)
        initialize_adapters(chunk, args.seed)
        chunk.peft_config = {ADAPTER_NAME: config}


def freeze_parts(bare: Sequence[nn.Module], patterns: Sequence[str]) -> None:
    """Freeze what the patterns of model.json name; each has to match on some stage. A collective.

    Args:
        bare: the chunks of this stage.
        patterns: ``freeze`` of model.json.

    Raises:
        UserError: a pattern is malformed, matches on no stage, or has numbers that mean other layers on each stage.
    """
    if not patterns:
        return
    pipeline = parallel.sizes().pipeline
    for pattern in patterns:
        if pipeline > 1 and re.search(r"\d", pattern):
            raise UserError(
                f"model.json: freeze: '{pattern}' numbers layers, which --pipeline-model-parallel-size {pipeline} "
                "numbers anew in every stage; use {*}, or set it to 1."
            )
    mistakes: list[str] = []
    for pattern in patterns:
        found = [error for chunk in bare if (error := _mistake(chunk, pattern))]
        mistakes.append("" if len(found) < len(bare) else found[0])
    for of_pattern in zip(*gather(mistakes), strict=True):
        if all(of_pattern):
            raise UserError(of_pattern[0])
    weights = [weight for chunk in bare if (weight := _tied(chunk)) is not None]
    if any(gather(not all(weight.requires_grad for weight in weights))):  # the other stage has a copy
        for weight in weights:
            weight.requires_grad_(False)


def _tied(chunk: Any) -> nn.Parameter | None:
    """Return this chunk's copy of a tied embedding."""
    decoder = getattr(chunk, "text_decoder", None)
    if decoder is None or not decoder.share_embeddings_and_output_weights:
        return None
    weight: nn.Parameter | None = decoder.shared_embedding_or_output_weight()
    return weight


def _mistake(chunk: Any, pattern: str) -> str | None:
    # Where one stage has both, the output layer has no weight of its own.
    tied = _tied(chunk)
    lent = {} if tied is None or not chunk.text_decoder.post_process else {chunk.text_decoder.output_layer: tied}
    try:
        freeze(chunk, [pattern], lent=lent)
    except UserError as error:
        return str(error)
    return None


def _checked(model: nn.Module) -> nn.Module:
    if not hasattr(model, "config") or not hasattr(model, "set_input_tensor"):
        raise UserError(
            f"model_provider returned a {type(model).__name__}, which is not made for megatron-core's pipeline: it "
            "needs 'config' (a TransformerConfig) and 'set_input_tensor'. Add --use-torch-fsdp2 to train it otherwise."
        )
    return model


def _whole_model(wrapped: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Return stand-ins, on meta, for the parameters of all stages by name; sizes are those of unsplit parameters."""
    mine: dict[str, tuple[tuple[int, ...], bool]] = {}
    for chunk in wrapped:
        for name, parameter in named_globally(chunk):
            first, *rest = parameter.shape or (1,)
            first = getattr(parameter, "words", first * _copies(parameter))  # a vocabulary may be padded
            shape = (first, *rest) if parameter.ndim else ()
            mine[name] = (shape, parameter.requires_grad)
    found = {name: entry for part in gather(mine) for name, entry in part.items()}
    return {
        name: nn.Parameter(torch.empty(shape, device="meta"), requires_grad=trained)
        for name, (shape, trained) in found.items()
    }


def _copies(parameter: nn.Parameter) -> int:
    """Return how many ranks hold another part of this parameter, or an expert's of the same name."""
    sizes = parallel.sizes()
    split = getattr(parameter, "tensor_model_parallel", False)
    if is_expert(parameter):
        return sizes.expert * (sizes.splits_experts if split else 1)
    return sizes.tensor if split else 1
