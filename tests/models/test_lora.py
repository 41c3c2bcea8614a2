"""Adapters in a model: where they go, what they start from, and that peft computes and merges the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mindspeed_mm.checkpoint.adapters import export_adapter
from mindspeed_mm.checkpoint.lora_merge import lora_merge
from mindspeed_mm.checkpoint.tensors import named_tensors
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.lora import LoraSettings, add_adapters, initialize_adapters
from mindspeed_mm.models.transformers.families import family_of
from tests.models.tiny import save_tiny, tiny_batch, tiny_config, tiny_model
from tests.ranks import RankPool

peft = pytest.importorskip("peft")

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
CASES: dict[str, tuple[str, LoraSettings]] = {
    "text and vision": ("qwen3_vl", LoraSettings(("q_proj", "v_proj", "attn.qkv"), r=4)),
    "every linear layer": ("internvl", LoraSettings(("all-linear",), alpha=3)),
    "experts": ("qwen3_vl_moe", LoraSettings(("o_proj",), EXPERTS, r=2)),
}


def adapted(folder: Path, family: str, settings: LoraSettings, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model and put adapters into it that change what it computes."""
    model = load(folder, family, dtype)
    add_adapters(model, settings, family_of(model.config), str(folder))
    return model


def load(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Any:
    model_class = getattr(transformers, tiny_config(family).architectures[0])
    return model_class.from_pretrained(folder, dtype=dtype).train()


def stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)


def logits_of_the_sharded(folder: Path, family: str, settings: LoraSettings) -> Tensor:
    """Shard, initialise, export the adapters and return the logits."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    from mindspeed_mm.distributed.fsdp2 import prepare_model

    model, whole = (adapted(folder / "base", family, settings) for _ in range(2))
    stir(whole)
    prepare_model(model)
    for (name, parameter), (_, value) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        if ".lora_" in name:
            assert isinstance(parameter, DTensor), name
            full = distribute_tensor(value.detach(), parameter.device_mesh, parameter.placements)
            parameter.data.to_local().copy_(full.to_local())
    export_adapter(model, folder / "adapter")
    with torch.no_grad():
        return model.eval()(**tiny_batch(family, [1, 0])).logits


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_and_merges_the_same(
    case: str, world_size: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    family, settings = CASES[case]
    save_tiny(family, tmp_path / "base")
    results = request.getfixturevalue(f"ranks{world_size}").run(logits_of_the_sharded, tmp_path, family, settings)
    batch = tiny_batch(family, [1, 0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: how a product is split over threads shows in its last bit
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(load(tmp_path / "base", family), str(tmp_path / "adapter")).eval()
        expected, unadapted = model(**batch).logits, load(tmp_path / "base", family).eval()(**batch).logits
    torch.set_num_threads(threads)
    assert all(torch.equal(result, expected) for result in results)
    assert (expected - unadapted).abs().max() > 0.1

    lora_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert_equal(load(tmp_path / "merged", family), model.merge_and_unload())


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == actual.keys()
    assert not [name for name, value in expected.items() if not torch.equal(value, actual[name])]


def test_merging_into_tied_bfloat16_weights(tmp_path: Path) -> None:
    tiny_model("qwen3_vl", tie=True).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", "qwen3_vl", LoraSettings(("down_proj", "qkv")), torch.float32)
    stir(model)
    export_adapter(model, tmp_path / "adapter")
    lora_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    base = load(tmp_path / "base", "qwen3_vl", torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    assert_equal(load(tmp_path / "merged", "qwen3_vl", torch.bfloat16), theirs)
    with pytest.raises(UserError, match=r"adapter does not fit the model in \S+other"):
        lora_merge(save_tiny("internvl", tmp_path / "other"), tmp_path / "adapter", tmp_path / "none")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 48
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not fit the model in \S+base; .*\n.*down_proj.lora_A.weight: .*64.*48"):
        lora_merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "none")
    with pytest.raises(UserError, match=r"no adapters there: adapter_config\.json and"):
        lora_merge(tmp_path / "base", tmp_path / "base", tmp_path / "none")


def first_values(seed: int, on_meta: bool = False, sharded: bool = True) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    from mindspeed_mm.distributed.fsdp2 import prepare_model
    from mindspeed_mm.distributed.meta import materialize, meta_init

    if on_meta:
        with meta_init():
            model = type(tiny_model("qwen3_vl"))._from_config(tiny_config("qwen3_vl"))
            add_adapters(model, LoraSettings(("q_proj",)))
    else:
        model = tiny_model("qwen3_vl")
        add_adapters(model, LoraSettings(("q_proj",)))
    if sharded:
        prepare_model(model)
    materialize(model, torch.device("cpu"))
    initialize_adapters(model, seed)
    adapters = ((n, p.detach()) for n, p in model.named_parameters() if ".lora_" in n)
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in adapters}


def test_first_values_depend_on_the_seed_alone(ranks2: RankPool) -> None:
    expected = first_values(1, sharded=False)
    for name, value in expected.items():
        bound = 1 / math.sqrt(value.shape[1])  # kaiming_uniform_ with a = sqrt(5)
        assert not value.any() if "lora_B" in name else 0.8 * bound < value.abs().max() <= bound
    first, second = (value for name, value in expected.items() if "lora_A" in name)
    assert not torch.equal(first, second)
    for on_meta in (False, True):
        for actual in ranks2.run(first_values, 1, on_meta):
            assert expected.keys() == actual.keys()
            assert all(torch.equal(value, actual[name]) for name, value in expected.items())
    other = first_values(2, sharded=False)
    assert not any(torch.equal(value, other[name]) for name, value in expected.items() if "lora_A" in name)


class Custom(nn.Module):
    """Torch's own attention, a tied pair, and a layer whose name is a part of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.up = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3))
        self.embedding = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize(
    ("words", "apply", "expected"),
    [
        (("up",), ("all",), {"up"}),
        (("blocks.{0,2}",), ("all",), {"blocks.0.0", "blocks.2.0"}),
        (("blocks", "up"), ("blocks.{1-2}",), {"blocks.1.0", "blocks.2.0"}),
        (("1.0", "up"), ("all",), {"blocks.1.0", "up"}),
    ],
)
def test_where_adapters_go(words: tuple[str, ...], apply: tuple[str, ...], expected: set[str]) -> None:
    model = Custom()
    names = {name for names in named_tensors(model) for name in names}
    add_adapters(model, LoraSettings(words, apply_modules=apply))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0] for name in trained} == expected
    assert {name for names in named_tensors(model, "base") for name in names} == names
    assert {name for names in named_tensors(model, "adapters") for name in names} == trained


class Twice(nn.Module):
    """The paths of one part are the ends of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.tower["layers"][0](x))


def test_a_path_that_ends_like_a_target_gets_no_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain = Twice(), Twice()
    plain.load_state_dict(model.state_dict())
    add_adapters(model, LoraSettings(("layers.{0}",)), base="somewhere")
    stir(model)
    assert {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad} == {"layers.0"}
    export_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    x = torch.randn(2, 4)
    assert torch.equal(model(x), theirs(x))

    model = Twice()
    model.tower.requires_grad_(False)
    with pytest.raises(UserError, match=r"peft cannot tell tower\.layers\.\{0-1\} from a target"):
        add_adapters(model, LoraSettings((), ("layers.0.weight", "layers.1.weight")))


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(UserError, match="all-linear: Sequential has no linear layer"):
        add_adapters(nn.Sequential(nn.Conv1d(2, 2, 1)), LoraSettings(("all-linear",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            LoraSettings(("upp",)),
            r"'upp' matches no module\. Did you mean 'up'\? The linear layers are called up, 0, head",
        ),
        (LoraSettings(("out_proj",)), r"'out_proj' matches attention\.out_proj .* and no linear layer is there"),
        (LoraSettings(("blocks.{0-3}.0",)), r"--lora-target-modules: 'blocks\.\{0-3\}\.0': 'blocks' has no 3"),
        (LoraSettings(("all-linear",)), r"head shares its weight with others \(embedding\.weight, head\.weight\)"),
        (LoraSettings(("up",), apply_modules=("block",)), r"--lora-apply-modules: 'block' .* Did you mean 'blocks'"),
        (LoraSettings(("up",), apply_modules=("blocks",)), r"none of the targets is in there, they are up"),
        (LoraSettings(("up",), ("experts",)), r"--lora-target-parameters: 'experts' is the end of no parameter"),
        (LoraSettings((), ("0.weight",), dropout=0.1), r"--lora-dropout 0\.1: adapters of parameters cannot"),
        (LoraSettings(("weight",)), r"'weight' is no module but a parameter, .*--lora-target-parameters instead"),
    ],
)
def test_mistakes(settings: LoraSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapters(Custom(), settings)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora-target-modules needs a package .* pip install 'mindspeed-mm\[lora\]'"):
        add_adapters(Custom(), LoraSettings(("up",)))
