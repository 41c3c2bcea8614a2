"""The attention implementation that model.json asks for, or the next best one on this machine."""

from __future__ import annotations

from typing import Any

from mindspeed_mm import accelerator
from mindspeed_mm.distributed.state import print_rank_0
from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.models.common.lookup import lookup

# Published configs name the NPU's variable-length kernel; in HF it is part of flash attention.
_FLASH = {"flash_attention_2": "flash_attention_2", "varlen_fa": "flash_attention_2"}


def attention_implementation(config: Any, transformer_config: Any) -> dict[str, str] | str | None:
    """Return what HF takes as ``attn_implementation``: one name, or one for each sub-config.

    ``attn_implementation`` of ``image_encoder.vision_encoder`` and ``text_decoder`` in model.json is read; where
    it is left out, HF decides. ``attn_layout`` is accepted beside it and has nothing to decide: HF's kernels fix
    their own layout.

    Args:
        config: model.json.
        transformer_config: the HF config.

    Raises:
        UserError: an implementation that HF does not know.
    """
    text = _choose(config, "text_decoder.attn_implementation")
    parts = {"": text, "text_config": text}
    parts["vision_config"] = _choose(config, "image_encoder.vision_encoder.attn_implementation")
    if not getattr(transformer_config, "sub_configs", None):
        return text
    return {part: name for part, name in parts.items() if name}


def _choose(config: Any, key: str) -> str | None:
    from transformers import AttentionInterface

    asked = lookup(config, key)
    if asked is None:
        return None
    name = _FLASH.get(asked, asked)
    if name == "flash_attention_2" and not _can_run_flash():
        print_rank_0(f"model.json: {key}: {asked} cannot run here (device or package), using sdpa")
        return "sdpa"
    known = ["eager", *AttentionInterface().valid_keys()]
    if name not in known:
        names = sorted({*known, *_FLASH})
        raise UserError(
            f"model.json: {key}: '{asked}' is not known.{did_you_mean(asked, names)} Use {', '.join(names)}."
        )
    return name


def _can_run_flash() -> bool:
    from transformers.modeling_flash_attention_utils import is_flash_attn_available

    return not accelerator.is_cpu() and is_flash_attn_available()
