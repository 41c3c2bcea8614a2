from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mindspeed_mm.checkpoint.hf_export import export_hf
from mindspeed_mm.checkpoint.hf_folder import FileTensor, open_weights
from mindspeed_mm.checkpoint.hf_import import load_hf_weights
from mindspeed_mm.errors import UserError
from tests.checkpoint import hf
from tests.models.tiny import FAMILIES
from tests.ranks import RankPool

CASES = [(family, tie) for family in (*FAMILIES, "adapter") for tie in (False, True)]


def fresh(family: str, tie: bool = False) -> transformers.PreTrainedModel:
    """Return an eager model with other weights than any folder."""
    return hf.model_class(family)._from_config(hf.config_of(family, tie), dtype=torch.float32)


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_in_and_out_in_one_process(tmp_path: Path, family: str, tie: bool) -> None:
    expected = hf.write_folder(tmp_path / "in", family, tie)
    model = fresh(family, tie)
    assert load_hf_weights(model, tmp_path / "in") == []
    assert not hf.differing(expected, hf.tensors_of(model))

    export_hf(model, tmp_path / "out")
    native = getattr(transformers, hf.config_of(family, tie).architectures[0])
    assert not hf.differing(expected, hf.read_back(tmp_path / "out", native))
    assert hf.keys_on_disk(tmp_path / "in") == hf.keys_on_disk(tmp_path / "out"), "names as on the hub"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == ([native.__name__], "float32")


def test_in_and_out_on_two_ranks_from_meta(tmp_path: Path, ranks2: RankPool) -> None:
    cases = [(family, i % 2 == 0) for i, family in enumerate((*FAMILIES, "adapter"))]
    expected = [hf.write_folder(tmp_path / "in" / f"{f}-{t}", f, t, max_shard_size="60KB") for f, t in cases]
    imported = ranks2.run(hf.import_and_export, tmp_path / "in", tmp_path / "out", cases)[0]
    for (family, tie), reference, tensors in zip(cases, expected, imported, strict=True):
        assert not hf.differing(reference, tensors), family
        native = getattr(transformers, hf.config_of(family, tie).architectures[0])
        folder = tmp_path / "out" / f"{family}-{tie}"
        assert not hf.differing(reference, hf.read_back(folder, native)), family
        assert json.loads((folder / "config.json").read_text())["architectures"] == [native.__name__]
        assert len(list(folder.glob("*.safetensors"))) > 1 and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("layout", ["qwen2_5_vl", "glm4v_moe", "qwen3_vl_moe", "qwen3_vl_moe on the hub"])
def test_a_rank_reads_only_its_share(layout: str, tmp_path: Path, ranks2: RankPool) -> None:
    """Fused, transposed and stacked experts too."""
    family = layout.split()[0]
    hf.write_folder(tmp_path, family, False)
    if layout.endswith("hub"):
        transpose_experts(tmp_path)
    for read, kept in ranks2.run(hf.elements_read, tmp_path, family):
        assert read == kept


def test_a_weight_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hf.write_folder(tmp_path, "qwen2_5_vl", True)
    monkeypatch.setattr("mindspeed_mm.checkpoint.hf_folder._PIECE", 4 * 1000)
    model = fresh("qwen2_5_vl", True)
    sizes: list[int] = []
    read = FileTensor._read
    monkeypatch.setattr(FileTensor, "_read", lambda self, *where: sizes.append((t := read(self, *where)).numel()) or t)
    load_hf_weights(model, tmp_path)
    assert max(sizes) <= 1000 < max(tensor.numel() for tensor in expected.values()) and len(sizes) > len(expected)
    assert not hf.differing(expected, hf.tensors_of(model))


def test_blocks_of_a_file_are_those_of_the_tensor(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "brain": torch.randn(7, 5, 3).bfloat16(),
        "wide": torch.randn(6, 4, dtype=torch.float64),
        "flags": torch.rand(9) > 0.5,
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_weights(tmp_path) as stored:
        assert stored.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(stored[name].read(), tensor), name
            assert (stored[name].meta.shape, stored[name].meta.dtype) == (tensor.shape, tensor.dtype)
        some, cut, none, one = (slice(2, 6),), (slice(1, 4), slice(2, 5)), (slice(3, 3),), (slice(6, 7), slice(0, 5))
        for block in (some, cut, none, one):
            assert torch.equal(stored["brain"].read(block), tensors["brain"][block]), block
        assert torch.equal(stored["wide"].read((slice(0, 6), slice(1, 2))), tensors["wide"][:, 1:2])


def transpose_experts(folder: Path) -> None:
    """Give a Qwen3-VL-MoE folder the layout that the hub has."""
    weights = load_file(folder / "model.safetensors")
    hub = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in weights.items()}
    assert any(hub[k].shape != v.shape for k, v in weights.items())
    save_file(hub, folder / "model.safetensors")


def test_hub_layout_of_qwen3_vl_moe_experts(tmp_path: Path, ranks2: RankPool) -> None:
    expected = hf.write_folder(tmp_path, "qwen3_vl_moe", False)
    transpose_experts(tmp_path)
    for tensors in ranks2.run(hf.imported, tmp_path, "qwen3_vl_moe"):
        assert not hf.differing(expected, tensors)
    model = fresh("qwen3_vl_moe")
    load_hf_weights(model, tmp_path)
    assert not hf.differing(expected, hf.tensors_of(model))


def test_dtypes(tmp_path: Path) -> None:
    hf.write_folder(tmp_path / "in", "glm4v_moe", False)
    model = fresh("glm4v_moe").to(torch.bfloat16)
    load_hf_weights(model, tmp_path / "in")
    native = type(model).from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    assert not hf.differing(dict(native.named_parameters()), parameters)

    model = fresh("glm4v_moe")
    load_hf_weights(model, tmp_path / "in")
    export_hf(model, tmp_path / "out", dtype=torch.bfloat16)
    back = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert back.dtype == torch.bfloat16 and not hf.differing(parameters, dict(back.named_parameters()))
    bias = next(k for k in hf.keys_on_disk(tmp_path / "out") if "e_score_correction_bias" in k)
    assert load_file(tmp_path / "out" / "model.safetensors")[bias].dtype == torch.float32


def test_tie_broken_by_giving_storage_is_restored(tmp_path: Path) -> None:
    expected = hf.write_folder(tmp_path, "qwen3", True)
    with torch.device("meta"):
        model = fresh("qwen3", True)
    model.to_empty(device="cpu")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    load_hf_weights(model, tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


def test_tied_weight_stored_twice(tmp_path: Path) -> None:
    hf.write_folder(tmp_path, "qwen3", True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    load_hf_weights(fresh("qwen3", True), tmp_path)
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match='"tie_word_embeddings": false'):
        load_hf_weights(fresh("qwen3", True), tmp_path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    expected = hf.write_folder(tmp_path, "glm4v_moe", False)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.language_model.layers.1.mlp.experts.2.up_proj.weight"]
    del weights["lm_head.weight"]
    weights["model.visual.extra"] = torch.zeros(3)
    weights["model.language_model.norm.weight"] = torch.zeros(33)
    save_file(weights, tmp_path / "model.safetensors")
    model = fresh("glm4v_moe")
    before = {k: v.clone() for k, v in hf.tensors_of(model).items()}
    with pytest.raises(UserError) as error:
        load_hf_weights(model, tmp_path)
    text = str(error.value)
    assert "1 weights missing:\n  lm_head.weight" in text
    assert "1 weights not in the model:\n  model.visual.extra" in text
    assert "model.language_model.norm.weight: stored (33,), model (32,)" in text
    assert "1 weights in parts that do not fit together:\n  model.language_model.layers.1.mlp.experts.gate_up" in text
    assert str(tmp_path) in text
    assert not hf.differing(before, hf.tensors_of(model)), "nothing was touched"

    assert len(load_hf_weights(model, tmp_path, strict=False)) == 4
    left = hf.differing(expected, hf.tensors_of(model))
    assert sorted(left) == sorted(
        ["lm_head.weight", "model.language_model.norm.weight", "model.language_model.layers.1.mlp.experts.gate_up_proj"]
    )


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    model = fresh("qwen3")
    folder = tmp_path / "in"
    for message, prepare in {
        "no such Hugging Face folder": lambda: None,
        "has no weights: neither model.safetensors nor": folder.mkdir,
        "it has pytorch_model.bin, which is not read": (folder / "pytorch_model.bin").touch,
        "is not a readable safetensors file": lambda: (folder / "model.safetensors").write_bytes(b"version https"),
    }.items():
        prepare()
        with pytest.raises(UserError, match=message):
            load_hf_weights(model, folder)
    shutil.rmtree(folder)
    hf.write_folder(folder, "qwen3", False, max_shard_size="60KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=re.escape(f"files in its index:\n  {gone.name}")):
        load_hf_weights(model, folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(UserError, match="is not a safetensors index"):
        load_hf_weights(model, folder)


def test_export_copies_assets_and_replaces_an_earlier_export(tmp_path: Path) -> None:
    assets, out = tmp_path / "assets", tmp_path / "out"
    hf.write_folder(assets, "qwen3", False, max_shard_size="60KB")
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "generation_config.json"):
        (assets / name).write_text(f'{{"{name}": 1}}')
    model = fresh("qwen3")
    export_hf(model, out, assets, max_shard_bytes=60_000)
    (out / "notes.md").write_text("mine")
    assert len(list(out.glob("*.safetensors"))) > 1
    export_hf(model, out, assets)
    assert sorted(p.name for p in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "notes.md",
        "tokenizer.json",
    ]
    assert "generation_config.json" in (out / "generation_config.json").read_text()
    with pytest.raises(UserError, match="also the folder of the original weights"):
        export_hf(model, assets, assets)
    with pytest.raises(UserError, match="no such folder to take tokenizer"):
        export_hf(model, out, tmp_path / "nowhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["assets", "out"]


def test_failed_export_ends_all_ranks(tmp_path: Path, ranks2: RankPool) -> None:
    (tmp_path / "file").write_text("in the way")
    for message in ranks2.run(hf.failing_export, tmp_path / "file" / "out", "qwen3"):
        assert re.search(r"exporting to .*out failed on rank 0: NotADirectoryError", message)
