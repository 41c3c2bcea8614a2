"""The subtrees of model.json that shape an encoder, a projector or a decoder.

``pretrain_vlm.py`` builds its towers from these keys; null means the default of the tower. A Hugging Face model brings
its own shapes: there only ``freeze`` and the attention keys count, and the shapes are accepted because published files
carry them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mindspeed_mm.configs.base import Config, Count, FreeForm, Positive
from mindspeed_mm.configs.fsdp2 import DtypeName

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Tower(Config):
    """Keys that every tower has."""

    model_id: str | None = None  # which class builds it
    freeze: bool | None = None  # true: not trained; null: what the entry script does by default

    # Shape.
    num_layers: Count | None = None  # transformer layers
    pipeline_num_layers: list[Count] | list[list[Count]] | None = None  # layers per pipeline stage [per virtual chunk]
    hidden_size: Positive | None = None  # width
    ffn_hidden_size: Positive | None = None  # width inside the MLP
    intermediate_size: Positive | None = None  # the same, by its Hugging Face name
    num_attention_heads: Positive | None = None  # query heads
    kv_channels: Positive | None = None  # width of a head; null: hidden_size / num_attention_heads
    max_position_embeddings: Positive | None = None  # longest sequence
    llm_hidden_size: Positive | None = None  # width of the text decoder
    out_hidden_size: Positive | None = None  # width of the output

    # Layers.
    activation_func: str | None = None  # silu, gelu, quick_gelu, gelu_pytorch_tanh
    hidden_act: str | None = None  # the same, by its Hugging Face name
    gated_linear_unit: bool | None = None  # SwiGLU and the like
    add_bias_linear: bool | None = None  # biases in linear layers
    disable_bias_linear: bool | None = None  # the opposite
    add_qkv_bias: bool | None = None  # bias in the query, key and value projection
    attention_bias: bool | None = None  # the same, by its Hugging Face name
    normalization: Literal["LayerNorm", "RMSNorm"] | None = None
    layernorm_epsilon: float | None = None
    rms_norm_eps: float | None = None  # the same, by its Hugging Face name
    layernorm_zero_centered_gamma: bool | None = None  # norm weights are stored minus one
    persist_layer_norm: bool | None = None  # fused norm kernel
    memory_efficient_layer_norm: bool | None = None
    post_layer_norm: bool | None = None  # a norm after the last layer
    qk_layernorm: bool | None = None  # norm queries and keys
    use_qk_norm: bool | None = None  # the same, older name
    hidden_dropout: Probability | None = None
    attention_dropout: Probability | None = None
    init_method_std: float | None = None  # spread of random initial weights
    initializer_factor: float | None = None

    # Number formats.
    params_dtype: DtypeName | None = None
    bf16: bool | None = None
    fp16: bool | None = None
    attention_softmax_in_fp32: bool | None = None
    apply_query_key_layer_scaling: bool | None = None

    # Attention.
    attn_implementation: str | None = None  # flash_attention_2, sdpa, eager, varlen_fa; null: the model's default
    attn_layout: Literal["BNSD", "BSND", "SBH", "TND"] | None = None  # order of batch, heads, sequence, width
    attention_mask_type: Literal["causal", "general"] | None = None
    is_causal: bool | None = None  # the mask is causal and need not be built

    # Fused kernels.
    bias_activation_fusion: bool | None = None
    bias_dropout_fusion: bool | None = None
    masked_softmax_fusion: bool | None = None
    apply_rope_fusion: bool | None = None
    use_fused_rotary_pos_emb: bool | None = None
    use_te: bool | None = None  # TransformerEngine layers

    # Memory and parallelism.
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: Count | None = None
    activation_offload: bool | None = None  # activations wait in host memory for backward
    synchronize_per_layer: bool | None = None  # wait for the device after every layer
    sequence_parallel: bool | None = None
    context_parallel_size: Positive | None = None


class VisionEncoder(Tower):
    """``image_encoder.vision_encoder``."""

    # Input.
    image_size: Positive | None = None  # side of an image in pixels
    patch_size: Positive | None = None  # side of a patch in pixels
    temporal_patch_size: Positive | None = None  # frames of a patch
    spatial_merge_size: Positive | None = None  # side, in patches, of the square that becomes one token
    in_channels: Positive | None = None  # colours
    num_channels: Positive | None = None  # the same, by its Hugging Face name
    add_bias_conv: bool | None = None  # bias in the patch embedding
    tokens_per_second: Positive | None = None  # positions per second of video

    # Layers.
    window_attn_size: Positive | None = None  # side of an attention window in pixels
    fullatt_block_indexes: list[Count] | None = None  # layers without windows
    deepstack_visual_indexes: list[Count] | None = None  # layers whose output also enters the decoder
    drop_path_rate: Probability | None = None  # chance that a layer is skipped
    q_layernorm: str | None = None  # kind of norm on queries
    k_layernorm: str | None = None  # ... on keys
    pre_tockens: Count | None = None  # tokens before its own that a token sees; spelt so in published files
    next_tockens: Count | None = None  # ... after its own

    # Output.
    select_layer: int | None = None  # layer whose output is used; -1: the last
    downsample_ratio: float | None = None  # side of the token grid over the side of the patch grid
    ps_version: Literal["v1", "v2"] | None = None  # order of axes in the pixel shuffle
    output_hidden_states: bool | None = None
    use_return_dict: bool | None = None
    canonical_model: bool | None = None  # separate query, key and value weights, as in Hugging Face
    model_name: str | None = None  # published name of the weights (SigLIP)


class VisionProjector(Tower):
    """``image_encoder.vision_projector``."""

    input_size: Positive | None = None  # width of its input
    vit_hidden_size: Positive | None = None  # the same, InternVL's name
    downsample_ratio: float | None = None  # as in the vision encoder
    use_postshuffle_norm: bool | None = None  # norm after the patches are merged, not before


class AudioEncoder(Tower):
    """``audio_encoder.audio_encoder``."""

    num_mel_bins: Positive | None = None  # rows of the spectrogram
    max_source_positions: Positive | None = None  # longest input in frames
    n_window: Positive | None = None  # half the frames encoded together
    output_dim: Positive | None = None  # width of the output


class TextDecoder(Tower):
    """``text_decoder``."""

    # Vocabulary and output.
    vocab_size: Positive | None = None
    untie_embeddings_and_output_weights: bool | None = None
    parallel_output: bool | None = None  # logits stay split over tensor-parallel ranks
    fp16_lm_cross_entropy: bool | None = None
    seq_length: Positive | None = None
    variable_seq_lengths: bool | None = None
    use_remove_padding: bool | None = None
    reset_attention_mask: bool | None = None

    # Attention.
    group_query_attention: bool | None = None
    num_query_groups: Positive | None = None  # key and value heads
    num_key_value_heads: Positive | None = None  # the same, by its Hugging Face name
    position_embedding_type: Literal["rope", "mrope", "learned_absolute", "none"] | None = None
    rope_theta: float | None = None  # base of the rotary frequencies
    rotary_base: float | None = None  # the same, Megatron's name
    rotary_percent: Probability | None = None  # share of a head that is rotated
    partial_rotary_factor: Probability | None = None  # the same, by its Hugging Face name
    mrope_section: list[Count] | None = None  # split of a head over time, height and width
    rope_scaling: FreeForm | None = None  # {"rope_type" or "type": ..., its arguments}

    # Mixture of experts.
    num_moe_experts: Positive | None = None
    moe_intermediate_size: Positive | None = None  # width inside an expert
    n_shared_experts: Count | None = None  # experts that see every token
    first_k_dense_replace: Count | None = None  # first layers, which have no experts
    moe_layer_freq: Positive | None = None  # every n-th layer has experts
    moe_router_topk: Positive | None = None  # experts that see a token
    moe_router_load_balancing_type: str | None = None
    moe_router_score_function: Literal["softmax", "sigmoid"] | None = None
    moe_router_enable_expert_bias: bool | None = None
    moe_router_pre_softmax: bool | None = None  # softmax over all experts, before the choice
    moe_aux_loss_coeff: float | None = None
    moe_grouped_gemm: bool | None = None
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] | None = None
    n_group: Positive | None = None  # groups of experts to choose from
    topk_group: Positive | None = None  # groups chosen
    norm_topk_prob: bool | None = None  # weights of the chosen experts sum to one
    routed_scaling_factor: float | None = None
    router_gating_in_fp32: bool | None = None
    use_npu_fused_moe: bool | None = None  # Ascend's fused expert kernels
