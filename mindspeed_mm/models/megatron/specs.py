"""Which modules the decoder's layers are made of: Transformer Engine's where it runs, else megatron-core's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspeed_mm.models.megatron.attention import CoreAttention
from mindspeed_mm.models.megatron.norm import Norm


def decoder_spec(config: Any, has_experts: Sequence[bool], transformer_engine: bool) -> Any:
    """Return the specification of one pipeline chunk's layers and of the norm behind the last.

    Args:
        config: megatron-core's ``TransformerConfig``.
        has_experts: for each layer of the chunk whether its MLP is a mixture of experts.
        transformer_engine: whether to use Transformer Engine's modules.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    build = _engine_layer if transformer_engine else _local_layer
    return TransformerBlockSubmodules(
        layer_specs=[build(config, experts) for experts in has_experts], layer_norm=_final_norm(transformer_engine)
    )


def _local_layer(config: Any, experts: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    # Its norms refuse sequence parallelism, its attention holds s x s scores and refuses packed sequences.
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention.core_attention = CoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return layer


def _engine_layer(config: Any, experts: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )


def _final_norm(transformer_engine: bool) -> Any:
    if not transformer_engine:
        return Norm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
