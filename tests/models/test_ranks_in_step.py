"""Two real ranks whose batches differ in images must take the same steps, and get one process's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mindspeed_mm.distributed.fsdp2 import prepare_model
from mindspeed_mm.distributed.reduction import sum_gradients
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin, WeightInitMixin
from mindspeed_mm.models.transformers.blank_image import add_nothing
from mindspeed_mm.models.transformers.families import family_of
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.models.tiny import VISION_FAMILIES, save_tiny, tiny_batch
from tests.ranks import RankPool

# Images of the single sample of each rank.
STEPS = ((1, 0), (0, 1), (0, 0), (1, 1))
FROZEN_TOWER = {"vision_encoder": {"freeze": True}, "vision_projector": {"freeze": True}}


def batch(family: str, step: int, rank: int) -> dict[str, Tensor]:
    return tiny_batch(family, images=[STEPS[step][rank]], seed=10 * step + rank)


def sharded(config: dict[str, Any], more_units: Sequence[str] = ()) -> TransformersModel:
    model = TransformersModel(config)
    for name, module in list(model.model.named_modules()):
        if type(module).__name__ in model.model._no_split_modules or name in more_units:
            fully_shard(module)
    fully_shard(model.model)
    sum_gradients(model)
    return model


def gradients_on_ranks(family: str, config: dict[str, Any], more_units: Sequence[str] = ()) -> list[dict[str, Tensor]]:
    """Gradients of every step; runs on each rank."""
    model, collected = sharded(config, more_units), []
    for step in range(len(STEPS)):
        (model(**batch(family, step, dist.get_rank()))["loss"] / dist.get_world_size()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        collected.append({n: g.full_tensor().clone() if isinstance(g, DTensor) else g for n, g in grads.items()})
        model.zero_grad()
    return collected


def gradients_in_one_process(family: str, config: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The same micro-batches one after the other, without a process group."""
    model, collected = TransformersModel(config), []
    for step in range(len(STEPS)):
        for rank in range(2):
            (model(**batch(family, step, rank))["loss"] / 2).backward()
        collected.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    return collected


@pytest.mark.parametrize("family", (*VISION_FAMILIES, "gemma3"))
@pytest.mark.parametrize("image_encoder", [None, FROZEN_TOWER], ids=["all-trained", "frozen-tower"])
def test_gradients_equal_one_process(
    ranks2: RankPool, tmp_path: Path, family: str, image_encoder: dict[str, Any] | None
) -> None:
    folder = save_tiny(family, tmp_path, tie=True)
    config = {"init_from_hf_path": str(folder), "image_encoder": image_encoder}
    expected = gradients_in_one_process(family, config)
    for found in ranks2.run(gradients_on_ranks, family, config):
        for step, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert b.keys() <= a.keys()
            for name, gradient in a.items():
                # Without any image in the global batch the tower has zero gradients, not missing ones.
                torch.testing.assert_close(
                    gradient, b.get(name, torch.zeros_like(gradient)), rtol=1e-6, atol=1e-9, msg=f"{step} {name}"
                )


_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
_EYES = {"image_size": 16, "patch_size": 4, **{key: value for key, value in _TEXT.items() if key != "head_dim"}}


@pytest.mark.parametrize(
    ("family", "text", "more"),
    [
        ("PaliGemma", "gemma", {"projection_dim": 16}),
        ("AyaVision", "cohere2", {"downsample_factor": 2}),
        ("Cohere2Vision", "cohere2", {"downsample_factor": 2}),
    ],
)
def test_families_of_one_shape_look_at_the_same_blank_picture(family: str, text: str, more: dict[str, int]) -> None:
    eyes = {"model_type": "siglip_vision_model", "vision_use_head": False, **_EYES, **more}
    mind = {"model_type": text, "vocab_size": 32, "num_key_value_heads": 2, **_TEXT}
    config = getattr(transformers, f"{family}Config")(text_config=mind, vision_config=eyes, **more)
    model = getattr(transformers, f"{family}ForConditionalGeneration")._from_config(config, dtype=torch.float32)
    known = family_of(model.config)
    features = model.get_submodule(known.backbone).get_image_features(**known.dummy_image(model.config))
    add_nothing(torch.zeros(1, 1, 1), features).sum().backward()
    reached = {known.component_of(name) for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"vision_encoder", "vision_projector"}


@pytest.mark.parametrize("loss_type", ["default", "per_token_loss"])
def test_chunked_and_router_loss_under_sharding(ranks2: RankPool, tmp_path: Path, loss_type: str) -> None:
    folder = save_tiny("qwen3_vl_moe", tmp_path)
    loss = {"loss_type": loss_type, "compute_mode": "chunk", "chunk_size": 4, "router_aux_loss_coef": 0.1}
    config = {"init_from_hf_path": str(folder), "loss_cfg": loss}
    expected = gradients_in_one_process("qwen3_vl_moe", config)
    for found in ranks2.run(gradients_on_ranks, "qwen3_vl_moe", config, ["lm_head"]):
        for a, b in zip(found, expected, strict=True):
            for name in b:
                torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)


def adapter_on_ranks(config: dict[str, Any], yaml: str) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    """The documented adapter form through the trainer's own way of sharding."""
    from transformers import InternVLForConditionalGeneration

    class Adapter(InternVLForConditionalGeneration, FSDP2Mixin, WeightInitMixin):
        pass

    ModelHub.MODEL_MAPPINGS["adapter"] = Adapter
    model = TransformersModel(config | {"model_id": "adapter"})
    plan = prepare_model(model, dist.group.WORLD, yaml)
    (model(**batch("internvl", 0, dist.get_rank()))["loss"] / dist.get_world_size()).backward()
    grads = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
    return [(row.pattern, row.modules) for row in plan.rows], grads


def test_documented_adapter_is_sharded_by_the_yaml(ranks2: RankPool, tmp_path: Path) -> None:
    config = {"init_from_hf_path": str(save_tiny("internvl", tmp_path))}
    yaml = tmp_path / "fsdp2_config.yaml"  # its paths start inside the HF model
    yaml.write_text("sharding_size: auto\nsub_modules_to_wrap: ['model.language_model.layers.{*}', lm_head]\n")
    expected = gradients_in_one_process("internvl", config)[0]
    for rows, found in ranks2.run(adapter_on_ranks, config, str(yaml)):
        assert dict(rows) == {"model.language_model.layers.{0-1}": 2, "lm_head": 1}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=name)


def recomputed(folder: str, family: str, module: str) -> str:
    """Recompute a module in a step in which one rank has no image; return the message that refuses it, if any."""
    yaml = Path(folder) / f"fsdp2_config_{dist.get_rank()}.yaml"
    yaml.write_text(f"sharding_size: auto\nrecompute_modules: ['{module}']\n")
    model = TransformersModel({"init_from_hf_path": folder})
    try:
        prepare_model(model, dist.group.WORLD, str(yaml))
    except UserError as error:
        return str(error)
    model(**batch(family, 0, dist.get_rank()))["loss"].backward()
    return ""


@pytest.mark.parametrize("module", ["", "model", "model.language_model"])
def test_what_is_around_the_decoder_is_not_recomputed(ranks2: RankPool, tmp_path: Path, module: str) -> None:
    """Then what keeps the ranks in step would be gone in the backward pass."""
    save_tiny("qwen3_vl", tmp_path)
    for message in ranks2.run(recomputed, str(tmp_path), "qwen3_vl", module):
        if module == "model.language_model":
            assert message == ""
        else:
            assert f"recompute_modules: '{module}' is around the text decoder, 'model.language_model'" in message
            assert "model.language_model.layers.{*}" in message
