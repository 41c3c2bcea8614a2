"""Every tiny family through TransformersModel: structure, loss, weights, and messages for what does not fit."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.distributed.meta import meta_init
from mindspeed_mm.distributed.recompute import recompute
from mindspeed_mm.errors import UserError
from mindspeed_mm.losses import chunked
from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.models.tiny import FAMILIES, save_tiny, tiny_batch, tiny_config, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved folder for each family, embeddings tied."""
    return {family: save_tiny(family, tmp_path_factory.mktemp(family), tie=True) for family in FAMILIES}


def images_of(family: str) -> list[int]:
    return [0, 0] if family == "qwen3" else [1, 0]


def build(folder: Path, **config: Any) -> TransformersModel:
    return TransformersModel({"init_from_hf_path": str(folder), **config})


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_hugging_face(folders: dict[str, Path], family: str) -> None:
    ours, theirs = build(folders[family]), tiny_model(family, tie=True)
    batch = tiny_batch(family, images_of(family))
    output, expected = ours(**batch), theirs(**batch, use_cache=False).loss
    assert set(output) == {"loss", "loss_mask"}
    assert output["loss_mask"].dtype == torch.bool
    assert torch.equal(output["loss_mask"][:, :-1], batch["labels"][:, 1:] >= 0)
    assert not output["loss_mask"][:, -1].any()
    torch.testing.assert_close(output["loss"], expected, rtol=1e-6, atol=0)
    output["loss"].backward()
    expected.backward()
    for (name, a), b in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_type", ["default", "per_sample_loss", "per_token_loss"])
def test_chunked_loss_equals_the_whole(folders: dict[str, Path], family: str, loss_type: str) -> None:
    whole = build(folders[family], loss_cfg={"loss_type": loss_type})
    chunked = build(folders[family], loss_cfg={"loss_type": loss_type, "compute_mode": "chunk", "chunk_size": 5})
    batch = tiny_batch(family, images_of(family))
    a, b = whole(**batch), chunked(**batch)
    torch.testing.assert_close(b["loss"], a["loss"], rtol=1e-6, atol=0)
    a["loss"].backward()
    b["loss"].backward()
    for (name, p), q in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-6, msg=name)
    assert chunked.model(input_ids=batch["input_ids"]).logits.shape == (2, 14, 320), "the head is itself again"


def test_per_token_loss_is_a_sum_and_a_count(folders: dict[str, Path]) -> None:
    batch = tiny_batch("qwen3", [0, 0])
    mean = build(folders["qwen3"])(**batch)
    total = build(folders["qwen3"], loss_cfg={"loss_type": "per_token_loss"})(**batch)
    assert total["token_nums"].dtype == torch.int64
    assert total["token_nums"] == mean["loss_mask"].sum()
    torch.testing.assert_close(total["loss"] / total["token_nums"], mean["loss"])


@pytest.fixture
def granite(tmp_path: Path) -> Path:
    """A model that divides its logits after the head."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    transformers.GraniteConfig(**sizes, num_key_value_heads=2, logits_scaling=4.0).save_pretrained(tmp_path)
    return tmp_path


def test_chunked_loss_refuses_a_model_that_changes_its_logits(granite: Path) -> None:
    batch = tiny_batch("qwen3", [0])
    assert build(granite, random_init=True, loss_cfg={"compute_mode": "default"})(**batch)["loss"].isfinite()
    with pytest.raises(UserError, match=r"compute_mode.*GraniteForCausalLM changes it"):
        build(granite, random_init=True, loss_cfg={"compute_mode": "chunk"})


def test_chunked_loss_refuses_a_model_that_changes_its_logits_in_place(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Warm(transformers.Qwen3ForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits.div_(2.0)
            return outputs

    monkeypatch.setitem(ModelHub.MODEL_MAPPINGS, "warm", Warm)
    with pytest.raises(UserError, match=r"compute_mode.*Warm changes it"):
        build(folders["qwen3"], model_id="warm", loss_cfg={"compute_mode": "chunk"})


def test_chunks_are_refused_when_the_output_is_cast_after_the_head(folders: dict[str, Path]) -> None:
    model = build(folders["qwen3"], loss_cfg={"compute_mode": "chunk"})
    model.model.register_forward_hook(lambda _, args, out: type(out)(logits=out.logits.bfloat16()))
    with pytest.raises(UserError, match="output_dtype of the fsdp2 yaml changes it"):
        model(**tiny_batch("qwen3", [0]))


def vocabularies_held(model: TransformersModel, batch: dict[str, Any]) -> bool:
    """Whether the logits of the whole micro-batch were kept for the backward pass."""
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(**batch)["loss"].backward()
    return any(320 in shape and 28 in shape for shape in kept)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_chunked(folders: dict[str, Path], family: str, meta: bool) -> None:
    with meta_init() if meta else nullcontext():
        build(folders[family], loss_cfg={"compute_mode": "chunk"})


def test_auto_chunks_large_logits_and_says_so(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = tiny_batch("qwen3", [0, 0])  # 28 tokens, 320 words
    model, whole = build(folders["qwen3"]), build(folders["qwen3"], loss_cfg={"compute_mode": "default"})
    monkeypatch.setattr(chunked, "LARGE_LOGITS", 28 * 320 * 4)
    assert vocabularies_held(model, batch)
    assert "loss:" not in capsys.readouterr().out
    monkeypatch.setattr(chunked, "LARGE_LOGITS", 28 * 320 * 4 - 1)
    assert not vocabularies_held(model, batch)
    assert vocabularies_held(whole, batch), "what is asked for is done"
    torch.testing.assert_close(model(**batch)["loss"], whole(**batch)["loss"])
    out = capsys.readouterr().out
    assert "28 tokens x 320 words, would take 0.0 GiB in fp32. They are computed 1024 tokens at a time." in out
    assert out.count("loss:") == 1


def test_auto_holds_logits_that_the_model_changes(
    granite: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = tiny_batch("qwen3", [0])
    torch.manual_seed(0)
    auto = build(granite, random_init=True)
    torch.manual_seed(0)
    whole = build(granite, random_init=True, loss_cfg={"compute_mode": "default"})
    monkeypatch.setattr(chunked, "LARGE_LOGITS", 0)
    for _ in range(2):
        assert torch.equal(auto(**batch)["loss"], whole(**batch)["loss"])
    assert capsys.readouterr().out.count("They are held whole: GraniteForCausalLM changes it.") == 1


@pytest.mark.parametrize(("loss_type", "fused"), [("default", 1), ("per_token_loss", 1), ("per_sample_loss", 0)])
def test_a_fused_kernel_is_preferred_where_it_can_be_used(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, loss_type: str, fused: int
) -> None:
    calls = []

    def kernel(head: Any, hidden: Any, targets: Any) -> Any:
        calls.append(hidden.shape)
        return torch.nn.functional.cross_entropy(hidden @ head.weight.T, targets, reduction="sum")

    expected = build(folders["qwen3"], loss_cfg={"loss_type": loss_type})
    monkeypatch.setattr("mindspeed_mm.accelerator.fused_linear_cross_entropy", lambda: kernel)
    model = build(folders["qwen3"], loss_cfg={"loss_type": loss_type, "compute_mode": "chunk"})
    batch = tiny_batch("qwen3", [0, 0])
    torch.testing.assert_close(model(**batch)["loss"], expected(**batch)["loss"])
    assert len(calls) == fused


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "glm4v_moe"])
def test_router_loss_equals_hugging_face(folders: dict[str, Path], family: str, recomputed: bool) -> None:
    theirs = tiny_model(family, tie=True)
    theirs.config.text_config.router_aux_loss_coef = 0.5
    batch = tiny_batch(family, [1, 0])
    batch["attention_mask"][1, -3:] = 0
    batch["labels"][1, -3:] = -100
    expected = theirs(**batch, use_cache=False, output_router_logits=True)
    model = build(folders[family], loss_cfg={"router_aux_loss_coef": 0.5})
    summed = build(folders[family], loss_cfg={"router_aux_loss_coef": 0.5, "loss_type": "per_token_loss"})
    if recomputed:
        for layer in (*model.model.model.language_model.layers, *summed.model.model.language_model.layers):
            recompute(layer)
    found, total = model(**batch), summed(**batch)
    assert not found["aux_loss"].requires_grad
    torch.testing.assert_close(found["aux_loss"], expected.aux_loss)
    torch.testing.assert_close(found["loss"], expected.loss)
    torch.testing.assert_close(total["loss"] / total["token_nums"], expected.loss)
    expected.loss.backward()
    found["loss"].backward()
    (total["loss"] / total["token_nums"]).backward()
    gates = [name for name, _ in theirs.named_parameters() if name.endswith("mlp.gate.weight")]
    assert gates
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(model.model.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(summed.model.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-7)


def test_router_loss_of_frozen_routers_is_an_error(tmp_path: Path) -> None:
    model = build(save_tiny("qwen3_vl_moe", tmp_path), loss_cfg={"router_aux_loss_coef": 0.5})
    for name, parameter in model.model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    with pytest.raises(UserError, match="router loss has no gradient"):
        model(**tiny_batch("qwen3_vl_moe", [0]))


def test_router_loss_of_a_model_without_routers(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="router_aux_loss_coef: Qwen3ForCausalLM has no router loss"):
        build(folders["qwen3"], loss_cfg={"router_aux_loss_coef": 0.1})(**tiny_batch("qwen3", [0]))


def test_image_tokens_are_found_when_the_batch_does_not_say(folders: dict[str, Path]) -> None:
    model, batch = build(folders["qwen3_vl"]), tiny_batch("qwen3_vl", [1, 2])
    expected = model(**batch)["loss"]
    del batch["mm_token_type_ids"]
    assert torch.equal(model(**batch, position_ids=None)["loss"], expected)


@pytest.mark.parametrize("kind", [ModelConfig, SimpleNamespace])
def test_config_may_be_an_object(folders: dict[str, Path], kind: Any) -> None:
    config = kind(init_from_hf_path=str(folders["qwen3"]), model_id="qwen3", trust_remote_code=False)
    assert TransformersModel(config).hf_path == str(folders["qwen3"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [True, False])
def test_meta_init_has_the_structure_and_the_buffers(
    folders: dict[str, Path], tmp_path: Path, family: str, tie: bool
) -> None:
    tiny_config(family, tie).save_pretrained(tmp_path)
    with meta_init():
        model = build(tmp_path)
    real = tiny_model(family, tie)
    assert model.weights_source == model.hf_path
    assert {n: p.shape for n, p in model.model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())
    assert (model.model.get_output_embeddings().weight is model.model.get_input_embeddings().weight) is tie
    for (name, a), (_, b) in zip(model.model.named_buffers(), real.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_weights_are_read_in_fp32_and_stay_tied(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny_model("qwen3", tie=True).bfloat16().save_pretrained(tmp_path)
    model = build(tmp_path)
    assert model.weights_source is None and model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    assert all(name.startswith("model.") for name in model.state_dict())
    expected = tiny_model("qwen3", tie=True).bfloat16().float()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_random_init_needs_no_weights_and_follows_the_seed(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build(tmp_path, random_init=True))
    weights = [m.model.lm_head.weight for m in models]
    assert models[0].weights_source is None
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("asked", ["flash_attention_2", "varlen_fa"])
def test_flash_attention_falls_back_with_a_line(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    model = build(
        folders["qwen3_vl"],
        image_encoder={"vision_encoder": {"attn_implementation": "eager", "attn_layout": "TND"}},
        text_decoder={"attn_implementation": asked, "attn_layout": "BNSD"},
    )
    assert f"text_decoder.attn_implementation: {asked} cannot run here" in capsys.readouterr().out
    assert model.model.model.visual.config._attn_implementation == "eager"
    assert model.model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"init_from_hf_path": ""}, "init_from_hf_path is missing"),
        ({"init_from_hf_path": "no/such"}, "'no/such' is not a folder"),
        ({"loss_cfg": {"loss_type": "per_tokn_loss"}}, "Did you mean 'per_token_loss'"),
        ({"loss_cfg": {"compute_mode": "chunked"}}, "loss_cfg.compute_mode: 'chunked' is not known"),
        ({"text_decoder": {"attn_implementation": "spda"}}, "text_decoder.attn_implementation.*Did you mean 'sdpa'"),
    ],
)
def test_bad_values_are_named(folders: dict[str, Path], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TransformersModel({"init_from_hf_path": str(folders["qwen3"]), **config})


def test_batch_without_labels(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no 'labels'"):
        build(folders["qwen3"])(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_folder_without_weights(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no weights"):
        build(tmp_path)


def test_weights_that_do_not_fit(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folders["qwen3"], tmp_path, dirs_exist_ok=True)
    changed = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 3}
    changed.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"missing keys: model\.layers\.2\..* and 6 more"):
        build(tmp_path)
    build(tmp_path, load_strict=False)
    assert "missing keys" in capsys.readouterr().out


def test_config_of_an_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_like_it"}')
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        build(tmp_path)
