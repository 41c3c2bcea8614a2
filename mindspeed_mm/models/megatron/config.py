"""From model.json and the blueprint to megatron-core's ``TransformerConfig``."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.configs.towers import TextDecoder
from mindspeed_mm.distributed.state import print_rank_0
from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.models.megatron.blueprint import Blueprint
from mindspeed_mm.models.megatron.shapes import TEXT_KEYS
from mindspeed_mm.models.megatron.structure import check_structure
from mindspeed_mm.models.megatron.vocabulary import DIVISOR

_ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Keys of text_decoder that are fields of TransformerConfig under the same name and change no weights.
SAME_NAME = (
    "hidden_dropout",
    "attention_dropout",
    "attention_softmax_in_fp32",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "sequence_parallel",
    "variable_seq_lengths",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_grouped_gemm",
    "moe_token_dispatcher_type",
    "init_method_std",
)


# What else of text_decoder is read, here or elsewhere, or says again what other keys say.
_OTHER_KEYS = {
    "model_id",
    "freeze",
    "pipeline_num_layers",
    "untie_embeddings_and_output_weights",
    "params_dtype",
    "bf16",
    "fp16",
    "use_fused_rotary_pos_emb",
    "use_te",
    "group_query_attention",
    "rope_scaling",
}


def transformer_config(config: ModelConfig, blueprint: Blueprint, *, transformer_engine: bool) -> Any:
    """Return the ``TransformerConfig`` of the text decoder, for the parallel layout that is initialized.

    What decides, from the strongest: ``megatron`` of model.json, where the command line's flags are; ``text_decoder``
    of model.json; the Hugging Face configuration.

    Args:
        config: model.json.
        blueprint: the model.
        transformer_engine: whether the layers will be Transformer Engine's, which can do more.

    Raises:
        UserError: a key is unknown or does not go with the others.
    """
    from megatron.core.transformer import TransformerConfig

    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    text = config.text_decoder or TextDecoder()
    shapes = {**_shapes(blueprint), **_parallel_sizes()}
    checked = check_structure(text, shapes, blueprint)
    if idle := sorted(text.model_fields_set - checked - TEXT_KEYS - set(SAME_NAME) - _OTHER_KEYS):
        print_rank_0(f"model.json: these keys of text_decoder have no effect here: {', '.join(idle)}")
    chosen = chosen_fields(config)
    for key in chosen:
        if key in shapes and key not in ("init_method_std", "attention_dropout"):
            raise UserError(
                f"model.json: megatron.{key} is decided by the model and by the parallel sizes of the command line, "
                f"{shapes[key]} here. Remove the key."
            )
        if key not in fields:
            raise UserError(
                f"model.json: megatron.{key}: megatron-core's TransformerConfig has no such field."
                f"{did_you_mean(key, fields)}"
            )
    values = {**_DEFAULTS, **shapes, **chosen}
    if not transformer_engine:
        _without_engine(values)
    if shapes["virtual_pipeline_model_parallel_size"]:
        # Overlapping needs it so, and after a batch the host would wait for the device.
        values["batch_p2p_comm"] = False
    values["moe_router_load_balancing_type"] = "none"  # `balance` computes it
    if values["activation_func"] is not F.silu:
        values["bias_activation_fusion"] = False  # megatron-core's fused GELU is an approximation
    values["pipeline_dtype"] = values["params_dtype"]
    if values.get("fp32_residual_connection") and values["params_dtype"] != torch.float32:
        raise UserError(
            "model.json: megatron.fp32_residual_connection: layers here take hidden states in the dtype of their "
            "weights; remove the key."
        )
    if values["params_dtype"] == torch.float16 or values.get("fp16"):
        raise UserError(
            "model.json: text_decoder.fp16, or params_dtype fp16: there is no loss scaling, without which small "
            "gradients vanish; use bf16."
        )
    # The engine divides by the tokens or samples of the global batch: gradients are only added up till then.
    values["calculate_per_token_loss"] = config.loss_cfg.loss_type != "default"
    if "num_moe_experts" in values and shapes["tensor_model_parallel_size"] > 1 and not values.get("sequence_parallel"):
        raise UserError(
            f"a mixture of experts with --tensor-model-parallel-size {shapes['tensor_model_parallel_size']} needs "
            f"--sequence-parallel as well; add the flag."
        )
    try:
        result = TransformerConfig(**values)
    except (AssertionError, ImportError, ValueError) as error:
        raise UserError(f"model.json and the command line do not fit together for megatron-core: {error}") from error
    return result


def chosen_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of ``TransformerConfig`` that model.json and the command line write."""
    chosen = {**_text_decoder_keys(config.text_decoder or TextDecoder()), **config.megatron.to_dict()}
    chosen.pop(DIVISOR, None)
    return chosen


_DEFAULTS: dict[str, Any] = {
    "params_dtype": torch.float32,
    "hidden_dropout": 0.0,
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    # The other one refuses sequences of different lengths, in dense models too.
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_dtype": "fp32",
}


def _without_engine(values: dict[str, Any]) -> None:
    """Turn off what needs Transformer Engine or Apex, where leaving it out changes speed only."""
    for key in ("gradient_accumulation_fusion", "persist_layer_norm", "apply_rope_fusion", "masked_softmax_fusion"):
        values[key] = False
    for key, instead in _EXPERTS_WITHOUT_ENGINE.items():
        if values.pop(key, None):
            flag = f"--{key.replace('_', '-')}"
            print_rank_0(f"{flag}: Transformer Engine, which it needs, is not used here: {instead}")


_EXPERTS_WITHOUT_ENGINE = {
    "moe_grouped_gemm": "the experts of a rank run one after another",
    "moe_permute_fusion": "tokens are sorted by expert in several steps",
}


def _shapes(blueprint: Blueprint) -> dict[str, Any]:
    text, layer = blueprint.text, blueprint.decoder.layers[0]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    values: dict[str, Any] = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": head,
        "normalization": "RMSNorm",
        "layernorm_epsilon": text.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": _activation(text.hidden_act),
        "add_bias_linear": False,
        "add_qkv_bias": layer.self_attn.q_proj.bias is not None,
        "qk_layernorm": hasattr(layer.self_attn, "q_norm"),
        "init_method_std": text.initializer_range,
        "attention_dropout": float(text.attention_dropout or 0.0),
    }
    if any(blueprint.has_experts):
        values.update(
            num_moe_experts=text.num_experts,
            moe_ffn_hidden_size=text.moe_intermediate_size,
            moe_router_topk=text.num_experts_per_tok,
            moe_layer_freq=[int(experts) for experts in blueprint.has_experts],
            # Softmax over all experts before the choice leaves weights that do not add up to one.
            moe_router_pre_softmax=not getattr(text, "norm_topk_prob", True),
        )
    return values


def _activation(name: str) -> Any:
    if name not in _ACTIVATIONS:
        raise UserError(
            f"text_decoder: activation '{name}' is not known to pretrain_vlm.py; it knows {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]


def _text_decoder_keys(text: TextDecoder) -> dict[str, Any]:
    values = {key: getattr(text, key) for key in SAME_NAME if getattr(text, key) is not None}
    if text.use_fused_rotary_pos_emb is not None:
        values["apply_rope_fusion"] = text.use_fused_rotary_pos_emb
    dtype = text.params_dtype or ("bf16" if text.bf16 else "fp16" if text.fp16 else None)
    if dtype is not None:
        values.update(params_dtype=_DTYPES[dtype], bf16=dtype == "bf16", fp16=dtype == "fp16")
    return values


def _parallel_sizes() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
