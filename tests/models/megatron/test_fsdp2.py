"""The documented fsdp2_config.yaml on the Megatron model: two FSDP2 ranks give Hugging Face's gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mindspeed_mm.distributed import state
from mindspeed_mm.distributed.fsdp2 import prepare_model
from mindspeed_mm.training.model_setup import freeze_patterns
from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

YAML = """
sharding_size: auto
sub_modules_to_wrap:
  - "text_decoder.output_layer"
  - "text_decoder.embedding"
  - "text_decoder.rotary_pos_emb"
  - "text_decoder.decoder.layers.{*}"
recompute_modules:
  - "text_decoder.decoder.layers.{*}"
"""


def step(folder: str, family: str) -> tuple[float, list[str], dict[str, Tensor]]:
    """Run forward and backward, each rank on its batch; return the mean loss, sharded modules and gradients."""
    vlm.start()
    (model,) = vlm.build(folder)
    path = Path(folder) / "fsdp2_config.yaml"
    prepare_model(model, state.data_parallel_group(), str(path))
    batch = tiny.tiny_batch(family, [dist.get_rank(), 0], seed=dist.get_rank())
    loss = model(**batch)["loss_dict"]["loss"]
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.full_tensor()
    loss = state.average_over(loss.detach(), state.data_parallel_group())
    wrapped = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    grads = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    return float(loss), wrapped, grads


def test_documented_yaml(ranks2: RankPool, ranks1: RankPool, tmp_path: Path) -> None:
    family = "qwen3_vl"
    tiny.save_tiny(family, tmp_path)
    (tmp_path / "fsdp2_config.yaml").write_text(YAML)
    answers = ranks2.run(step, str(tmp_path), family)
    right = [vlm.oracle(family, tiny.tiny_batch(family, [rank, 0], seed=rank)) for rank in range(2)]
    # The engine divides by the ranks.
    grads = {name: right[0][2][name] + right[1][2][name] for name in right[0][2]}
    ((boxes, layout),) = ranks1.run(plain_layout, str(tmp_path))
    assert boxes
    for loss, wrapped, found in answers:
        assert {"text_decoder.embedding", "text_decoder.decoder.layers.1", "text_decoder.output_layer"} <= set(wrapped)
        assert abs(loss - (right[0][0] + right[1][0]) / 2) <= 1e-5 * loss
        listed = [
            (piece.hf_name, piece.block, piece.view(found[name])) for name, parts in layout.items() for piece in parts
        ]
        assert vlm.worst(listed, grads) <= (1e-5, "")


TOWER = """
sharding_size: auto
sub_modules_to_wrap:
  - "text_decoder.decoder.layers.{*}"
  - "image_encoder.encoder.blocks.{*}"
"""
FROZEN = {"vision_encoder": {"freeze": True}, "vision_projector": {"freeze": True}}


def loss_of_mine(folder: str, batches: list[dict[str, Tensor]]) -> float:
    vlm.start()
    (model,) = vlm.build(folder, image_encoder=FROZEN)
    prepare_model(model, state.data_parallel_group(), str(Path(folder) / "fsdp2_config.yaml"))
    loss = model(**batches[dist.get_rank()])["loss_dict"]["loss"]
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("videos", [[0, 0], [1, 0]], ids=["no-image", "image-and-video"])
def test_ranks_call_a_frozen_tower_equally_often(ranks2: RankPool, tmp_path: Path, videos: list[int]) -> None:
    tiny.save_tiny("qwen3_vl", tmp_path)
    (tmp_path / "fsdp2_config.yaml").write_text(TOWER)
    images = [[0, 0], [1, 0]] if videos == [0, 0] else [[1, 0], [1, 1]]
    batches = [
        tiny.tiny_batch("qwen3_vl", counts, videos=films)
        for counts, films in zip(images, (videos, [0, 0]), strict=True)
    ]
    found = ranks2.run(loss_of_mine, str(tmp_path), batches)
    for loss, batch in zip(found, batches, strict=True):
        right, *_ = vlm.oracle("qwen3_vl", batch)
        assert abs(loss - right) <= 1e-5 * right


def frozen_by(folder: str, pattern: str) -> list[str]:
    vlm.start()
    (model,) = vlm.build(folder)
    freeze_patterns(model, [pattern])
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("pattern", ["text_decoder.output_layer", "text_decoder.{*}_layer", "text_decoder.embedding"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_an_output_layer_is_frozen_with_the_embedding_it_is_tied_to(
    ranks1: RankPool, tmp_path: Path, pattern: str, tie: bool
) -> None:
    tiny.save_tiny("qwen3", tmp_path, tie=tie)
    embedding, output = "text_decoder.embedding.word_embeddings.weight", "text_decoder.output_layer.weight"
    assert ranks1.run(frozen_by, str(tmp_path), pattern) == [
        [embedding if tie or pattern.endswith("embedding") else output]
    ]


def plain_layout(folder: str) -> tuple[int, dict[str, list[vlm.Piece]]]:
    vlm.start()
    layout = vlm.pieces(vlm.build(folder)[0])
    return len(layout), layout
