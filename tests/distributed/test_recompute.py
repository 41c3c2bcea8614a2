from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from mindspeed_mm.distributed.recompute import _keep_products, recompute
from mindspeed_mm.errors import UserError
from tests.distributed.tiny import Tiny, batches, full, loss_of, shard, tiny
from tests.ranks import RankPool


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    torch.manual_seed(5)
    loss_of(model, batches(1)[0]).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def recomputing(keep: str | None = None, **kwargs: Any) -> Tiny:
    model = tiny(**kwargs)
    for layer in model.layers:
        recompute(layer, keep)
        recompute(layer, keep)
    return model


@pytest.mark.parametrize("keep", [None, "matmul"])
@pytest.mark.parametrize("kwargs", [{"dropout": 0.5}, {"frozen": ("embed", "tower")}, {"frozen": ("layers.1",)}])
def test_gradients_are_bit_equal_and_nothing_is_renamed(kwargs: dict[str, Any], keep: str | None) -> None:
    plain, model = tiny(**kwargs), recomputing(keep, **kwargs)
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


@pytest.mark.parametrize("keep", [None, "matmul"])
def test_a_cache_that_comes_by_position_is_left_out(keep: str | None) -> None:
    """As GPT-2's blocks get it, unless the caller says use_cache=False."""
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
    ids = torch.tensor([[1, 4, 2, 7]])
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).train()
        for block in model.transformer.h if recomputed else ():
            recompute(block, keep)
        torch.manual_seed(5)
        model(ids, labels=ids, use_cache=recomputed).loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    """A transformer layer in small, with dropout in and after attention."""

    def __init__(self, attention_dropout: float) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.attention_dropout = attention_dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, dropout_p=self.attention_dropout)
        return x + dropout(self.out(y.transpose(1, 2).flatten(2)).sigmoid().exp(), 0.3)


class Watch(TorchDispatchMode):
    """Counts operators, and the bytes of what they produced that is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.produced: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self.produced[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def alive(self) -> int:
        return sum(size for reference, size in self.produced.values() if not reference.expired())


def run_attention(
    keep: str | None, recomputes: bool, attention_dropout: float
) -> tuple[list[torch.Tensor], int, Counter[str]]:
    """Return gradients, bytes kept between forward and backward, and the operators of backward."""
    torch.manual_seed(2)
    layers = nn.Sequential(*(Attention(attention_dropout) for _ in range(3)))
    x = torch.randn(2, 64, 16, requires_grad=True)
    for layer in layers if recomputes else ():
        recompute(layer, keep)
    with Watch() as watch:
        loss = layers(x).square().sum()
        kept = watch.alive()
        watch.calls.clear()
        loss.backward()
    return [x.grad, *(p.grad for p in layers.parameters())], kept, watch.calls


@pytest.mark.parametrize("attention_dropout", [0.0, 0.5])
def test_keeping_products_lies_between_all_and_nothing(attention_dropout: float) -> None:
    plain, kept_plain, calls_plain = run_attention(None, False, attention_dropout)
    whole, kept_whole, calls_whole = run_attention(None, True, attention_dropout)
    matmul, kept_matmul, calls_matmul = run_attention("matmul", True, attention_dropout)
    for gradients in (whole, matmul):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients, strict=True))
    assert kept_whole < kept_matmul < kept_plain
    # Two linear layers in each of three blocks, as many again in backward of each.
    products = {name: calls_whole[name] - calls_plain[name] for name in ("addmm", "bmm") if calls_whole[name]}
    assert products["addmm"] == 6
    assert all(calls_matmul[name] == calls_plain[name] for name in products)
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert calls_whole[attention] == (0 if attention_dropout else 3) and calls_matmul[attention] == 0
    assert calls_matmul["native_layer_norm"] == calls_whole["native_layer_norm"] == 3


def sharded_gradients(**keys: Any) -> dict[str, torch.Tensor]:
    model = tiny(dropout=0.5)
    shard(model, **{"sharding_size": "auto", "sub_modules_to_wrap": ["layers.{*}"], **keys})
    torch.manual_seed(7 + torch.distributed.get_rank())
    loss_of(model, batches(2)[torch.distributed.get_rank()]).backward()
    return {name: full(param.grad) for name, param in model.named_parameters()}


def check_sharded() -> None:
    expected = sharded_gradients()
    for keep in (None, "matmul"):
        found = sharded_gradients(recompute_modules=["layers.{*}"], recompute_keep=keep)
        assert all(torch.equal(expected[name], found[name]) for name in expected), keep
    other = sharded_gradients(recompute_modules=["layers.{*}"], recompute_keep="matmul", sharding_size=1)
    assert all(torch.equal(expected[name], other[name]) for name in expected)
    with pytest.raises(UserError, match=r"recompute_keep: nothing is recomputed"):
        shard(tiny(), recompute_keep="matmul")


def test_under_fsdp2_gradients_are_bit_equal_with_dropout(ranks2: RankPool) -> None:
    ranks2.run(check_sharded)


def test_attention_that_draws_random_numbers_runs_again() -> None:
    q = torch.empty(1, 2, 8, 8)
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    kept = [
        _keep_products(None, flash, q, q, q),
        _keep_products(None, flash, q, q, q, 0.0),
        _keep_products(None, efficient, q, q, q, None, True, dropout_p=0.0),
    ]
    again = [
        _keep_products(None, flash, q, q, q, 0.1),
        _keep_products(None, efficient, q, q, q, None, True, dropout_p=0.1),
        _keep_products(None, torch.ops.aten.native_dropout.default, q, 0.1, True),
    ]
    assert set(kept) == {CheckpointPolicy.MUST_SAVE} and set(again) == {CheckpointPolicy.PREFER_RECOMPUTE}
