"""What ``text_decoder`` of model.json says beside sizes, checked against the model it names."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.configs.towers import TextDecoder
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.blueprint import Blueprint


def check_structure(text: TextDecoder, shapes: dict[str, Any], blueprint: Blueprint) -> set[str]:
    """Refuse a model.json that describes other layers than the Hugging Face model has.

    Args:
        text: ``text_decoder`` of model.json.
        shapes: fields of ``TransformerConfig`` that the model and the parallel layout decide.
        blueprint: the model.

    Returns:
        The keys that it knows.

    Raises:
        UserError: it names every key that is wrong.
    """
    known = _known(shapes, blueprint)
    wrong = [
        f"text_decoder.{key} is {written}, not {value}"
        for key, value in known.items()
        if (written := getattr(text, key)) is not None and written != value
    ]
    if wrong:
        raise UserError(
            f"model.json contradicts {type(blueprint.model).__name__} in its layout of this run: {'; '.join(wrong)}. "
            f"Remove or correct these keys."
        )
    return set(known)


def _known(shapes: dict[str, Any], blueprint: Blueprint) -> dict[str, Any]:
    known = {
        "kv_channels": shapes["kv_channels"],
        "normalization": shapes["normalization"],
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "disable_bias_linear": True,
        "layernorm_zero_centered_gamma": False,
        "add_qkv_bias": shapes["add_qkv_bias"],
        "attention_bias": shapes["add_qkv_bias"],
        "qk_layernorm": shapes["qk_layernorm"],
        "use_qk_norm": shapes["qk_layernorm"],
        "position_embedding_type": "mrope" if blueprint.text.rope_parameters.get("mrope_section") else "rope",
        "attention_mask_type": "causal",
        "context_parallel_size": shapes["context_parallel_size"],
        "num_moe_experts": shapes.get("num_moe_experts"),
        "n_shared_experts": 0,
    }
    if any(blueprint.has_experts):
        known.update(
            first_k_dense_replace=blueprint.has_experts.index(True),
            moe_router_score_function="softmax",
            moe_router_enable_expert_bias=False,
            moe_router_pre_softmax=shapes["moe_router_pre_softmax"],
        )
    return known
