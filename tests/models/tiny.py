"""Eight Hugging Face model families small enough to build, train and save in a fraction of a second.

    config = tiny_config("qwen3_vl")               # a transformers config, 2 layers, hidden size 32, vocabulary 320
    model = tiny_model("qwen3_vl")                 # random weights, the same for the same seed
    save_tiny("qwen3_vl", tmp_path)                # an HF folder: config.json and model.safetensors, nothing else
    batch = tiny_batch("qwen3_vl", images=[1, 0])  # two samples, the first with an image

Expert matrices are not square, so that a transposed one cannot go unnoticed. Token ids from 300 on are the
special ones; 300 is the image placeholder of every family.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VISION_FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "internvl", "glm4v", "glm4v_moe")
FAMILIES = (*VISION_FAMILIES, "qwen3")
IMAGE_TOKEN, VIDEO_TOKEN = 300, 301

_TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=512,
    eos_token_id=1,
    bos_token_id=1,
    pad_token_id=0,
)
_VISION = dict(
    depth=2, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32, patch_size=4, temporal_patch_size=2
)
_QWEN_IDS = dict(image_token_id=IMAGE_TOKEN, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)
_GLM_IDS = dict(
    image_token_id=IMAGE_TOKEN,
    video_token_id=301,
    image_start_token_id=302,
    image_end_token_id=303,
    video_start_token_id=304,
    video_end_token_id=305,
)


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, **more}


def _qwen3_vl(tie: bool) -> Any:
    return transformers.Qwen3VLConfig(
        text_config=dict(_TEXT, head_dim=8, rope_parameters=_rope(mrope_interleaved=True), tie_word_embeddings=tie),
        vision_config=dict(_VISION, num_position_embeddings=64, deepstack_visual_indexes=[0]),
        tie_word_embeddings=tie,
        **_QWEN_IDS,
    )


def _qwen3_vl_moe(tie: bool) -> Any:
    experts = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1)
    text = dict(_TEXT, head_dim=8, rope_parameters=_rope(mrope_interleaved=True), tie_word_embeddings=tie, **experts)
    return transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config=dict(_VISION, num_position_embeddings=64, deepstack_visual_indexes=[0]),
        tie_word_embeddings=tie,
        **_QWEN_IDS,
    )


def _qwen2_5_vl(tie: bool) -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config=dict(_TEXT, rope_parameters=_rope(), tie_word_embeddings=tie),
        vision_config=dict(_VISION, window_size=16, fullatt_block_indexes=[1]),
        tie_word_embeddings=tie,
        **_QWEN_IDS,
    )


def _internvl(tie: bool) -> Any:
    return transformers.InternVLConfig(
        text_config=transformers.Qwen3Config(**_TEXT, head_dim=8, tie_word_embeddings=tie),
        vision_config=dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=[16, 16],
            patch_size=[4, 4],
        ),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=tie,
    )


def _llava(tie: bool) -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT, tie_word_embeddings=tie),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=tie,
    )


def _gemma3(tie: bool) -> Any:
    return transformers.Gemma3Config(
        text_config=dict(_TEXT, head_dim=8, sliding_window=8, tie_word_embeddings=tie),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            vision_use_head=False,
        ),
        image_token_index=IMAGE_TOKEN,
        mm_tokens_per_image=4,
        tie_word_embeddings=tie,
    )


def _glm4v(tie: bool) -> Any:
    return transformers.Glm4vConfig(
        text_config=dict(_TEXT, rope_parameters=_rope(partial_rotary_factor=1.0), tie_word_embeddings=tie),
        vision_config=dict(_VISION, image_size=32),
        tie_word_embeddings=tie,
        **_GLM_IDS,
    )


def _glm4v_moe(tie: bool) -> Any:
    experts = dict(moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
    rope = _rope(mrope_section=[1, 1, 0], partial_rotary_factor=0.5)
    return transformers.Glm4vMoeConfig(
        text_config=dict(_TEXT, rope_parameters=rope, tie_word_embeddings=tie, **experts),
        vision_config=dict(_VISION, image_size=32),
        tie_word_embeddings=tie,
        **_GLM_IDS,
    )


def _qwen2_audio(tie: bool) -> Any:
    audio = dict(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=8)
    return transformers.Qwen2AudioConfig(
        text_config=transformers.Qwen2Config(**_TEXT, tie_word_embeddings=tie),
        audio_config=dict(audio, model_type="qwen2_audio_encoder", max_source_positions=50),
        audio_token_index=IMAGE_TOKEN,
        tie_word_embeddings=tie,
    )


def _qwen3(tie: bool) -> Any:
    return transformers.Qwen3Config(**_TEXT, head_dim=8, tie_word_embeddings=tie)


_CONFIGS = {
    "qwen3_vl": (_qwen3_vl, "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": (_qwen3_vl_moe, "Qwen3VLMoeForConditionalGeneration"),
    "qwen2_5_vl": (_qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration"),
    "internvl": (_internvl, "InternVLForConditionalGeneration"),
    "glm4v": (_glm4v, "Glm4vForConditionalGeneration"),
    "glm4v_moe": (_glm4v_moe, "Glm4vMoeForConditionalGeneration"),
    "qwen2_audio": (_qwen2_audio, "Qwen2AudioForConditionalGeneration"),
    "qwen3": (_qwen3, "Qwen3ForCausalLM"),
    "llava": (_llava, "LlavaForConditionalGeneration"),
    "gemma3": (_gemma3, "Gemma3ForConditionalGeneration"),
}


def tiny_config(family: str, tie: bool = False) -> Any:
    """Return the config of a tiny model; ``tie`` shares the input and output embeddings."""
    build, architecture = _CONFIGS[family]
    config = build(tie)
    config.architectures = [architecture]
    return config


def tiny_model(family: str, tie: bool = False, seed: int = 0, layers: int | None = None) -> Any:
    """Return the unmodified HF model in fp32, in training mode, with random weights; ``layers`` of the text decoder."""
    config = tiny_config(family, tie)
    if layers:
        config.get_text_config().num_hidden_layers = layers
        if getattr(config.get_text_config(), "layer_types", None):
            config.get_text_config().layer_types = ["full_attention"] * layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32).train()


def save_tiny(family: str, folder: Path | str, tie: bool = False, seed: int = 0, layers: int | None = None) -> Path:
    """Write the config and the weights of :func:`tiny_model` as an HF folder, without tokenizer and processor."""
    tiny_model(family, tie, seed, layers).save_pretrained(folder)
    return Path(folder)


_WHOLE_PICTURES = ("internvl", "llava", "gemma3")  # others take patches


def tiny_batch(
    family: str, images: list[int], length: int = 14, seed: int = 0, videos: list[int] | None = None
) -> dict[str, Tensor]:
    """Return a training batch.

    Args:
        family: one of ``FAMILIES``, ``llava`` or ``gemma3``; a text family takes no images.
        images: number of images of each sample. Each image is 4 placeholder tokens.
        length: tokens of each sample.
        seed: of the random tokens and pixels.
        videos: number of videos of each sample, of 4 placeholder tokens each; not for InternVL, whose videos are
            images to the model, nor for LLaVA and Gemma.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (B, S), and if there are images ``pixel_values`` and what
        the family wants with them, and likewise for videos. A quarter of the labels and all positions of images and
        videos are -100; nothing is padded.
    """
    videos = videos or [0] * len(images)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, 299, (len(images), length), generator=generator)
    for row, pictures, films in zip(input_ids, images, videos, strict=True):
        for i in range(pictures + films):
            row[1 + 5 * i : 5 + 5 * i] = IMAGE_TOKEN if i < pictures else VIDEO_TOKEN
    ignored = (
        (input_ids == IMAGE_TOKEN)
        | (input_ids == VIDEO_TOKEN)
        | (torch.rand(input_ids.shape, generator=generator) < 0.25)
    )
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(ignored, -100),
    }
    types = (input_ids == IMAGE_TOKEN).int() + 2 * (input_ids == VIDEO_TOKEN).int()
    if family == "gemma3":
        batch["token_type_ids"] = types
    if family in _WHOLE_PICTURES and sum(images):
        batch["pixel_values"] = torch.randn(sum(images), 3, 16, 16, generator=generator)
    for number, pixels, grid in (
        (sum(images), "pixel_values", "image_grid_thw"),
        (sum(videos), "pixel_values_videos", "video_grid_thw"),
    ):
        if number and family not in _WHOLE_PICTURES:
            batch[pixels] = torch.randn(number * 16, 3 * 2 * 4 * 4, generator=generator)
            batch[grid] = torch.tensor([[1, 4, 4]]).repeat(number, 1)
            batch["mm_token_type_ids"] = types
    return batch
