"""The mixins, and the documented ways in which a model takes sharding into its own hands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from mindspeed_mm.distributed.fsdp2 import prepare_model
from mindspeed_mm.distributed.meta import materialize, meta_init, module_init
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.module import MultiModalModule
from mindspeed_mm.models.transformers.base_model import (
    FSDP2Mixin,
    WeightInitMixin,
    expand_range_pattern,
    expand_wildcard_pattern,
    get_nested_module,
    get_submodules_by_path,
    set_fullyshard_modules_to_wrap,
    set_modules_to_prefetch,
    set_recompute_modules_to_wrap,
)
from tests.distributed.tiny import Tiny, assert_same_gradients, tiny
from tests.ranks import RankPool

YAML = """
sharding_size: auto
sub_modules_to_wrap: ["layers.{0,2}", "layers.{1-1}", "tower.{*}"]
recompute_modules: ["layers.{*}"]
num_to_forward_prefetch: 2
num_to_backward_prefetch: 2
"""


class Custom(MultiModalModule, FSDP2Mixin, WeightInitMixin):
    def __init__(self) -> None:
        super().__init__(config=None)
        Tiny.build(self)  # type: ignore[arg-type]

    forward = Tiny.forward


class Plain(Tiny, FSDP2Mixin, WeightInitMixin):
    pass


class HelperStrategy(Plain):
    """As the migration guide writes it: helpers without a model."""

    def _fully_shard(self, fsdp2_kwargs: Any = None, fsdp2_config: Any = None) -> None:
        set_recompute_modules_to_wrap()
        set_fullyshard_modules_to_wrap()
        num_to_forward_prefetch = getattr(self.fsdp2_config, "num_to_forward_prefetch", 0)
        num_to_backward_prefetch = getattr(self.fsdp2_config, "num_to_backward_prefetch", 0)
        set_modules_to_prefetch(num_to_forward_prefetch, num_to_backward_prefetch)


class NoArguments(Plain):
    """The other form of the guide, which returns nothing."""

    def fully_shard(self) -> None:  # type: ignore[override]
        HelperStrategy._fully_shard(self)


class ExplicitHelpers(Plain):
    def _fully_shard(self, fsdp2_kwargs: Any = None, fsdp2_config: Any = None) -> None:
        set_recompute_modules_to_wrap(self, ["layers.{*}"])
        set_fullyshard_modules_to_wrap(self, ["layers.{*}", "tower.{*}"], **fsdp2_kwargs)
        set_modules_to_prefetch(self, fsdp2_config, 2, 2)


class OwnCalls(Tiny):
    """No mixin: PyTorch's own function with the keyword arguments of the yaml."""

    def _fully_shard(self, fsdp2_kwargs: dict[str, Any], fsdp2_config: Any) -> None:
        for module in (*self.layers, *self.tower):
            fully_shard(module, **fsdp2_kwargs)
        fully_shard(self, **fsdp2_kwargs)
        set_recompute_modules_to_wrap()
        set_modules_to_prefetch(fsdp2_config.num_to_forward_prefetch, fsdp2_config.num_to_backward_prefetch)


class Declines(Tiny):
    def fully_shard(self, process_group: Any, fsdp2_config_path: str, **kwargs: Any) -> bool:
        return False


class Outer(MultiModalModule):
    """Passes the work on to the model inside, where the paths of the yaml start."""

    def __init__(self) -> None:
        super().__init__(None)
        self.model = Plain()

    def fully_shard(self, process_group: Any = None, fsdp2_config_path: str | None = None, **kwargs: Any) -> bool:
        return self.model.fully_shard(process_group=process_group, fsdp2_config_path=fsdp2_config_path)

    def forward(self, *args: Any) -> torch.Tensor:
        return self.model(*args)


CLASSES = [Custom, Plain, HelperStrategy, NoArguments, ExplicitHelpers, OwnCalls, Declines, Outer]


def check_class(index: int, path: str) -> list[str]:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return CLASSES[index]()

    model = build()
    plan = prepare_model(model, None, path)
    inner = model.model if isinstance(model, Outer) else model
    wrapped = [name for name, module in inner.named_modules() if isinstance(module, FSDPModule)]
    assert wrapped == ["", "tower.0", "tower.1", "layers.0", "layers.1", "layers.2"]
    assert plan.ignored == []
    assert len(inner.tower[0]._get_fsdp_state()._states_to_forward_prefetch) == 2
    assert_same_gradients(model, build())
    assert [layer.calls for layer in inner.layers] == [2, 2, 2]
    return [row.pattern for row in plan.rows]


@pytest.mark.parametrize("index", range(len(CLASSES)), ids=lambda i: CLASSES[i].__name__)
def test_override(ranks2: RankPool, tmp_path: Path, index: int) -> None:
    path = tmp_path / "fsdp2_config.yaml"
    path.write_text(YAML)
    assert ranks2.run(check_class, index, str(path))[0] == ["tower.{0-1}", "layers.{0-2}"]


def check_direct_call_with_meta(path: str) -> None:
    with meta_init():
        model = Plain()
    assert model.fully_shard(fsdp2_config_path=path) is True
    assert not any(param.is_meta or param.full_tensor().isnan().any() for param in model.parameters())
    with meta_init():
        trained = Plain()
    prepare_model(trained, None, path)
    assert all(param.is_meta for param in trained.parameters()), "the trainer decides where the values come from"
    materialize(trained, torch.device("cpu"), module_init(trained), seed=0)


def test_meta_parameters_of_a_model_sharded_by_hand(ranks2: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "fsdp2_config.yaml"
    path.write_text(YAML)
    ranks2.run(check_direct_call_with_meta, str(path))


def test_helpers_need_a_model_outside_of_sharding() -> None:
    with pytest.raises(UserError, match="no model is being sharded"):
        set_fullyshard_modules_to_wrap()


def test_path_helpers() -> None:
    model = tiny()
    assert get_nested_module(model, "layers.1") is model.layers[1]
    assert expand_wildcard_pattern(model, "layers.{*}.linear") == [f"layers.{i}.linear" for i in range(3)]
    assert expand_range_pattern("a.{0-1,4}.b.{2}") == ["a.0.b.2", "a.1.b.2", "a.4.b.2"]
    assert get_submodules_by_path(model, ["layers.{0}", "layers.{0-1}"]) == [model.layers[0], model.layers[1]]


def test_multimodal_module_keeps_what_pipelines_ask_for() -> None:
    module = MultiModalModule(config=None)
    module.set_input_tensor(torch.ones(1))
    assert module.config is None and module.input_tensor is not None
    assert module._get_num_layers(4) == 4
