"""The shapes of model.json and those of Hugging Face: one set of numbers under two sets of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.lookup import lookup

# Keys of model.json, below the tower they describe, to the attribute of the Hugging Face configuration. The first
# name of a group that is written counts.
_TEXT: dict[tuple[str, ...], str] = {
    ("num_layers",): "num_hidden_layers",
    ("hidden_size",): "hidden_size",
    ("ffn_hidden_size", "intermediate_size"): "intermediate_size",
    ("num_attention_heads",): "num_attention_heads",
    ("num_query_groups", "num_key_value_heads"): "num_key_value_heads",
    ("kv_channels",): "head_dim",
    ("vocab_size",): "vocab_size",
    ("max_position_embeddings",): "max_position_embeddings",
    ("rms_norm_eps", "layernorm_epsilon"): "rms_norm_eps",
    ("activation_func", "hidden_act"): "hidden_act",
    ("rope_theta", "rotary_base"): "rope_parameters.rope_theta",
    ("mrope_section", "rope_scaling.mrope_section"): "rope_parameters.mrope_section",
    ("partial_rotary_factor", "rotary_percent"): "rope_parameters.partial_rotary_factor",
    ("num_moe_experts",): "num_experts",
    ("moe_intermediate_size",): "moe_intermediate_size",
    ("moe_router_topk",): "num_experts_per_tok",
    ("norm_topk_prob",): "norm_topk_prob",
}
TEXT_KEYS = {key for keys in _TEXT for key in keys}
_TOWER = "image_encoder.vision_encoder"
# The towers of Qwen-VL, and those of plain ViTs.
_VISION: dict[tuple[str, ...], str] = {
    ("num_layers",): "depth|num_hidden_layers",
    ("hidden_size",): "embed_dim|hidden_size",  # Qwen2-VL calls hidden_size what comes out
    ("ffn_hidden_size", "intermediate_size"): "intermediate_size",
    ("num_attention_heads",): "num_heads|num_attention_heads",
    ("in_channels", "num_channels"): "in_channels|num_channels",
    ("image_size",): "image_size",
    ("patch_size",): "patch_size",
    ("temporal_patch_size",): "temporal_patch_size",
    ("spatial_merge_size",): "spatial_merge_size",
    ("window_attn_size",): "window_size",
    ("fullatt_block_indexes",): "fullatt_block_indexes",
    ("deepstack_visual_indexes",): "deepstack_visual_indexes",
    ("tokens_per_second",): "tokens_per_second",
    ("activation_func", "hidden_act"): "hidden_act",
    ("layernorm_epsilon",): "layer_norm_eps",
    ("use_qk_norm", "qk_layernorm"): "use_qk_norm",
    ("llm_hidden_size", "out_hidden_size"): "out_hidden_size",
}
_MODEL: dict[tuple[str, ...], str] = {
    ("img_context_token_id",): "image_token_id|image_token_index",
    ("video_token_id",): "video_token_id",
    ("vision_start_token_id",): "vision_start_token_id",
    (f"{_TOWER}.downsample_ratio", "image_encoder.vision_projector.downsample_ratio", "downsample_ratio"): (
        "downsample_ratio"
    ),
    (f"{_TOWER}.select_layer", "select_layer"): "vision_feature_layer",
}
VISION_KEYS = {key for keys in _VISION for key in keys}
MODEL_KEYS = {key for keys in _MODEL for key in keys}
# What has to be there where no Hugging Face folder is.
_REQUIRED_TEXT = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
_REQUIRED_VISION = ("num_layers", "hidden_size", "num_attention_heads")
# A longer or shorter longest sequence fits the same weights.
_ANY_VALUE = ("max_position_embeddings",)
# Families by the letters and digits of model_id; the longest that it starts with counts.
_FAMILIES = {
    "qwen2vl": "qwen2_vl",
    "qwen25vl": "qwen2_5_vl",
    "qwen3vl": "qwen3_vl",
    "qwen3vlmoe": "qwen3_vl_moe",
    "internvl": "internvl",
    "llava": "llava",
}


def read_hf_config(config: ModelConfig) -> Any:
    """Return the Hugging Face configuration of the model that model.json describes.

    It is that of ``init_from_hf_path``, and what model.json says of shapes has to agree with it; or else it is made
    from these shapes for the family that ``model_id`` names.

    Raises:
        UserError: a shape contradicts the folder, or is missing and there is no folder; the family is not known.
    """
    if any(lookup(config, key) == "v1" for key in (f"{_TOWER}.ps_version", "ps_version")):
        raise UserError(
            f"model.json: {_TOWER}.ps_version is v1, the order of an early InternVL's pixel shuffle; Hugging Face's "
            f"models, which are built here, have v2."
        )
    folder = config.init_from_hf_path
    if not folder:
        return _made_from_shapes(config)
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"model.json: init_from_hf_path: {folder} has no config.json; correct the path.")
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"model.json: init_from_hf_path: {folder}/config.json cannot be read: {error}") from error
    problems = _contradictions(config, hf_config)
    if problems:
        raise UserError(
            "\n".join(
                [f"model.json contradicts {folder}/config.json:", *problems, "Remove the keys or correct the path."]
            )
        )
    return hf_config


def _written(tower: Any, keys: tuple[str, ...]) -> tuple[str, Any] | None:
    for key in keys:
        if (value := lookup(tower, key)) is not None:
            return key, value
    return None


def _parts(config: ModelConfig, hf_config: Any) -> list[tuple[str, Any, dict[tuple[str, ...], str], Any]]:
    """Pair the parts of model.json with those of the Hugging Face configuration."""
    encoder = config.image_encoder.vision_encoder if config.image_encoder else None
    return [
        ("text_decoder.", config.text_decoder, _TEXT, hf_config.get_text_config(decoder=True)),
        ("image_encoder.vision_encoder.", encoder, _VISION, getattr(hf_config, "vision_config", None)),
        ("", config, _MODEL, hf_config),
    ]


def _contradictions(config: ModelConfig, hf_config: Any) -> list[str]:
    problems = []
    for prefix, ours, names, theirs in _parts(config, hf_config):
        if ours is None or theirs is None:
            continue
        for keys, attribute in names.items():
            written, (name, known) = _written(ours, keys), _get(theirs, attribute)
            if written is None or known is None or written[0] in _ANY_VALUE:
                continue
            if not _same(written[1], known):
                problems.append(f"  {prefix}{written[0]} is {written[1]}, {name} there is {known}")
    untied = config.text_decoder.untie_embeddings_and_output_weights if config.text_decoder else None
    if untied is not None and untied == bool(hf_config.tie_word_embeddings):
        problems.append(
            f"  text_decoder.untie_embeddings_and_output_weights is {untied}, tie_word_embeddings there is "
            f"{hf_config.tie_word_embeddings}"
        )
    return problems


def _get(hf_config: Any, attribute: str) -> tuple[str, Any]:
    """Return the first of the attributes, separated by |, that is there; a dot leads into a dictionary."""
    for name in attribute.split("|"):
        owner, _, key = name.partition(".")
        value = getattr(hf_config, owner, None)
        if key:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return name, value
    return attribute, None


def _same(written: Any, known: Any) -> bool:
    if isinstance(known, (list, tuple)) and not isinstance(written, (list, tuple)):
        return all(value == written for value in known)  # a square image given by its side
    return list(written) == list(known) if isinstance(written, (list, tuple)) else bool(written == known)


def _made_from_shapes(config: ModelConfig) -> Any:
    import transformers

    family = _family(config)
    text, vision = config.text_decoder, config.image_encoder and config.image_encoder.vision_encoder
    missing = [f"text_decoder.{key}" for key in _REQUIRED_TEXT if not _is_written(text, key, _TEXT)]
    missing += [
        f"image_encoder.vision_encoder.{key}" for key in _REQUIRED_VISION if not _is_written(vision, key, _VISION)
    ]
    if missing:
        raise UserError(
            f"model.json has no init_from_hf_path, and without it lacks {', '.join(missing)}. Write these, or "
            f"set init_from_hf_path to a folder with the model's config.json."
        )
    scaling = dict(config.text_decoder.rope_scaling or {}) if config.text_decoder else {}
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) not in ("default", "mrope"):
        raise UserError(
            f"model.json: text_decoder.rope_scaling of type '{kind}' needs a Hugging Face folder that has it: set "
            f"init_from_hf_path."
        )
    make_config: Callable[..., Any] = transformers.CONFIG_MAPPING[family]
    bare = make_config()
    parts: dict[str, dict[str, Any]] = {"text_decoder.": {}, "image_encoder.vision_encoder.": {}, "": {}}
    for prefix, ours, names, theirs in _parts(config, bare):
        for keys, attribute in names.items():
            if ours is not None and (written := _written(ours, keys)) is not None:
                if not prefix and _get(theirs, attribute)[1] is None:
                    continue  # another family's
                _set(parts[prefix], theirs, attribute, written[1])
    text_values, vision_values, values = parts.values()
    text_values.setdefault("num_key_value_heads", text_values["num_attention_heads"])
    text_values.setdefault("head_dim", text_values["hidden_size"] // text_values["num_attention_heads"])
    if hasattr(bare.vision_config, "out_hidden_size"):
        vision_values["out_hidden_size"] = text_values["hidden_size"]
    if hasattr(bare.vision_config, "embed_dim"):
        vision_values.update(_of_qwen2_vl(vision_values, text_values["hidden_size"]))
    if text is not None and text.untie_embeddings_and_output_weights is not None:
        values["tie_word_embeddings"] = not text.untie_embeddings_and_output_weights
    text_config = text_values if family.startswith("qwen") else _plain_decoder(config)(**text_values)
    return make_config(text_config=text_config, vision_config=vision_values, **values)


def _of_qwen2_vl(vision: dict[str, Any], text_width: int) -> dict[str, int]:
    """Return what the tower of Qwen2-VL calls the width of its output, and has in the place of that of its MLP."""
    width, inner = vision["embed_dim"], vision.pop("intermediate_size", None)
    if inner is None:
        return {"hidden_size": text_width}
    if inner % width:
        raise UserError(
            f"model.json: {_TOWER}.ffn_hidden_size {inner} has to be a multiple of hidden_size {width} in Qwen2-VL."
        )
    return {"hidden_size": text_width, "mlp_ratio": inner // width}


def _is_written(tower: Any, key: str, names: Mapping[tuple[str, ...], str]) -> bool:
    return tower is not None and _written(tower, next(keys for keys in names if key in keys)) is not None


def _set(values: dict[str, Any], theirs: Any, attribute: str, value: Any) -> None:
    known = [name for name in attribute.split("|") if hasattr(theirs, name.partition(".")[0])]
    owner, _, key = (known or [attribute.split("|")[0]])[0].partition(".")
    if key:
        values.setdefault(owner, {"rope_type": "default", "rope_theta": 10000.0})[key] = value
    else:
        values[owner] = value


def _plain_decoder(config: ModelConfig) -> Any:
    """InternVL and LLaVA take any decoder: its norms and biases tell which it is."""
    import transformers

    text: Any = config.text_decoder
    if text.num_moe_experts:
        return transformers.Qwen3MoeConfig
    if text.qk_layernorm or text.use_qk_norm:
        return transformers.Qwen3Config
    return transformers.Qwen2Config if text.add_qkv_bias or text.attention_bias else transformers.LlamaConfig


def _family(config: ModelConfig) -> str:
    letters = "".join(c for c in (config.model_id or "").lower() if c.isalnum())
    found = [name for name in _FAMILIES if letters.startswith(name)]
    if not found:
        raise UserError(
            f"model.json: model_id is '{config.model_id}', which is none of the families that can be built without a "
            f"Hugging Face folder: {', '.join(_FAMILIES.values())}. Set init_from_hf_path, or correct model_id."
        )
    return _FAMILIES[max(found, key=len)]
