"""What workers compute for the model: the same numbers bit for bit, and fewer waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_mm.data.collators import PackCollator, PaddingCollator
from mindspeed_mm.data.model_inputs import ModelInputs
from mindspeed_mm.distributed.recompute import recompute
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.models.tiny import save_tiny, tiny_batch

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "glm4v", "glm4v_moe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def samples_of(family: str) -> list[dict[str, Tensor]]:
    """An image of 8 x 4 patches with a video (not for GLM, whose frames are marked as images), two images, text."""
    samples = []
    for seed, (images, videos) in enumerate([(2, "glm" not in family), (2, 0), (0, 0)]):
        batch = tiny_batch(family, images=[images], videos=[int(videos)], length=17 + seed, seed=seed)
        samples.append({k: v[0] if v.shape[:2] == (1, 17 + seed) else v for k, v in batch.items()})
    first = samples[0]
    first["image_grid_thw"] = torch.tensor([[1, 8, 4]])  # of the two images one
    first["input_ids"][5:9], first["input_ids"][9] = 300, 7
    first["labels"] = first["input_ids"].masked_fill(first["input_ids"] >= 300, -100)
    for sample in samples:
        ids = sample["input_ids"]
        sample["mm_token_type_ids"] = (ids == 300).int() + 2 * (ids == 301).int()
    return samples


class Waits(TorchDispatchMode):
    """Counts operations that an accelerator cannot start before the host has read a value from it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        packet = func.overloadpacket
        reads = packet in (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_consecutive)
        reads |= func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if packet in (aten.index, aten.index_put, aten.index_put_):
            reads |= any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += reads
        return func(*args, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_without_it_bit_for_bit(folders: dict[str, Path], family: str) -> None:
    folder = folders[family]
    models = [TransformersModel({"init_from_hf_path": str(folder)}) for _ in range(2)]
    results, waits = [], []
    for model, inputs in zip(models, (None, ModelInputs(folder)), strict=True):
        batch = PaddingCollator(0, model_inputs=inputs)(samples_of(family))
        assert ("vision_metadata" in batch) == (inputs is not None)
        with Waits() as counted:
            loss = model(**batch)["loss"]
        loss.backward()
        results.append(loss)
        waits.append(counted.count)
    assert torch.equal(*results)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    assert waits[1] <= waits[0] / 3


def test_a_recomputed_tower_gets_it_again(folders: dict[str, Path]) -> None:
    folder = folders["qwen3_vl"]
    gradients = []
    for recomputed in (False, True):
        model = TransformersModel({"init_from_hf_path": str(folder)})
        if recomputed:
            recompute(model.model.model.visual)
            recompute(model.model.model.language_model)
        model(**PackCollator(64, 0, ModelInputs(folder))(samples_of("qwen3_vl")))["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tower_reads_nothing_from_its_device(folders: dict[str, Path], family: str, attention: str) -> None:
    """On the meta device a value cannot be read and host tensors cannot be mixed in: both raise."""
    config = {"image_encoder": {"vision_encoder": {"attn_implementation": attention}}}
    model = TransformersModel({"init_from_hf_path": str(folders[family]), **config})
    batch = PackCollator(64, 0, ModelInputs(folders[family]))(samples_of(family))
    tower = model._vision_metadata._tower.to("meta")
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        metadata = {kind: batch["vision_metadata"][kind]}
        with model._vision_metadata.for_batch(metadata, torch.device("meta")):
            tower(batch[pixels].to("meta"), grid_thw=batch[f"{kind}_grid_thw"].to("meta"))
        with pytest.raises((NotImplementedError, RuntimeError)):
            tower(batch[pixels].to("meta"), grid_thw=batch[f"{kind}_grid_thw"].to("meta"))


@pytest.mark.parametrize(("family", "most"), [("qwen3_vl", 11), ("qwen2_5_vl", 4)])
def test_a_pack_waits_only_where_hugging_face_checks_and_scatters(
    folders: dict[str, Path], family: str, most: int
) -> None:
    """Two checks for the images and two for the videos; the rest is Qwen3-VL's deepstack, by boolean masks."""
    model = TransformersModel({"init_from_hf_path": str(folders[family])})
    batch = PackCollator(64, 0, ModelInputs(folders[family]))(samples_of(family))
    with Waits() as counted:
        model(**batch)
    assert 0 < counted.count <= most
