"""From model.json to a class: the order of the ways, and what is said when none works."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mindspeed_mm.models.common.modelzoo as modelzoo
import mindspeed_mm.models.transformers.modelhub as modelhub
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.plugins import load_plugin
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin, WeightInitMixin
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.models.tiny import FAMILIES, save_tiny, tiny_batch, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def clean_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelHub, "MODEL_MAPPINGS", dict(ModelHub.MODEL_MAPPINGS))


def test_both_import_paths_are_one_object() -> None:
    assert modelzoo.ModelHub is modelhub.ModelHub


class Mine(nn.Module):
    pass


class ByType(nn.Module):
    pass


def test_order_is_id_then_architecture_then_model_type_then_auto() -> None:
    config = tiny_config("qwen3")
    ModelHub.MODEL_MAPPINGS["mine"] = Mine
    ModelHub.register("qwen3")(ByType)
    assert ModelHub.build({"model_id": "mine"}, config) is Mine
    assert ModelHub.build({"model_id": "unknown"}, config) is transformers.Qwen3ForCausalLM
    config.architectures = None
    assert ModelHub.build({}, config) is ByType
    del ModelHub.MODEL_MAPPINGS["qwen3"]
    assert ModelHub.build({}, config) is transformers.Qwen3ForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["id", "architecture", "auto"])
def test_every_family_is_found_in_every_way(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(family)
    architecture = config.architectures[0]
    if how != "architecture":
        config.architectures = None
    if how == "auto":
        monkeypatch.setattr(ModelHub, "MODEL_MAPPINGS", {})
    found = ModelHub.build({"model_id": family if how == "id" else None}, config)
    assert found is getattr(transformers, architecture)


def test_unknown_id_that_resolves_to_nothing() -> None:
    config = transformers.PreTrainedConfig()
    config.architectures = ["SomebodysModel"]
    with pytest.raises(UserError, match=r"'qwen3_vll' is not registered\. Did you mean 'qwen3_vl'\?") as caught:
        ModelHub.build({"model_id": "qwen3_vll"}, config)
    for part in ("SomebodysModel", "glm4v_moe", "--plugin", "--trust-remote-code"):
        assert part in str(caught.value)


def test_id_of_another_model_type() -> None:
    with pytest.raises(UserError, match=r"model_id 'qwen3_vl' is Qwen3VL.*model_type 'qwen3_vl_moe'"):
        ModelHub.build({"model_id": "qwen3_vl"}, tiny_config("qwen3_vl_moe"))


PLUGIN = '''
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin, WeightInitMixin


class ChatConfig(PreTrainedConfig):
    model_type = "tiny_internvl_chat"

    def __init__(self, llm_config=None, **kwargs):
        self.llm_config = Qwen3Config(**(llm_config or {}))
        super().__init__(**kwargs)


class InternVLChatModel(PreTrainedModel):
    """The shape of a third party's model: a vision_model, an mlp1, a complete language_model."""

    config_class = ChatConfig
    _supports_sdpa = True
    _no_split_modules = ["Qwen3DecoderLayer"]

    def __init__(self, config, vision_model=None, language_model=None, use_flash_attn=True):
        super().__init__(config)
        self.vision_model = nn.Linear(4, 8)
        self.mlp1 = nn.Linear(8, config.llm_config.hidden_size)
        self.language_model = Qwen3ForCausalLM(config.llm_config)
        self.post_init()

    def forward(self, input_ids, pixel_values, attention_mask=None, use_cache=None):
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        embeds[:, 0] = self.mlp1(self.vision_model(pixel_values))
        output = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=use_cache)
        return CausalLMOutput(logits=output.logits)


class InternVLChatModelGeneration(InternVLChatModel, FSDP2Mixin, WeightInitMixin):
    def __init__(self, config, vision_model=None, language_model=None, use_flash_attn=True):
        super().__init__(config)

    def freeze(self, config):
        self.vision_model.requires_grad_(not config["image_encoder"]["vision_encoder"]["freeze"])


AutoConfig.register(ChatConfig.model_type, ChatConfig)
ModelHub.MODEL_MAPPINGS["internvl_chat"] = InternVLChatModelGeneration
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Any:
    """A user's file, imported; forgotten again afterwards."""
    path = tmp_path / "chat_plugin.py"
    path.write_text(PLUGIN)
    yield load_plugin(str(path))
    del sys.modules["chat_plugin"]
    sys.path.remove(str(tmp_path))
    transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content.pop("tiny_internvl_chat")


def test_documented_adapter_from_a_plugin_trains(plugin: Any, tmp_path: Path) -> None:
    text = tiny_config("qwen3").to_dict()
    plugin.ChatConfig(llm_config=text).save_pretrained(tmp_path / "model")
    config = {
        "model_id": "internvl_chat",
        "init_from_hf_path": str(tmp_path / "model"),
        "random_init": True,
        "image_encoder": {"vision_encoder": {"freeze": True}},
    }
    model = TransformersModel(config)
    assert type(model.model) is plugin.InternVLChatModelGeneration
    batch: dict[str, Tensor] = tiny_batch("qwen3", [0, 0])
    batch["pixel_values"] = batch["input_ids"][:, :4].float() / 300
    model(**batch)["loss"].backward()
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.grad is None} == {"vision_model"}
    assert load_plugin(str(tmp_path / "chat_plugin.py")) is plugin, "a second --plugin imports nothing twice"


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_reads_the_published_weights_of_its_parent(family: str, tmp_path: Path) -> None:
    parent = getattr(transformers, tiny_config(family).architectures[0])
    adapter = type(f"{family}_adapter", (parent, FSDP2Mixin, WeightInitMixin), {"__module__": __name__})
    ModelHub.MODEL_MAPPINGS["adapter"] = adapter
    save_tiny(family, tmp_path)
    model = TransformersModel({"model_id": "adapter", "init_from_hf_path": str(tmp_path)}).model
    assert type(model) is adapter
    for (name, found), expected in zip(model.named_parameters(), tiny_model(family).parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_plugin_may_be_a_module() -> None:
    assert load_plugin("tests.models.tiny").FAMILIES == FAMILIES


@pytest.mark.parametrize(
    ("plugin_name", "content", "message"),
    [
        ("no_such_file.py", None, "there is no file '.*no_such_file.py'"),
        ("no.such.module", None, "no file and no module 'no.such.module'"),
        ("broken_one.py", "import math\nmath.nothing", r"AttributeError at .*broken_one\.py:2"),
        ("broken_two.py", "x = (", r"SyntaxError at .*broken_two\.py:1"),
        ("broken_three.py", "import not_installed_at_all", r"ModuleNotFoundError at .*broken_three\.py:1"),
        ("json.py", "", "would hide the module 'json'"),
    ],
)
def test_plugin_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin_name: str, content: str | None, message: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    if content is not None:
        (tmp_path / plugin_name).write_text(content)
        plugin_name = str(tmp_path / plugin_name)
    with pytest.raises(UserError, match=message):
        load_plugin(plugin_name)
