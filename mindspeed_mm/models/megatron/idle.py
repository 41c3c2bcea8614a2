"""Which keys of model.json decide nothing when ``VLMModel`` is built, so that nobody relies on them."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.models.common.lookup import lookup
from mindspeed_mm.models.megatron.shapes import MODEL_KEYS, VISION_KEYS

_READ = {
    "": {
        *("model_id", "init_from_hf_path", "random_init", "load_strict", "trust_remote_code", "freeze", "loss_cfg"),
        *("image_encoder", "text_decoder", "pre_process", "post_process", "enable_encoder_dp", "megatron", "custom"),
        *("ps_version", "patch"),
    },
    "image_encoder": {"vision_encoder", "vision_projector"},
    "image_encoder.vision_encoder": {
        *VISION_KEYS,
        *("model_id", "freeze", "attn_implementation", "attn_layout", "ps_version"),
    },
    "image_encoder.vision_projector": {"model_id", "freeze"},
}


def idle_keys(config: ModelConfig) -> list[str]:
    """Return the paths of what is written and read by nobody; ``text_decoder`` has a list of its own."""
    found = []
    for path, read in _READ.items():
        owner: Any = lookup(config, path) if path else config
        for key in sorted(owner.model_fields_set - read) if owner is not None else ():
            where = f"{path}.{key}" if path else key
            if getattr(owner, key) is not None and where not in MODEL_KEYS:
                found.append(where)
    return found
