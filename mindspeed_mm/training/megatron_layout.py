"""Whether a model can be split as the command line says, and what its flags mean for megatron-core's configuration."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.distributed.context_parallel import check_context_parallel
from mindspeed_mm.distributed.parallel import ParallelSizes
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.blueprint import check_decoder
from mindspeed_mm.models.megatron.shapes import read_hf_config
from mindspeed_mm.models.megatron.stages import layers_of_chunks
from mindspeed_mm.models.megatron.vocabulary import DIVISOR

_SAME_NAME = ("sequence_parallel", "recompute_granularity", "recompute_method", "recompute_num_layers")
_EXPERTS = ("moe_token_dispatcher_type", "moe_permute_fusion", "moe_grouped_gemm")


def parallel_sizes(args: Namespace) -> ParallelSizes:
    """Return the sizes that the command line asks for."""
    return ParallelSizes(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        virtual=args.virtual_pipeline_model_parallel_size,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
    )


def apply_layout(args: Namespace, model: ModelConfig) -> None:
    """Write what the command line decides into ``model.megatron``, after checking that the model can be split so.

    Args:
        args: the resolved command line.
        model: model.json; changed in place.

    Raises:
        UserError: it cannot; one line for each problem, with the two numbers and the flags.
    """
    hf_config = read_hf_config(model)
    check_decoder(hf_config)
    text = hf_config.get_text_config(decoder=True)
    problems = _problems(args, text)
    if problems:
        raise UserError("\n".join(f"command line: {problem}" for problem in problems))
    written = model.text_decoder.pipeline_num_layers if model.text_decoder else None
    layers_of_chunks(
        text.num_hidden_layers,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size or 1,
        written,
    )
    model.megatron.update(_fields(args, model, text))


def _problems(args: Namespace, text: Any) -> list[str]:
    problems = []

    def divides(flag: str, size: int, number: int, what: str, key: str) -> None:
        if number % size:
            problems.append(f"{flag} {size} does not divide the {number} {what} ({key}); use a divisor of {number}")

    tensor, flag = args.tensor_model_parallel_size, "--tensor-model-parallel-size"
    experts = getattr(text, "num_experts", None)
    divides(flag, tensor, text.num_attention_heads, "attention heads", "num_attention_heads")
    divides(flag, tensor, text.num_key_value_heads, "key and value heads", "num_query_groups, num_key_value_heads")
    if experts is None or getattr(text, "mlp_only_layers", None) or getattr(text, "decoder_sparse_step", 1) > 1:
        divides(flag, tensor, text.intermediate_size, "columns of an MLP", "ffn_hidden_size, intermediate_size")
    size, flag = args.expert_model_parallel_size, "--expert-model-parallel-size"
    if experts is None and size > 1:
        problems.append(f"{flag} {size}: the model has no experts; set it to 1")
    if experts is not None:
        divides(flag, size, experts, "experts", "num_moe_experts, num_experts")
        share = args.expert_tensor_parallel_size or tensor
        name = "--expert-tensor-parallel-size" if args.expert_tensor_parallel_size else "--tensor-model-parallel-size"
        divides(name, share, text.moe_intermediate_size, "columns of an expert", "moe_intermediate_size")
        if tensor > 1 and not args.sequence_parallel:
            problems.append(
                f"--tensor-model-parallel-size {tensor} with {experts} experts needs --sequence-parallel; add it"
            )
    return problems


def _fields(args: Namespace, model: ModelConfig, text: Any) -> dict[str, Any]:
    """Return fields of TransformerConfig, and the divisor of the vocabulary."""
    fields: dict[str, Any] = {name: getattr(args, name) for name in _SAME_NAME if getattr(args, name)}
    fields |= {name: getattr(args, name) for name in _EXPERTS if name in args.explicit}
    weights_follow = args.load_base_model or (model.init_from_hf_path and not model.random_init)
    if weights_follow and args.load_strict:
        fields["perform_initialization"] = False  # all values are about to be replaced
    fields[DIVISOR] = args.make_vocab_size_divisible_by
    if args.bf16:
        fields |= {"bf16": True, "params_dtype": torch.bfloat16}
    if args.use_fused_rotary_pos_emb:
        fields["apply_rope_fusion"] = True
    if args.use_fused_swiglu:
        fields["bias_activation_fusion"] = True
    if args.overlap_p2p_communication:
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    fields["calculate_per_token_loss"] = args.calculate_per_token_loss or args.calculate_per_sample_loss
    # A micro-batch is as long as its longest sample, and stages learn its length with it.
    fields["variable_seq_lengths"] = args.pipeline_model_parallel_size > 1
    return fields | check_context_parallel(
        args.context_parallel_size,
        args.context_parallel_algo,
        args.ulysses_degree_in_cp,
        heads=text.num_attention_heads,
        groups=text.num_key_value_heads,
        tensor_parallel_size=args.tensor_model_parallel_size,
        attention_dropout=float(getattr(text, "attention_dropout", 0.0) or 0.0),
    )
