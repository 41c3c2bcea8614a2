"""Every family on one rank gives Hugging Face's logits, loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mindspeed_mm.errors import UserError
from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "internvl", "llava")
LIMIT = 1e-5


def batches(family: str) -> dict[str, dict[str, Tensor]]:
    """Return one batch of each kind."""
    found = {
        "an image": tiny.tiny_batch(family, [1, 0]),
        "several images": tiny.tiny_batch(family, [2, 1], seed=1),
        "no image": tiny.tiny_batch(family, [0, 0], seed=2),
        "padding": padded(tiny.tiny_batch(family, [1, 1], seed=3)),
    }
    if family.startswith("qwen"):
        found["videos"] = tiny.tiny_batch(family, [1, 0], videos=[1, 1], seed=4)
        found["a wide image"] = wide_image(family)
    return found


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the last four tokens of the second sample padding."""
    batch["attention_mask"][1, -4:] = 0
    batch["input_ids"][1, -4:] = 0
    batch["labels"][1, -4:] = -100
    return batch


def wide_image(family: str) -> dict[str, Tensor]:
    """Make the first image two tokens high and four wide, so that positions differ by axis."""
    batch = tiny.tiny_batch(family, [1, 0], length=20, seed=5)
    batch["input_ids"][0, 1:9] = tiny.IMAGE_TOKEN
    batch["mm_token_type_ids"] = (batch["input_ids"] == tiny.IMAGE_TOKEN).int()
    batch["labels"][0, 1:9] = -100
    batch["image_grid_thw"] = torch.tensor([[1, 4, 8]])
    batch["pixel_values"] = torch.randn(32, 96, generator=torch.Generator().manual_seed(6))
    return batch


def compare(family: str, folder: str, tie: bool, model_json: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Run all batches and return the largest deviations."""
    vlm.start()
    (model,) = vlm.build(folder, **model_json)
    found = {}
    for kind, batch in batches(family).items():
        loss, logits, grads = vlm.oracle(family, batch, tie)
        model.zero_grad()
        output = model(**batch)
        output["loss_dict"]["loss"].backward()
        real = batch["attention_mask"].bool()
        found[f"{kind}: logits"] = (float((output["logits"] - logits)[real].abs().max()), "")
        found[f"{kind}: loss"] = (abs(float(output["loss_dict"]["loss"].detach()) - loss) / loss, "")
        found[f"{kind}: gradients"] = vlm.worst(vlm.gradients(model), grads)
    return found


@pytest.mark.parametrize(("family", "tie"), [*((f, False) for f in FAMILIES), ("qwen3_vl", True)])
def test_same_numbers(ranks1: RankPool, tmp_path: Path, family: str, tie: bool) -> None:
    tiny.save_tiny(family, tmp_path, tie)
    (found,) = ranks1.run(compare, family, str(tmp_path), tie, {})
    assert {kind: off for kind, off in found.items() if off[0] > LIMIT} == {}


def compare_loss(folder: str, loss_cfg: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    vlm.start()
    (model,) = vlm.build(folder, loss_cfg=loss_cfg)
    output = model(**padded(tiny.tiny_batch("qwen2_5_vl", [1, 1], seed=3)))
    output["loss_dict"]["loss"].backward()
    weight = model.text_decoder.output_layer.weight.grad
    return {key: value.detach() for key, value in output["loss_dict"].items()}, weight


@pytest.mark.parametrize("compute_mode", ["default", "chunk"])
@pytest.mark.parametrize("loss_type", ["default", "per_sample_loss", "per_token_loss"])
def test_losses(ranks1: RankPool, tmp_path: Path, loss_type: str, compute_mode: str) -> None:
    tiny.save_tiny("qwen2_5_vl", tmp_path)
    loss_cfg = {"loss_type": loss_type, "compute_mode": compute_mode, "chunk_size": 5}
    ((found, weight_grad),) = ranks1.run(compare_loss, str(tmp_path), loss_cfg)
    model = tiny.tiny_model("qwen2_5_vl")
    batch = padded(tiny.tiny_batch("qwen2_5_vl", [1, 1], seed=3))
    targets = batch.pop("labels")[:, 1:]
    losses = torch.nn.functional.cross_entropy(model(**batch).logits[:, :-1].mT, targets, reduction="none")
    counts = (targets >= 0).sum(1)
    right = {
        "default": losses.sum() / counts.sum(),
        "per_sample_loss": (losses.sum(1) / counts).mean(),
        "per_token_loss": losses.sum(),
    }[loss_type]
    right.backward()
    torch.testing.assert_close(found["loss"], right.detach(), rtol=LIMIT, atol=0)
    torch.testing.assert_close(weight_grad, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(found["loss_mask"][:, :-1], targets >= 0) and not found["loss_mask"][:, -1].any()
    assert ("token_nums" in found) == (loss_type == "per_token_loss")
    assert found.get("token_nums", counts.sum()) == counts.sum()


def refused_masks(folder: str) -> list[str]:
    vlm.start()
    (model,) = vlm.build(folder)
    batch = tiny.tiny_batch("qwen2_5_vl", [0, 0])
    left = batch["attention_mask"].clone()
    left[1, :3] = 0
    told = []
    for mask in (left, torch.ones(2, 1, 14, 14, dtype=torch.bool).tril()):
        try:
            model(**{**batch, "attention_mask": mask})
        except UserError as error:
            told.append(str(error))
    return told


def test_masks_beyond_causality_and_padding_at_the_end_are_refused(ranks1: RankPool, tmp_path: Path) -> None:
    tiny.save_tiny("qwen2_5_vl", tmp_path)
    ((left, whole),) = ranks1.run(refused_masks, str(tmp_path))
    assert "attention_mask" in left and "right" in left
    assert "attention_mask has the shape (2, 1, 14, 14)" in whole and "cu_seqlens" in whole


def four_rows_of_positions(folder: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    vlm.start()
    (model,) = vlm.build(folder)
    positions = model._positions(batch["input_ids"], batch["attention_mask"], batch)
    text = torch.arange(batch["input_ids"].shape[1]).expand(1, *batch["input_ids"].shape)
    return positions, model(**batch, position_ids=torch.cat([text, positions]))["logits"].detach()


def test_positions_of_the_text_beside_those_of_images(ranks1: RankPool, tmp_path: Path) -> None:
    """Transformers' packing puts the text's before the three others, to find the samples."""
    tiny.save_tiny("qwen2_5_vl", tmp_path)
    batch = tiny.tiny_batch("qwen2_5_vl", [1, 2])
    ((positions, logits),) = ranks1.run(four_rows_of_positions, str(tmp_path), batch)
    assert positions.unique(dim=0).shape[0] == 3
    torch.testing.assert_close(logits, vlm.oracle("qwen2_5_vl", batch)[1], rtol=LIMIT, atol=LIMIT)


def only_images_that_fill_up(folder: str, batch: dict[str, Tensor]) -> tuple[float, set[str]]:
    vlm.start()
    (model,) = vlm.build(folder)
    loss = model(**batch)["loss_dict"]["loss"]
    loss.backward()
    return float(loss.detach()), {name for name, p in model.named_parameters() if p.grad is None}


def test_a_batch_of_text_with_an_image_that_fills_up(ranks1: RankPool, tmp_path: Path) -> None:
    """As the collators of published InternVL data make it."""
    tiny.save_tiny("internvl", tmp_path)
    text = tiny.tiny_batch("internvl", [0, 0])
    filled = {**text, "pixel_values": torch.zeros(1, 3, 16, 16), "image_flags": torch.zeros(1, 1, dtype=torch.long)}
    ((loss, without_gradient),) = ranks1.run(only_images_that_fill_up, str(tmp_path), filled)
    assert abs(loss - vlm.oracle("internvl", text)[0]) <= LIMIT * loss
    assert not without_gradient


def fused_activation(folder: str, batch: dict[str, Tensor]) -> Tensor:
    vlm.start()
    (model,) = vlm.build(folder, megatron={"bias_activation_fusion": True})
    return model(**batch)["logits"].detach()


def test_a_fused_activation_is_the_model_s_own(ranks1: RankPool, tmp_path: Path) -> None:
    """Megatron-core has a fused GELU, which is an approximation of it."""
    text = {**tiny.tiny_config("llava").text_config.to_dict(), "hidden_act": "gelu", "initializer_range": 0.3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    model.save_pretrained(tmp_path)
    batch = tiny.tiny_batch("qwen3", [0, 0])
    (logits,) = ranks1.run(fused_activation, str(tmp_path), batch)
    right = model(input_ids=batch["input_ids"]).logits.detach()
    assert (logits - right).abs().max() <= LIMIT * right.abs().max()


def sixteen_bits(folder: str) -> tuple[float, Tensor, set[torch.dtype]]:
    """Return loss and logits in bf16, and the dtypes of what is no weight."""
    vlm.start()
    (model,) = vlm.build(folder, megatron={"bf16": True, "params_dtype": torch.bfloat16})
    output = model.bfloat16()(**tiny.tiny_batch("qwen2_5_vl", [2, 1], seed=1))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    buffers = {b.dtype for b in model.buffers() if b.is_floating_point()}
    return float(output["loss_dict"]["loss"].detach()), output["logits"].detach(), buffers


def test_bf16_is_as_close_as_rounding_allows(ranks1: RankPool, tmp_path: Path) -> None:
    tiny.save_tiny("qwen2_5_vl", tmp_path)
    ((loss, logits, buffers),) = ranks1.run(sixteen_bits, str(tmp_path))
    right, right_logits, _ = vlm.oracle("qwen2_5_vl", tiny.tiny_batch("qwen2_5_vl", [2, 1], seed=1))
    assert buffers == {torch.float32}
    assert abs(loss - right) < 1e-2 * right
    assert (logits.float() - right_logits).abs().max() < 0.02 * right_logits.abs().max()


def frozen_before_recompute(folder: str) -> list[tuple[str, tuple[slice, ...], Tensor | None]]:
    vlm.start()
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    (model,) = vlm.build(folder, megatron=recompute)
    model.image_encoder.requires_grad_(False)
    model.text_decoder.embedding.requires_grad_(False)
    model(**tiny.tiny_batch("qwen2_5_vl", [1, 0]))["loss_dict"]["loss"].backward()
    return [box for box in vlm.gradients(model) if "layers" in box[0]]


def test_recomputed_layers_learn_behind_frozen_ones(ranks1: RankPool, tmp_path: Path) -> None:
    tiny.save_tiny("qwen2_5_vl", tmp_path)
    (found,) = ranks1.run(frozen_before_recompute, str(tmp_path))
    _, _, right = vlm.oracle("qwen2_5_vl", tiny.tiny_batch("qwen2_5_vl", [1, 0]))
    assert found and vlm.worst(found, right) <= (LIMIT, "")
