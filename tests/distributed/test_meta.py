"""Meta initialisation: right buffers, kept ties, and the same weights for every world size."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mindspeed_mm.configs.fsdp2 import Fsdp2Config
from mindspeed_mm.distributed.fsdp2 import apply_fsdp2
from mindspeed_mm.distributed.meta import initialize, is_meta_init, materialize, meta_init, module_init
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.module import MultiModalModule
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin, WeightInitMixin
from tests.distributed.tiny import full, tiny
from tests.ranks import RankPool

CPU = torch.device("cpu")


@pytest.fixture
def poison() -> Any:
    """Fill uninitialised memory with NaN, so that a value nobody computed is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def digest(model: nn.Module) -> str:
    """Hash of all parameters as one process would see them."""
    sha = hashlib.sha256()
    for name, param in model.named_parameters(remove_duplicate=False):
        value = full(param.detach())
        assert not value.isnan().any(), name
        sha.update(name.encode() + value.numpy().tobytes())
    return sha.hexdigest()


class Initialised(MultiModalModule, FSDP2Mixin, WeightInitMixin):
    def __init__(self) -> None:
        super().__init__(config=None)
        self.embed = nn.Embedding(7, 5, padding_idx=0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(5, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("inv_freq", 1.0 / torch.arange(1, 4), persistent=False)
        self.register_buffer("running", torch.full((2,), 0.5))

    def post_meta_init(self) -> None:
        with torch.no_grad():
            self.gate.fill_(2.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden) * self.gate.sum()


def poisoned_meta(build: Any, **keys: Any) -> nn.Module:
    torch.use_deterministic_algorithms(True)
    try:
        with meta_init():
            assert is_meta_init()
            model = build()
        assert not is_meta_init() and all(param.is_meta for param in model.parameters())
        apply_fsdp2(model, Fsdp2Config(**keys))
        before = torch.get_rng_state()
        assert materialize(model, CPU, module_init(model), seed=11) == [name for name, _ in model.named_parameters()]
        assert torch.equal(torch.get_rng_state(), before)
        assert materialize(model, CPU, module_init(model), seed=12) == []
        return model
    finally:
        torch.use_deterministic_algorithms(False)


def check_custom(keys: dict[str, Any]) -> str:
    model = poisoned_meta(Initialised, **keys)
    assert torch.equal(model.inv_freq, 1.0 / torch.arange(1, 4)) and torch.equal(model.running, torch.full((2,), 0.5))
    assert model.head.weight is model.embed.weight
    assert torch.equal(full(model.gate.detach()), torch.full((3,), 2.0))
    assert torch.equal(full(model.layers[1][1].weight.detach()), torch.ones(5))
    model(torch.ones(2, 3, dtype=torch.long)).sum().backward()
    return digest(model)


def test_custom_model_starts_the_same_in_every_world_and_wrapping(ranks1: RankPool, ranks2: RankPool) -> None:
    wrapped = {"sub_modules_to_wrap": ["layers.{*}"]}
    found = [
        *ranks1.run(check_custom, wrapped),
        *ranks2.run(check_custom, wrapped),
        *ranks2.run(check_custom, {"sharding_size": "auto", **wrapped}),
        *ranks2.run(check_custom, {"sharding_size": "auto", "sub_modules_to_wrap": ["embed", "head", "layers.{1}"]}),
        *ranks2.run(check_custom, {"sharding_size": "auto", **wrapped, "ignored_modules": ["layers.{0}.{0}"]}),
    ]
    assert len(found) == 9 and len(set(found)) == 1


class AsAWhole(Initialised):
    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.layers[0][0].weight, std=self.head.bias.numel())
        nn.init.constant_(self.layers[1][0].weight, 3.0)


def check_as_a_whole() -> str:
    keys = {"sharding_size": "auto", "sub_modules_to_wrap": ["layers.{*}"]}
    model = poisoned_meta(AsAWhole, **keys)
    assert torch.equal(full(model.layers[1][0].weight.detach()), torch.full((5, 5), 3.0))
    assert 3 < full(model.layers[0][0].weight.detach()).std() < 12
    return digest(model)


def test_a_models_own_init_weights_sees_full_tensors(ranks1: RankPool, ranks2: RankPool) -> None:
    assert len({*ranks1.run(check_as_a_whole), *ranks2.run(check_as_a_whole)}) == 1


def check_no_scheme() -> None:
    with meta_init():
        model = tiny()
    apply_fsdp2(model, Fsdp2Config(sub_modules_to_wrap=[]))
    with pytest.raises(UserError, match="Tiny was built on the meta device and nothing says how"):
        materialize(model, CPU, module_init(model), seed=1)


def test_parameters_without_a_scheme_are_an_error(ranks2: RankPool) -> None:
    ranks2.run(check_no_scheme)


def test_plain_model_keeps_ties_and_real_tensors(poison: None) -> None:
    with meta_init():
        model = Initialised()
    model.extra = nn.Linear(2, 2)
    extra = model.extra.weight.clone()
    materialize(model, CPU, module_init(model), seed=11)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.extra.weight, extra)


def test_padding_rows_start_at_zero() -> None:
    model = Initialised()
    model.head.weight = nn.Parameter(torch.ones(7, 5))
    model.init_weights()
    assert torch.equal(model.embed.weight[0], torch.zeros(5)) and model.embed.weight[1].any()


def test_a_parameter_registered_twice_stays_one() -> None:
    with meta_init():
        model, shared = nn.Module(), nn.Parameter(torch.ones(2), requires_grad=False)
        model.a = shared
        model.b = shared
        model.c = model.a
    assert model.a is model.b is model.c and model.a.is_meta and not model.a.requires_grad


def test_initialize_depends_on_seed_and_path_only() -> None:
    one, two = Initialised(), Initialised()
    initialize(one, module_init(one), seed=1)
    torch.rand(3)
    initialize(two, module_init(two), seed=1)
    assert digest(one) == digest(two)
    assert not torch.equal(one.layers[0][0].weight, one.layers[1][0].weight)
    initialize(two, module_init(two), seed=2)
    assert digest(one) != digest(two)


def test_weights_loaded_inside_the_context_stay_real(tmp_path: Path, poison: None) -> None:
    import transformers as hf

    saved = hf.Qwen2ForCausalLM._from_config(hf.Qwen2Config(**TEXT))
    saved.save_pretrained(tmp_path)
    with meta_init():
        model = nn.ModuleDict({"encoder": hf.Qwen2ForCausalLM.from_pretrained(tmp_path), "new": nn.Linear(2, 2)})
    assert materialize(model, CPU, module_init(model)) == ["new.weight", "new.bias"]
    for (name, param), reference in zip(model["encoder"].named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(param, reference), name


def test_a_buffer_computed_from_a_parameter_is_an_error() -> None:
    with meta_init():
        model = nn.Linear(2, 2)
        model.register_buffer("copy", model.weight.detach().clone())
    with pytest.raises(UserError, match="Buffer 'copy'"):
        materialize(model, CPU)


def check_offload() -> None:
    with meta_init():
        model = Initialised()
    plan = apply_fsdp2(model, Fsdp2Config(sub_modules_to_wrap=["layers.{*}"], offload_to_cpu=True))
    materialize(model, CPU, module_init(model), shard_device=plan.shard_device)
    model(torch.ones(2, 3, dtype=torch.long)).sum().backward()


def test_offload_after_meta(ranks2: RankPool) -> None:
    ranks2.run(check_offload)


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 321,
    "max_position_embeddings": 512,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "temporal_patch_size": 2,
}
IDS = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}


def family(name: str, tied: bool) -> tuple[type, Any]:
    import transformers as hf

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    if name == "Qwen3VL":
        text = {**TEXT, "head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}}
        vision = {**VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **IDS)
        return hf.Qwen3VLForConditionalGeneration, config
    if name == "Qwen2_5_VL":
        text = {**TEXT, "rope_parameters": rope}
        vision = {**VISION, "window_size": 16, "fullatt_block_indexes": [1]}
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **IDS)
        return hf.Qwen2_5_VLForConditionalGeneration, config
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT, tie_word_embeddings=tied),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=300,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=tied,
    )
    return hf.InternVLForConditionalGeneration, config


def check_family(name: str, tied: bool) -> str:
    cls, config = family(name, tied)
    eager = cls._from_config(config)
    model = poisoned_meta(lambda: cls._from_config(config), sharding_size="auto")
    expected, found = dict(eager.named_buffers()), dict(model.named_buffers())
    assert list(found) == list(expected) and len(found) >= 2
    for key, value in expected.items():
        assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key
    is_tied = eager.get_input_embeddings().weight is eager.get_output_embeddings().weight
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == is_tied == tied
    for (key, param), reference in zip(model.named_parameters(), eager.parameters(), strict=True):
        value = full(param.detach())
        constant = reference.unique().numel() == 1
        assert torch.equal(value, reference) if constant else abs(value.std() / reference.std() - 1) < 0.3, key
    return digest(model)


@pytest.mark.parametrize(("name", "tied"), [("Qwen3VL", True), ("Qwen2_5_VL", False), ("InternVL", True)])
def test_hugging_face_models(ranks1: RankPool, ranks2: RankPool, name: str, tied: bool) -> None:
    assert len({*ranks1.run(check_family, name, tied), *ranks2.run(check_family, name, tied)}) == 1


def check_hf_recompute() -> None:
    cls, config = family("Qwen3VL", True)
    pixels = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[302, *[300] * 4, 303, 5, 6]])
    batch = {
        "input_ids": ids,
        "labels": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 300).long(),
    }
    gradients = []
    for recompute in ([], ["model.language_model.layers.{*}", "model.visual.blocks.{*}"]):
        torch.manual_seed(2)
        model = cls._from_config(config)
        model.model.visual.requires_grad_(False)
        model.model.language_model.embed_tokens.requires_grad_(False)
        apply_fsdp2(model, Fsdp2Config(sharding_size="auto", recompute_modules=recompute, use_reentrant=True))
        model.train()
        model(**batch).loss.backward()  # use_cache stays at HF's default, which fills a cache
        gradients.append({key: full(param.grad) for key, param in model.named_parameters()})
    for key, value in gradients[0].items():
        assert (value is None) == ("visual" in key or "embed_tokens" in key), key
        assert value is None or torch.equal(value, gradients[1][key]), key


def test_recompute_of_hugging_face_layers_behind_a_frozen_tower(ranks2: RankPool) -> None:
    ranks2.run(check_hf_recompute)
