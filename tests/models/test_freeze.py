"""What model.json freezes, family by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers.families import family_of
from mindspeed_mm.models.transformers.freeze import freeze_components, frozen_line
from tests.models.tiny import VISION_FAMILIES, tiny_model

# The direct children of the HF modules that are frozen, and nothing else is.
QWEN3_VISION = {"model.visual.patch_embed", "model.visual.pos_embed", "model.visual.blocks"}
GLM_VISION = {f"model.visual.{m}" for m in ("embeddings", "patch_embed", "blocks", "downsample")} | {
    "model.visual.post_conv_layernorm",
    "model.visual.post_layernorm",
}
TEXT = {"model.language_model", "lm_head"}
EXPECTED = {
    "qwen3_vl": (QWEN3_VISION, {"model.visual.merger", "model.visual.deepstack_merger_list"}),
    "qwen3_vl_moe": (QWEN3_VISION, {"model.visual.merger", "model.visual.deepstack_merger_list"}),
    "qwen2_5_vl": ({"model.visual.patch_embed", "model.visual.blocks"}, {"model.visual.merger"}),
    "internvl": ({"model.vision_tower"}, {"model.multi_modal_projector"}),
    "glm4v": (GLM_VISION, {"model.visual.merger"}),
    "glm4v_moe": (GLM_VISION, {"model.visual.merger"}),
}
CONFIGS: dict[str, Any] = {
    "vision_encoder": {"image_encoder": {"vision_encoder": {"freeze": True}}},
    "vision_projector": {"image_encoder": {"vision_encoder": {"freeze": False}, "vision_projector": {"freeze": True}}},
    "text_decoder": {"text_decoder": {"freeze": True}},
}


def freeze(model: nn.Module, config: dict[str, Any]) -> str | None:
    freeze_components(model, family_of(model.config), config)
    return frozen_line(model)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("component", CONFIGS)
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_frozen_parameters_are_exactly_the_component(family: str, component: str, tie: bool) -> None:
    model = tiny_model(family, tie)
    line = freeze(model, CONFIGS[component])
    vision, projector = EXPECTED[family]
    modules = {"vision_encoder": vision, "vision_projector": projector, "text_decoder": TEXT}[component]
    expected = {n for n, _ in model.named_parameters() if any(n.startswith(f"{m}.") for m in modules)}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert set(frozen) == expected
    assert line is not None and f"{sum(p.numel() for p in frozen.values()):,} of" in line
    # Tied or not, input and output embeddings are frozen together.
    assert model.get_input_embeddings().weight.requires_grad == model.get_output_embeddings().weight.requires_grad


def test_nothing_is_frozen_unless_asked() -> None:
    assert freeze(tiny_model("qwen3_vl"), {"image_encoder": None}) is None


def test_line_names_the_highest_frozen_modules() -> None:
    both = {"image_encoder": {"vision_encoder": {"freeze": True}, "vision_projector": {"freeze": True}}}
    line = freeze(tiny_model("qwen2_5_vl"), both)
    assert line is not None and line.endswith("parameters, in model.visual")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_freezing_everything_is_refused(family: str) -> None:
    config: dict[str, Any] = {"text_decoder": {"freeze": True}}
    if family == "qwen3_vl":
        config["image_encoder"] = {"vision_encoder": {"freeze": True}, "vision_projector": {"freeze": True}}
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(tiny_model(family), config)


def test_component_that_the_model_lacks() -> None:
    with pytest.raises(UserError, match=r"vision_encoder\.freeze: Qwen3ForCausalLM has no vision encoder"):
        freeze(tiny_model("qwen3"), CONFIGS["vision_encoder"])


def tiny_llava() -> Any:
    """A family without an entry, with the conventional module names."""
    text = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.LlavaForConditionalGeneration._from_config(
        transformers.LlavaConfig(text_config=text, vision_config=vision), dtype=torch.float32
    )


def test_model_without_an_entry_freezes_by_conventional_names() -> None:
    model = tiny_llava()
    freeze(model, CONFIGS["vision_encoder"])
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith("model.vision_tower.")
    }


def test_model_with_unknown_names_says_what_to_do() -> None:
    model = tiny_llava()
    model.model.eyes = model.model.vision_tower
    del model.model.vision_tower
    with pytest.raises(UserError, match=r"method freeze\(config\).*model\.eyes"):
        freeze(model, CONFIGS["vision_encoder"])
