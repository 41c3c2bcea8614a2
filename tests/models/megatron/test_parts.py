"""Parts of the model by themselves, at the sizes of published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.deepstack import spread
from mindspeed_mm.models.megatron.norm import Norm
from mindspeed_mm.models.megatron.rotary import RotaryAngles
from mindspeed_mm.models.megatron.split_images import divide

SIZES: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rotary(kind: str) -> Any:
    """Return Transformers' module of a published model's angles."""
    if kind == "sections":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        config: Any = transformers.Qwen2_5_VLConfig(text_config={**SIZES, "rope_parameters": rope}).text_config
        return Qwen2_5_VLRotaryEmbedding(config)
    if kind == "interleaved":
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
        config = transformers.Qwen3VLConfig(text_config={**SIZES, "head_dim": 128, "rope_parameters": rope}).text_config
        return Qwen3VLTextRotaryEmbedding(config)
    rope = LLAMA3 if kind == "llama3" else {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3RotaryEmbedding(transformers.Qwen3Config(**SIZES, head_dim=128, rope_parameters=rope))


@pytest.mark.parametrize("kind", ["sections", "interleaved", "llama3", "plain"])
def test_angles(kind: str) -> None:
    theirs = rotary(kind)
    positions = torch.randint(0, 3000, (3, 2, 50), generator=torch.Generator().manual_seed(0))
    if kind in ("llama3", "plain"):
        positions = positions[0]
    cos, sin = theirs(torch.zeros(1), positions)
    ours = RotaryAngles(theirs)(positions)
    assert ours.shape == (50, 2, 1, 128)
    torch.testing.assert_close(ours[:, :, 0].transpose(0, 1).cos(), cos, rtol=0, atol=0)
    torch.testing.assert_close(ours[:, :, 0].transpose(0, 1).sin(), sin, rtol=0, atol=0)


def test_angles_of_text_alone_are_those_of_equal_coordinates() -> None:
    angles = RotaryAngles(rotary("interleaved"))
    positions = torch.arange(20).expand(2, 20)
    assert torch.equal(angles(positions), angles(positions.expand(3, 2, 20)))


def test_a_scaling_that_angles_do_not_have_is_refused() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    theirs = Qwen3RotaryEmbedding(transformers.Qwen3Config(**SIZES, head_dim=128, rope_parameters=rope))
    with pytest.raises(UserError, match="'yarn'"):
        RotaryAngles(theirs)


def test_casting_the_model_leaves_the_angles() -> None:
    angles, positions = RotaryAngles(rotary("sections")), torch.arange(5000)[None]
    before = angles(positions)
    assert torch.equal(angles.bfloat16()(positions), before)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norms(normalization: str) -> None:
    class Config:
        params_dtype, sequence_parallel = torch.float32, True

    Config.normalization = normalization  # type: ignore[attr-defined]
    norm, x = Norm(Config, 16, eps=1e-5), torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * 5 + 1
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    centred = x - x.mean(-1, keepdim=True) if normalization == "LayerNorm" else x
    right = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), right, rtol=1e-6, atol=1e-6)
    assert all(p.sequence_parallel for p in norm.parameters())


def test_features_at_their_places() -> None:
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    features = [torch.arange(6.0).view(3, 2) + 10 * layer for layer in range(2)]
    found = spread(features, mask)
    assert found.shape == (2, 4, 2, 2)
    right = torch.zeros(2, 4, 2, 2)
    for layer in range(2):
        for row, (sample, position) in enumerate([(0, 1), (0, 3), (1, 0)]):
            right[layer, position, sample] = features[layer][row]
    assert torch.equal(found, right)


@pytest.mark.parametrize("sizes", [[], [4], [4, 4], [100, 1, 1, 1], [1, 1, 1, 100], [3, 5, 2, 8, 1, 1, 7]])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_image_has_one_rank(sizes: list[int], ranks: int) -> None:
    shares = divide(sizes, ranks)
    assert len(shares) == ranks
    assert [i for share in shares for i in share] == list(range(len(sizes)))
    if sizes:
        heaviest = max(sum(sizes[i] for i in share) for share in shares)
        assert heaviest <= sum(sizes) / ranks + max(sizes)
