"""Shapes written in model.json: enough to build a model, checked against a folder, and never silently ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.blueprint import check_decoder, read_blueprint
from mindspeed_mm.models.megatron.idle import idle_keys
from mindspeed_mm.models.megatron.shapes import read_hf_config
from mindspeed_mm.models.megatron.stages import layers_of_chunks
from mindspeed_mm.models.vlm_model import VLMModel
from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

TEXT = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "normalization": "RMSNorm",
    "untie_embeddings_and_output_weights": True,
}
VISION = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
IDS = {"img_context_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302}
WRITTEN: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        **IDS,
        "model_id": "qwen2_5vl",
        "image_encoder": {
            "vision_encoder": {**VISION, "window_attn_size": 16, "fullatt_block_indexes": [1], "model_id": "qwen2vit"}
        },
        "text_decoder": {
            **TEXT,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            "position_embedding_type": "mrope",
            "add_qkv_bias": True,
            "attention_softmax_in_fp32": True,
        },
    },
    "qwen3_vl_moe": {
        **IDS,
        "model_id": "qwen3vl_moe",
        "image_encoder": {"vision_encoder": {**VISION, "deepstack_visual_indexes": [0]}},
        "text_decoder": {
            **TEXT,
            "kv_channels": 8,
            "mrope_section": [2, 1, 1],
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_intermediate_size": 24,
            "qk_layernorm": True,
        },
    },
    "internvl": {
        "model_id": "InternVL3",
        "img_context_token_id": 300,
        "image_encoder": {
            "vision_encoder": {
                "num_layers": 2,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
            }
        },
        "text_decoder": {**TEXT, "kv_channels": 8, "qk_layernorm": True},
    },
}


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    model_json = ModelConfig.model_validate(config)
    return {name: tuple(p.shape) for name, p in read_blueprint(model_json).model.named_parameters()}


@pytest.mark.parametrize("family", WRITTEN)
def test_shapes_alone_give_the_same_model(tmp_path: Path, family: str) -> None:
    config = tiny.tiny_config(family)
    config.vision_config.num_position_embeddings = 2304  # no key of model.json
    config.save_pretrained(tmp_path)
    assert shapes(WRITTEN[family]) == shapes({"init_from_hf_path": str(tmp_path)})
    made, there = (
        read_hf_config(ModelConfig.model_validate(c)) for c in (WRITTEN[family], {"init_from_hf_path": str(tmp_path)})
    )
    ours, theirs = made.get_text_config(), there.get_text_config()
    assert made.image_token_id == there.image_token_id == 300
    for key in ("rope_theta", "mrope_section"):
        assert ours.rope_parameters.get(key) == theirs.rope_parameters.get(key)


def test_qwen2_vl_has_other_names_for_the_widths_of_its_tower(tmp_path: Path) -> None:
    written = json.loads(json.dumps(WRITTEN["qwen2_5_vl"]))
    tower = {key: value for key, value in VISION.items() if key != "hidden_size"} | {"hidden_size": 16}
    written |= {"model_id": "qwen2vl", "image_encoder": {"vision_encoder": tower}}
    theirs = transformers.Qwen2VLConfig(
        text_config=tiny.tiny_config("qwen2_5_vl").text_config.to_dict() | {"model_type": "qwen2_vl_text"},
        vision_config=dict(
            depth=2, embed_dim=16, hidden_size=32, mlp_ratio=4, num_heads=4, patch_size=4, temporal_patch_size=2
        ),
        architectures=["Qwen2VLForConditionalGeneration"],
        tie_word_embeddings=False,
    )
    theirs.save_pretrained(tmp_path)
    assert shapes(written) == shapes({"init_from_hf_path": str(tmp_path)})
    there = {key: value for key, value in written.items() if key not in IDS}
    assert read_hf_config(ModelConfig.model_validate({**there, "init_from_hf_path": str(tmp_path)}))


def test_what_a_tower_gives_is_read_and_compared(tmp_path: Path) -> None:
    written = json.loads(json.dumps(WRITTEN["internvl"]))
    written["image_encoder"]["vision_encoder"] |= {"downsample_ratio": 0.25, "select_layer": -2}
    made = read_hf_config(ModelConfig.model_validate(written))
    assert (made.downsample_ratio, made.vision_feature_layer) == (0.25, -2)
    tiny.tiny_config("internvl").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"downsample_ratio is 0.25.*there is 0.5(\n|.)*select_layer is -2"):
        read_hf_config(ModelConfig.model_validate({**written, "init_from_hf_path": str(tmp_path)}))
    with pytest.raises(UserError, match="ps_version is v1"):
        read_hf_config(ModelConfig.model_validate({**WRITTEN["internvl"], "ps_version": "v1"}))


def test_keys_that_nobody_reads_are_known() -> None:
    assert idle_keys(ModelConfig.model_validate(WRITTEN["internvl"])) == []
    tower = {"num_layers": 2, "drop_path_rate": 0.1, "pipeline_num_layers": [1, 1], "downsample_ratio": 0.5}
    encoder = {"vision_encoder": tower, "vision_projector": {"freeze": True, "num_layers": 2}, "tp": 1}
    written = {"image_encoder": encoder, "audio_encoder": {"audio_encoder": {"freeze": True}}, "text_encoder": None}
    assert idle_keys(ModelConfig.model_validate(written)) == [
        "audio_encoder",
        "image_encoder.tp",
        "image_encoder.vision_encoder.drop_path_rate",
        "image_encoder.vision_encoder.pipeline_num_layers",
        "image_encoder.vision_projector.num_layers",
    ]


def build_from_shapes(config: dict[str, Any]) -> int:
    vlm.start()
    return sum(p.numel() for p in VLMModel(ModelConfig.model_validate(config)).parameters())


def test_a_model_without_a_folder_is_built(ranks1: RankPool) -> None:
    (count,) = ranks1.run(build_from_shapes, WRITTEN["qwen3_vl_moe"])
    assert count > 10_000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text_decoder": {"num_layers": 3}}, ["text_decoder.num_layers is 3", "num_hidden_layers there is 2"]),
        (
            {"text_decoder": {"ffn_hidden_size": 65}},
            ["text_decoder.ffn_hidden_size is 65", "intermediate_size there is 64"],
        ),
        (
            {"text_decoder": {"rotary_base": 5e5}},
            ["text_decoder.rotary_base is 500000.0", "rope_theta there is 10000.0"],
        ),
        ({"text_decoder": {"untie_embeddings_and_output_weights": False}}, ["tie_word_embeddings there is False"]),
        (
            {"image_encoder": {"vision_encoder": {"num_layers": 4}}},
            ["image_encoder.vision_encoder.num_layers is 4", "depth there is 2"],
        ),
        ({"img_context_token_id": 7}, ["img_context_token_id is 7", "image_token_id there is 300"]),
    ],
)
def test_a_contradiction_names_both(tmp_path: Path, change: dict[str, Any], told: list[str]) -> None:
    tiny.tiny_config("qwen2_5_vl").save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        read_hf_config(ModelConfig.model_validate({"init_from_hf_path": str(tmp_path), **change}))
    assert all(part in str(error.value) for part in [*told, str(tmp_path)])


def test_what_agrees_or_fits_anyway_is_accepted(tmp_path: Path) -> None:
    tiny.tiny_config("qwen2_5_vl").save_pretrained(tmp_path)
    written = json.loads(json.dumps(WRITTEN["qwen2_5_vl"]))
    written["text_decoder"]["max_position_embeddings"] = 128
    assert read_hf_config(ModelConfig.model_validate({**written, "init_from_hf_path": str(tmp_path)}))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_id": "qwen2_5_vl"}, ["text_decoder.num_layers", "text_decoder.vocab_size", "init_from_hf_path"]),
        ({"model_id": "deepseekvl2"}, ["'deepseekvl2'", "qwen3_vl_moe"]),
        (
            {**WRITTEN["internvl"], "text_decoder": {**TEXT, "rope_scaling": {"type": "yarn", "factor": 4}}},
            ["'yarn'", "init_from_hf_path"],
        ),
        ({"init_from_hf_path": "/no/such/folder"}, ["init_from_hf_path", "/no/such/folder"]),
    ],
)
def test_too_little_is_an_error(config: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(UserError) as error:
        read_hf_config(ModelConfig.model_validate(config))
    assert all(part in str(error.value) for part in told)


def test_a_decoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    tiny.tiny_config("glm4v").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'glm4v_text'.*pretrain_transformers"):
        read_blueprint(ModelConfig(init_from_hf_path=str(tmp_path)))


def test_windows_of_mistral_are_refused(tmp_path: Path) -> None:
    config = transformers.MistralConfig(sliding_window=8, architectures=["MistralForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'mistral' has sliding windows.*pretrain_transformers"):
        read_blueprint(ModelConfig(init_from_hf_path=str(tmp_path)))
    config.sliding_window = None
    check_decoder(config)


def refusal(folder: str, sizes: dict[str, int], model_json: dict[str, Any]) -> str:
    vlm.start(**sizes)
    try:
        vlm.build(folder, **model_json)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("family", "sizes", "model_json", "told"),
    [
        ("qwen3_vl", {"pipeline": 2}, {"text_decoder": {"pipeline_num_layers": [0, 2]}}, ["first 1 layers", "holds 0"]),
        (
            "qwen2_5_vl",
            {"pipeline": 2},
            {"text_decoder": {"pipeline_num_layers": [1, 2]}},
            ["3 layers in all", "has 2"],
        ),
        ("qwen3_vl_moe", {"tensor": 2}, {}, ["--tensor-model-parallel-size 2", "--sequence-parallel"]),
        ("qwen2_5_vl", {}, {"megatron": {"moe_ruoter_dtype": "fp32"}}, ["moe_ruoter_dtype", "'moe_router_dtype'"]),
        ("qwen2_5_vl", {}, {"text_decoder": {"add_qkv_bias": False}}, ["add_qkv_bias is False, not True"]),
        ("qwen2_5_vl", {}, {"text_decoder": {"num_moe_experts": 8}}, ["num_moe_experts is 8, not None"]),
        ("internvl", {}, {"text_decoder": {"position_embedding_type": "mrope"}}, ["is mrope, not rope"]),
        ("qwen2_5_vl", {}, {"loss_cfg": {"router_aux_loss_coef": 0.1}}, ["router_aux_loss_coef", "has no experts"]),
        ("qwen2_5_vl", {}, {"megatron": {"num_layers": 1}}, ["megatron.num_layers", "Remove the key"]),
        ("qwen2_5_vl", {}, {"text_decoder": {"fp16": True}}, ["text_decoder.fp16", "loss scaling", "bf16"]),
        (
            "qwen2_5_vl",
            {},
            {"text_decoder": {"bf16": True}, "megatron": {"fp32_residual_connection": True}},
            ["megatron.fp32_residual_connection", "Remove the key".lower()],
        ),
    ],
)
def test_a_layout_that_does_not_fit(
    ranks2: RankPool,
    tmp_path: Path,
    family: str,
    sizes: dict[str, int],
    model_json: dict[str, Any],
    told: list[str],
) -> None:
    tiny.save_tiny(family, tmp_path)
    one, other = ranks2.run(refusal, str(tmp_path), sizes, model_json)
    assert one == other
    assert all(part in one for part in told), one


def test_layers_of_chunks() -> None:
    assert layers_of_chunks(4, 2) == [[range(0, 2)], [range(2, 4)]]
    assert layers_of_chunks(4, 2, 2) == [[range(0, 1), range(2, 3)], [range(1, 2), range(3, 4)]]
    assert layers_of_chunks(5, 2, 1, [5, 0]) == [[range(0, 5)], [range(5, 5)]]
    assert layers_of_chunks(5, 2, 2, [[2, 1], [1, 1]]) == [[range(0, 2), range(3, 4)], [range(2, 3), range(4, 5)]]
    with pytest.raises(UserError, match=r"5 layers.*2 pipeline stages"):
        layers_of_chunks(5, 2)
    for written in ([5], []):
        with pytest.raises(UserError, match="a list of 2 numbers"):
            layers_of_chunks(5, 2, 1, written)


@pytest.mark.parametrize(
    ("model_json", "frozen"),
    [
        ({}, {"encoder": True, "merger": False, "text": False}),
        ({"image_encoder": {"vision_encoder": {"freeze": False}}}, {"encoder": False, "merger": False, "text": False}),
        (
            {"image_encoder": {"vision_projector": {"freeze": True}}, "text_decoder": {"freeze": True}},
            {"encoder": True, "merger": True, "text": True},
        ),
    ],
)
def test_freezing(ranks1: RankPool, tmp_path: Path, model_json: dict[str, Any], frozen: dict[str, bool]) -> None:
    tiny.tiny_config("qwen3_vl").save_pretrained(tmp_path)
    (found,) = ranks1.run(frozen_parts, str(tmp_path), model_json)
    assert found == frozen


def frozen_parts(folder: str, model_json: dict[str, Any]) -> dict[str, bool]:
    vlm.start()
    model = VLMModel(ModelConfig.model_validate({"init_from_hf_path": folder, **model_json}))
    parts: dict[str, set[bool]] = {"encoder": set(), "merger": set(), "text": set()}
    for name, parameter in model.named_parameters():
        part = "text" if name.startswith("text_decoder") else "merger" if "merger" in name else "encoder"
        parts[part].add(not parameter.requires_grad)
    return {part: only for part, (only,) in parts.items()}
