"""What we know about Hugging Face model families beyond what HF says itself. This table is all of an adapter.

The classes are used unmodified. An entry names the module paths of the components that model.json can freeze,
and how to make the smallest image that the vision tower accepts. A model without an entry still trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DummyInputs = Callable[[Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """Module paths, relative to the HF model, of one family.

    Attributes:
        components: component name to the paths of its modules. A parameter belongs to the component with the
            longest path above it, so a projector may live inside the vision tower.
        backbone: the module with ``get_image_features`` and ``language_model``.
        dummy_image: from the HF config to the keyword arguments of ``get_image_features`` for the smallest legal
            image, blank; None where the vision tower is not known or absent.
        dummy_audio: from the HF config to the keyword arguments of ``audio_tower``, whose ``last_hidden_state`` goes
            through ``multi_modal_projector``, for the shortest legal audio, silent; None likewise.
    """

    components: Mapping[str, tuple[str, ...]]
    backbone: str = "model"
    dummy_image: DummyInputs | None = None
    dummy_audio: DummyInputs | None = None

    def component_of(self, name: str) -> str | None:
        """Return the component that the parameter ``name`` belongs to, or None."""
        owners = [
            (len(path), component)
            for component, paths in self.components.items()
            for path in paths
            if f"{name}.".startswith(f"{path}." if path else "")
        ]
        return max(owners)[1] if owners else None


def _patches(config: Any) -> dict[str, Tensor]:
    """One merged token's worth of flattened patches, as the Qwen and GLM towers take them."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(merge**2, patch), "image_grid_thw": torch.tensor([[1, merge, merge]])}


def _picture(config: Any) -> dict[str, Tensor]:
    """One tile of the size the tower was made for."""
    vision = config.vision_config
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros(1, vision.num_channels, height, width)}


def _silence(config: Any) -> dict[str, Tensor]:
    """As long as every recording is padded to, two steps for each position of the tower."""
    audio = config.audio_config
    return {"input_features": torch.zeros(1, audio.num_mel_bins, 2 * audio.max_source_positions)}


_LANGUAGE = ("model.language_model", "lm_head")
_QWEN_OR_GLM = Family(
    components={
        "vision_encoder": ("model.visual",),
        "vision_projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "text_decoder": _LANGUAGE,
    },
    dummy_image=_patches,
)

_TOWER_AND_PROJECTOR = Family(
    components={
        "vision_encoder": ("model.vision_tower",),
        "vision_projector": ("model.multi_modal_projector",),
        "text_decoder": _LANGUAGE,
    },
    dummy_image=_picture,
)

# By HF model_type. Add an entry from a plugin for a family of your own.
FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN_OR_GLM,
    "qwen2_5_vl": _QWEN_OR_GLM,
    "qwen3_vl": _QWEN_OR_GLM,
    "qwen3_vl_moe": _QWEN_OR_GLM,
    "glm4v": _QWEN_OR_GLM,
    "glm4v_moe": _QWEN_OR_GLM,
    "internvl": _TOWER_AND_PROJECTOR,
    "llava": _TOWER_AND_PROJECTOR,
    "gemma3": _TOWER_AND_PROJECTOR,
    "paligemma": _TOWER_AND_PROJECTOR,
    "aya_vision": _TOWER_AND_PROJECTOR,
    "cohere2_vision": _TOWER_AND_PROJECTOR,
    "qwen2_audio": Family(
        components={
            "audio_encoder": ("model.audio_tower", "model.multi_modal_projector"),
            "text_decoder": _LANGUAGE,
        },
        dummy_audio=_silence,
    ),
}

_TEXT_ONLY = Family(components={"text_decoder": ("",)})

# The names most other models use. Ambiguous ones are left out: freezing too much would go unnoticed.
_CONVENTIONAL = Family(
    components={
        "vision_encoder": ("model.vision_tower", "vision_tower", "model.vision_model", "vision_model"),
        "vision_projector": ("model.multi_modal_projector", "multi_modal_projector", "mlp1"),
        "text_decoder": ("model.language_model", "language_model", "lm_head"),
        "audio_encoder": ("model.audio_tower", "audio_tower"),
    }
)


def family_of(transformer_config: Any) -> Family:
    """Return the family of an HF config: an entry of ``FAMILIES``, text only, or the conventional names."""
    if transformer_config.model_type in FAMILIES:
        return FAMILIES[transformer_config.model_type]
    return _CONVENTIONAL if has_vision(transformer_config) or has_audio(transformer_config) else _TEXT_ONLY


def has_vision(transformer_config: Any) -> bool:
    """Return whether an HF config describes a model with a vision tower."""
    return getattr(transformer_config, "vision_config", None) is not None


def has_audio(transformer_config: Any) -> bool:
    """Return whether an HF config describes a model with an audio tower."""
    return getattr(transformer_config, "audio_config", None) is not None
