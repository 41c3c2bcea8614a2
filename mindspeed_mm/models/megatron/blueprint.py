"""What a Megatron model is built after: a Hugging Face model, looked at without its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.megatron.shapes import read_hf_config

# Decoders that megatron-core's layers compute exactly. Others may have parameters of the same names and yet compute
# something else with them (Granite scales its residuals, say), so that their names prove nothing.
DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
)


@dataclass(frozen=True)
class Blueprint:
    """A Hugging Face model on meta, and where its text decoder is.

    Attributes:
        model: of the class that Transformers has for it; parameters on meta.
        decoder_path: of the module with the layers, ``model.language_model`` or the like.
    """

    model: Any
    decoder_path: str

    @property
    def config(self) -> Any:
        """The whole model's configuration in Transformers' form."""
        return self.model.config

    @property
    def text(self) -> Any:
        """That of the text decoder."""
        return self.config.get_text_config(decoder=True)

    @property
    def decoder(self) -> Any:
        """The text decoder."""
        return self.model.get_submodule(self.decoder_path)

    @property
    def has_experts(self) -> list[bool]:
        """For each layer whether its MLP is a mixture of experts."""
        return [hasattr(layer.mlp, "experts") for layer in self.decoder.layers]

    @property
    def backbone_path(self) -> str:
        """Of the module that puts images into the text, ``model``; empty for a model of text only."""
        return self.decoder_path.rpartition(".")[0]

    @property
    def backbone(self) -> Any:
        """That module; of a model of text only the whole."""
        return self.model.get_submodule(self.backbone_path)

    @property
    def deepstack(self) -> int:
        """How many of the first layers take features of the vision tower."""
        return len(getattr(getattr(self.config, "vision_config", None), "deepstack_visual_indexes", None) or ())

    def names(self, first_chunk: bool, last_chunk: bool, layers: range) -> set[str]:
        """Return the names of the parameters that a pipeline chunk has to have, tied ones under their first name."""
        decoder, wanted = f"{self.decoder_path}.", set()
        for name, _ in self.model.named_parameters():
            inside = name.removeprefix(decoder)
            if inside == name:
                belongs = last_chunk if name == "lm_head.weight" else first_chunk
            elif inside.startswith("layers."):
                belongs = int(inside.split(".")[1]) in layers
            else:
                belongs = last_chunk if inside == "norm.weight" else first_chunk
            if belongs or (last_chunk and inside == "embed_tokens.weight" and self.config.tie_word_embeddings):
                wanted.add(name)
        return wanted


def read_blueprint(config: ModelConfig) -> Blueprint:
    """Return what model.json describes.

    Raises:
        UserError: its shapes are incomplete or contradict its Hugging Face folder, or its text decoder is not one of
            ``DECODERS``.
    """
    hf_config = read_hf_config(config)
    check_decoder(hf_config)
    model_class: Any = ModelHub.build({}, hf_config)  # model_id names a family here
    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(hf_config), attn_implementation="eager")
    return Blueprint(model, next(path for path, module in model.named_modules() if _holds_layers(module)))


def check_decoder(hf_config: Any) -> None:
    """Refuse a model whose text decoder megatron-core's layers do not compute.

    Raises:
        UserError: it is none of ``DECODERS``, or has sliding windows.
    """
    text = hf_config.get_text_config(decoder=True)
    model = f"the model of type '{hf_config.model_type}'"
    if text.model_type not in DECODERS:
        raise UserError(
            f"{model} has a text decoder of type '{text.model_type}', which megatron-core's layers do not compute; "
            f"they do for {', '.join(DECODERS)}. Use pretrain_transformers.py for this model."
        )
    kinds = getattr(text, "layer_types", None) or ()
    # Mistral has one window for all layers, and no list of their kinds.
    window = None if kinds else getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", False) or "sliding_attention" in kinds or window is not None:
        raise UserError(
            f"{model} has sliding windows in its text decoder (sliding_window of config.json), which pretrain_vlm.py "
            f"does not compute. Use pretrain_transformers.py for this model."
        )


def _holds_layers(module: nn.Module) -> bool:
    return hasattr(module, "layers") and hasattr(module, "embed_tokens")
