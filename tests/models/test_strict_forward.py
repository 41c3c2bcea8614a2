"""Models of users whose forward names its arguments, given batches with more keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from mindspeed_mm.data.collators import PackCollator, PaddingCollator
from mindspeed_mm.data.model_inputs import ModelInputs
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.common.strict_forward import leave_out_what_it_does_not_take
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.models.test_packing import Case
from tests.models.tiny import save_tiny


class Strict(transformers.Qwen3VLForConditionalGeneration):
    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None):
        types = (input_ids == self.config.image_token_id).int()
        images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw, "mm_token_type_ids": types}
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **images)


def test_a_hugging_face_class_with_a_forward_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("qwen3_vl", tmp_path)
    monkeypatch.setitem(ModelHub.MODEL_MAPPINGS, "strict", Strict)
    samples = Case("qwen3_vl", "several images", dtype=torch.float32).samples
    batch = PaddingCollator(0, model_inputs=ModelInputs(tmp_path))(samples)
    assert {"position_ids", "vision_metadata", "mm_token_type_ids"} <= batch.keys()
    strict = TransformersModel({"init_from_hf_path": str(tmp_path), "model_id": "strict"})
    assert type(strict.model) is Strict
    expected = TransformersModel({"init_from_hf_path": str(tmp_path)})(**batch)["loss"]
    torch.testing.assert_close(strict(**batch)["loss"], expected, rtol=1e-6, atol=0)
    with pytest.raises(UserError, match=r"packing: Strict\.forward takes no position_ids.*set packing to false"):
        strict(**PackCollator(64, 0, ModelInputs(tmp_path))(samples))
    videos = Case("qwen3_vl", "video", dtype=torch.float32).samples
    with pytest.raises(UserError, match=r"Strict\.forward takes no pixel_values_videos, video_grid_thw, which"):
        strict(**PaddingCollator(0)(videos))


class Bare(nn.Module):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return input_ids + labels


def test_a_module_of_the_user() -> None:
    ids = torch.arange(4)[None]
    computed = {"position_ids": ids, "attention_mask": ids, "vision_metadata": {}}
    model = Bare()
    with pytest.raises(TypeError):
        model(input_ids=ids, labels=ids, **computed)
    leave_out_what_it_does_not_take(model)
    assert torch.equal(model(input_ids=ids, labels=ids, **computed), 2 * ids)
    assert torch.equal(model(ids, labels=ids), 2 * ids)
    with pytest.raises(UserError, match=r"Bare\.forward takes no pixel_values, which the batch has: name them"):
        model(input_ids=ids, labels=ids, pixel_values=ids)
