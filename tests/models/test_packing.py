"""A packed sequence against its samples one by one, in unmodified Hugging Face models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from mindspeed_mm.data.collators import PackCollator
from mindspeed_mm.data.model_inputs import ModelInputs
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.models.tiny import save_tiny, tiny_batch, tiny_model

# Images and videos of each sample of a pack. InternVL sees the frames of a video as images.
CONTENTS = {
    "text": [(0, 0), (0, 0), (0, 0)],
    "one image": [(1, 0), (0, 0)],
    "several images": [(2, 0), (0, 0), (1, 0)],
    "video": [(0, 1), (0, 0), (0, 2)],
    "images and videos": [(1, 1), (0, 0), (2, 0), (0, 1)],
}
CAPACITY = 64


@dataclass(frozen=True)
class Case:
    family: str
    content: str
    loss_type: str = "per_token_loss"
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float64

    @property
    def samples(self) -> list[dict[str, Tensor]]:
        """Samples of different lengths, as an encoder gives them: per token (L,), the rest as the processor does."""
        samples = []
        for seed, (images, videos) in enumerate(CONTENTS[self.content]):
            batch = tiny_batch(self.family, images=[images], videos=[videos], length=13 + 2 * seed, seed=seed)
            shape = batch["input_ids"].shape
            samples.append({k: v[0] if v.shape == shape else self.cast(v) for k, v in batch.items()})
        return samples

    def cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


# The experts' kernel and GLM's position table know no fp64.
CASES = [
    *[Case(family, content) for family in ("qwen3_vl", "qwen2_5_vl") for content in CONTENTS],
    *[Case("internvl", content) for content in ("text", "one image", "several images")],
    Case("qwen3", "text"),
    Case("qwen3_vl", "images and videos", "per_sample_loss"),
    Case("internvl", "several images", "per_sample_loss"),
    Case("qwen3_vl", "images and videos", "default", attention="eager", dtype=torch.float32),
    Case("internvl", "several images", dtype=torch.float32),
    Case("qwen3_vl_moe", "images and videos", dtype=torch.float32),
    Case("glm4v", "several images", dtype=torch.float32),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = {case.family for case in CASES}
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in families}


def build(folder: Path, case: Case, compute_mode: str = "default") -> TransformersModel:
    parts = {"attn_implementation": case.attention}
    loss = {"loss_type": case.loss_type, "compute_mode": compute_mode, "chunk_size": 7}
    config = {"text_decoder": parts, "loss_cfg": loss}
    return TransformersModel({"init_from_hf_path": str(folder), **config}).to(case.dtype)


def logits_and_losses(model: Any, samples: list[dict[str, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Run Hugging Face's model on one sample after the other; the losses are those of each target token."""
    logits, losses = [], []
    for sample in samples:
        batch = {k: v[None] if v.shape == sample["input_ids"].shape else v for k, v in sample.items()}
        labels = batch.pop("labels")
        logits.append(model(**batch, use_cache=False).logits)
        targets = labels[0, 1:]
        losses.append(F.cross_entropy(logits[-1][0, :-1], targets, reduction="none")[targets >= 0])
    return logits, losses


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.content}-{c.loss_type}-{c.attention}")
def test_a_pack_has_logits_loss_and_gradients_of_its_samples(folders: dict[str, Path], case: Case) -> None:
    ours, theirs = build(folders[case.family], case), tiny_model(case.family).to(case.dtype)
    seen: list[Tensor] = []
    ours.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    output = ours(**PackCollator(CAPACITY, 0, ModelInputs(folders[case.family]))(case.samples))
    output["loss"].backward()

    logits, losses = logits_and_losses(theirs, case.samples)
    expected = {
        "default": torch.cat(losses).mean(),
        "per_token_loss": torch.cat(losses).sum(),
        "per_sample_loss": torch.stack([loss.mean() for loss in losses]).mean(),
    }[case.loss_type]
    expected.backward()
    tight = case.dtype == torch.float64
    everything = torch.cat(logits, dim=1)
    torch.testing.assert_close(seen[0][:, : everything.shape[1]], everything, rtol=0, atol=1e-9 if tight else 1e-5)
    torch.testing.assert_close(output["loss"], expected, rtol=1e-12 if tight else 1e-6, atol=0)
    assert output["loss_mask"].sum() == sum(map(len, losses))
    if case.loss_type == "per_token_loss":
        assert output["token_nums"] == sum(map(len, losses))
    for (name, a), b in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        found, wanted = (torch.zeros_like(p) if p.grad is None else p.grad for p in (a, b))
        error = (found - wanted).abs().max() / max(wanted.abs().max(), 1)
        assert error <= (1e-10 if tight else 1e-5), f"{name}: {error}"


def test_the_samples_of_a_pack_weigh_the_same_in_chunks(folders: dict[str, Path]) -> None:
    case = Case("qwen3_vl", "images and videos", "per_sample_loss")
    whole, chunked = build(folders[case.family], case), build(folders[case.family], case, "chunk")
    pack = PackCollator(CAPACITY, 0, ModelInputs(folders[case.family]))(case.samples)
    for model in (whole, chunked):
        model(**pack)["loss"].backward()
    for (name, a), b in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-10, msg=name)


def test_without_boundaries_the_samples_mix(folders: dict[str, Path]) -> None:
    """So the test above would see it if a model paid no attention to them."""
    case = Case("qwen3_vl", "several images")
    model = build(folders[case.family], case)
    pack = PackCollator(CAPACITY, 0, ModelInputs(folders[case.family]))(case.samples)
    apart = model(**pack)["loss"]
    del pack["cu_seqlens"]
    assert abs(model(**pack)["loss"] / apart - 1) > 1e-5


def test_sliding_windows_stay_within_a_sample(tmp_path: Path) -> None:
    """One layer sees everything, the other four tokens; Hugging Face's model sees each sample alone."""
    config = transformers.Qwen3Config(
        **{**tiny_model("qwen3").config.to_dict(), "use_sliding_window": True, "sliding_window": 4,
           "layer_types": ["full_attention", "sliding_attention"]}
    )  # fmt: skip
    config.architectures = ["Qwen3ForCausalLM"]
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM._from_config(config).save_pretrained(tmp_path)
    case = Case("qwen3", "text")
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=case.dtype)
    output = build(tmp_path, case)(**PackCollator(CAPACITY, 0, ModelInputs(tmp_path))(case.samples))
    _, losses = logits_and_losses(theirs, case.samples)
    torch.testing.assert_close(output["loss"], torch.cat(losses).sum(), rtol=1e-12, atol=0)


def test_a_layer_in_which_samples_would_mix_is_refused(folders: dict[str, Path]) -> None:
    case = Case("qwen3", "text")
    model = build(folders["qwen3"], case)
    model.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM has layers of type linear_attention.*set packing to false"):
        model(**PackCollator(CAPACITY, 0, ModelInputs(folders["qwen3"]))(case.samples))


def test_flash_attention_gets_the_boundaries(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel cannot run here; what it is called with is computed by hand."""
    case = Case("internvl", "one image", dtype=torch.float32)
    model = build(folders["internvl"], case)
    calls: list[dict[str, Any]] = []

    def kernel(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(kwargs)
        return query.transpose(1, 2), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "flash_attention_2", kernel)
    model.model.model.language_model.config._attn_implementation = "flash_attention_2"
    model(**PackCollator(CAPACITY, 0, ModelInputs(folders["internvl"]))(case.samples))
    assert len(calls) == 2
    for call in calls:
        assert call["cu_seq_lens_q"].tolist() == call["cu_seq_lens_k"].tolist() == [0, 13, 28, 64]
        assert call["max_length_q"] == call["max_length_k"] == 36
        assert call["cu_seq_lens_q"].dtype == torch.int32
