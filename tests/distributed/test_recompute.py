from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mindspeed_mm.distributed.recompute import recompute
from tests.distributed.tiny import Tiny, batches, loss_of, tiny


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(5)
    loss_of(model, batches(1)[0]).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def recomputing(**kwargs: Any) -> Tiny:
    model = tiny(**kwargs)
    for layer in model.layers:
        recompute(layer)
        recompute(layer)
    return model


@pytest.mark.parametrize("kwargs", [{"dropout": 0.5}, {"frozen": ("embed", "tower")}, {"frozen": ("layers.1",)}])
def test_gradients_are_bit_equal_and_nothing_is_renamed(kwargs: dict[str, Any]) -> None:
    plain, model = tiny(**kwargs), recomputing(**kwargs)
    expected, found = gradients(plain), gradients(model)
    assert list(found) == list(expected) and list(model.state_dict()) == list(plain.state_dict())
    assert type(model.layers[0]) is type(plain.layers[0])
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(gradient, found[name]), name
    assert [layer.calls for layer in model.layers] == [2, 2, 2]


def test_without_gradients_nothing_changes() -> None:
    model = recomputing()
    with torch.no_grad():
        model(*batches(1)[0])
    assert [layer.calls for layer in model.layers] == [1, 1, 1]


def test_a_deep_copy_runs_its_own_weights() -> None:
    model = recomputing()
    twin = copy.deepcopy(model)
    nn.init.zeros_(model.layers[0].linear.weight)
    gradients(twin)
    assert twin.layers[0].calls == 2 and model.layers[0].calls == 0


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(
        self, x: torch.Tensor, past_key_values: list[Any] | None = None, use_cache: bool = True
    ) -> torch.Tensor:
        if use_cache and past_key_values is not None:
            past_key_values.append(x)
            x = x * len(past_key_values)
        return self.linear(x)


def test_a_cache_is_used_only_without_gradients() -> None:
    layer, cache = Caching(), []
    recompute(layer)
    layer(torch.ones(1, 2), past_key_values=cache, use_cache=True).sum().backward()
    assert cache == []
    with torch.no_grad():
        layer(torch.ones(1, 2), past_key_values=cache, use_cache=True)
    assert len(cache) == 1
