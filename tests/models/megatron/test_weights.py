"""Hugging Face folder -> any layout -> Hugging Face folder, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.checkpoint.hf_boxes import export_hf_boxes, load_hf_boxes
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.layout import boxes, pieces
from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

SEQUENCE = {"sequence_parallel": True}


@pytest.fixture(scope="module")
def ranks4() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.stop()


def round_trip(folder: str, target: str, sizes: dict[str, int], settings: dict[str, Any]) -> list[str]:
    """Load in a layout, check that every parameter was covered once, and export."""
    vlm.start(**sizes)
    built = vlm.build(folder, megatron=settings)
    for chunk in built:
        for name, parameter in chunk.named_parameters():
            times = torch.zeros(parameter.shape)
            for piece in pieces(chunk)[name]:
                piece.view(times).add_(1)
            assert bool((times == 1).all()), name
    export_hf_boxes(built[0].blueprint.model, target, boxes(*built), max_shard_bytes=50_000)
    return [name for chunk in built for name, _ in chunk.named_parameters()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def check(pool: RankPool, tmp_path: Path, family: str, tie: bool, sizes: dict[str, int], **settings: Any) -> None:
    original = tiny.save_tiny(family, tmp_path / "original", tie, layers=4)
    pool.run(round_trip, str(original), str(tmp_path / "exported"), sizes, settings)
    stored, found = weights(original), weights(tmp_path / "exported")
    assert stored.keys() == found.keys()
    assert [key for key in stored if not torch.equal(stored[key], found[key])] == []
    assert (tmp_path / "exported" / "model.safetensors.index.json").is_file()
    loaded = type(tiny.tiny_model(family, tie)).from_pretrained(tmp_path / "exported")
    assert loaded.config.get_text_config().num_hidden_layers == 4


@pytest.mark.parametrize(
    ("family", "tie", "sizes", "settings"),
    [
        ("qwen2_5_vl", False, {"tensor": 2}, {}),
        ("qwen3_vl", True, {"pipeline": 2, "virtual": 2}, {}),
        ("qwen3_vl_moe", False, {"tensor": 2, "expert": 2, "expert_tensor": 1}, SEQUENCE),
    ],
)
def test_two_ranks(
    ranks2: RankPool, tmp_path: Path, family: str, tie: bool, sizes: dict[str, int], settings: dict[str, Any]
) -> None:
    check(ranks2, tmp_path, family, tie, sizes, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tie", "sizes", "settings"),
    [
        ("qwen3_vl", True, {"tensor": 2, "pipeline": 2}, SEQUENCE),
        ("internvl", False, {"tensor": 2, "pipeline": 2}, {}),
        ("llava", False, {"pipeline": 4}, {}),
        ("qwen3_vl_moe", False, {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1}, SEQUENCE),
        ("qwen3_vl_moe", False, {"tensor": 2, "expert": 2, "expert_tensor": 2}, SEQUENCE),
        ("qwen3_vl_moe", False, {"expert": 4}, {}),
    ],
)
def test_four_ranks(
    ranks4: RankPool, tmp_path: Path, family: str, tie: bool, sizes: dict[str, int], settings: dict[str, Any]
) -> None:
    check(ranks4, tmp_path, family, tie, sizes, **settings)


def load_broken(folder: str) -> str:
    vlm.start(tensor=2)
    try:
        vlm.build(folder)
    except UserError as error:
        return str(error)
    return "no error"


def test_a_missing_weight_is_an_error_on_all_ranks(ranks2: RankPool, tmp_path: Path) -> None:
    tiny.save_tiny("qwen2_5_vl", tmp_path)
    kept = {key: tensor for key, tensor in weights(tmp_path).items() if "layers.1.mlp.up_proj" not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    answers = ranks2.run(load_broken, str(tmp_path))
    assert answers[0] == answers[1]
    assert "1 weights missing" in answers[0] and "layers.1.mlp.up_proj.weight" in answers[0]


def load_loosely(folder: str) -> tuple[list[str], bool]:
    vlm.start()
    (model,) = vlm.build(folder)
    with torch.no_grad():
        model.text_decoder.decoder.layers[1].mlp.linear_fc1.weight.fill_(7.0)
    kept = {key: tensor for key, tensor in weights(Path(folder)).items() if "layers.1.mlp.up_proj" not in key}
    other = Path(folder) / "other"
    other.mkdir()
    save_file(kept, other / "model.safetensors")
    lines = load_hf_boxes(model.blueprint.model, other, boxes(model), strict=False)
    gate, up = model.text_decoder.decoder.layers[1].mlp.linear_fc1.weight.chunk(2)
    return lines, bool((up == 7).all()) and not bool((gate == 7).any())


def test_not_strict_takes_what_fits(ranks1: RankPool, tmp_path: Path) -> None:
    tiny.save_tiny("qwen2_5_vl", tmp_path)
    ((lines, kept),) = ranks1.run(load_loosely, str(tmp_path))
    assert len(lines) == 1 and kept


def build_without_values(folder: str) -> tuple[bool, bool]:
    """Return whether random numbers were drawn, and whether all values are the folder's."""
    vlm.start()
    before = torch.get_rng_state()
    (model,) = vlm.build(folder, megatron={"perform_initialization": False})
    drawn = not torch.equal(before, torch.get_rng_state())
    right = dict(tiny.tiny_model("qwen2_5_vl").named_parameters())
    return drawn, all(torch.equal(view, right[piece.hf_name][piece.block]) for piece, view in boxes(model))


def test_values_that_are_read_next_are_not_drawn_first(ranks1: RankPool, tmp_path: Path) -> None:
    tiny.save_tiny("qwen2_5_vl", tmp_path)
    assert ranks1.run(build_without_values, str(tmp_path)) == [(False, True)]


def split_layers(folder: str, shared: bool) -> list[tuple[str, tuple[int, ...]]]:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    vlm.start(tensor=2)
    (model,) = vlm.build(folder, enable_encoder_dp=shared)
    encoder, parallel = model.image_encoder, (ColumnParallelLinear, RowParallelLinear)
    return [
        (encoder.hf_name(name), tuple(module.weight.shape))
        for name, module in encoder.named_modules()
        if isinstance(module, parallel)
    ]


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("qwen3_vl", ["visual.merger.linear_fc", "visual.deepstack_merger_list.0.linear_fc"]),
        pytest.param("qwen2_5_vl", ["visual.merger.mlp."], marks=pytest.mark.slow),
        pytest.param("internvl", ["multi_modal_projector.linear_"], marks=pytest.mark.slow),
        pytest.param("llava", ["multi_modal_projector.linear_"], marks=pytest.mark.slow),
    ],
)
def test_ranks_share_the_projector(ranks2: RankPool, tmp_path: Path, family: str, layers: list[str]) -> None:
    tiny.save_tiny(family, tmp_path)
    whole = dict(tiny.tiny_model(family).named_modules())
    for found in ranks2.run(split_layers, str(tmp_path), False):
        assert len(found) == 2 * len(layers)
        for number, (name, shape) in enumerate(found):
            assert name.startswith(f"model.{layers[number // 2]}")
            rows, columns = whole[name].weight.shape
            assert shape == ((rows // 2, columns) if number % 2 == 0 else (rows, columns // 2))
    assert ranks2.run(split_layers, str(tmp_path), True) == [[], []]
