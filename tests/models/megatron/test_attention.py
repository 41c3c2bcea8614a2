"""Core attention against the textbook formula, and what it must not do: hold scores of s x s."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.attention import CoreAttention

CAUSAL, BOTH_WAYS = SimpleNamespace(name="causal"), SimpleNamespace(name="no_mask")
HEADS, GROUPS, SIZE = 4, 2, 8


def attention(mask_type: Any = CAUSAL, scale: float | None = None, **config: Any) -> CoreAttention:
    settings = {"attention_dropout": 0.0, "kv_channels": SIZE, "sequence_parallel": False}
    settings |= {"context_parallel_size": 1, "tensor_model_parallel_size": 1}
    return CoreAttention(SimpleNamespace(**settings | config), 1, mask_type, "self", softmax_scale=scale)


def inputs(length: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((length, batch, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)  # type: ignore[return-value]


def by_hand(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Return (s, b, h * d) with the scores written out; ``visible`` is broadcast to (b, h, s, s)."""
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, dim=2) for tensor in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(2)


def assert_equal(actual: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    gradient = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=actual.dtype)
    ours, theirs = (torch.autograd.grad(out, leaves, gradient) for out in (actual, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def lower(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("scale", [None, 0.5])
def test_causal(scale: float | None) -> None:
    leaves = inputs(11)
    expected = by_hand(*leaves, lower(11), scale or SIZE**-0.5)
    assert_equal(attention(scale=scale)(*leaves, None), expected, leaves)


def test_not_causal() -> None:
    leaves = inputs(11)
    expected = by_hand(*leaves, torch.tensor(True), SIZE**-0.5)
    assert_equal(attention(BOTH_WAYS)(*leaves, None), expected, leaves)
    assert torch.equal(attention()(*leaves, None, attn_mask_type=BOTH_WAYS), attention(BOTH_WAYS)(*leaves, None))


def test_padding_mask_beside_causality() -> None:
    leaves, hidden = inputs(6), torch.zeros(2, 1, 1, 6, dtype=torch.bool)
    hidden[1, ..., 4:] = True
    for mask_type, around in ((CAUSAL, lower(6)), (BOTH_WAYS, torch.tensor(True))):
        expected = by_hand(*leaves, ~hidden & around, SIZE**-0.5)
        assert_equal(attention(mask_type)(*leaves, hidden), expected, leaves)


@pytest.mark.parametrize("thd", [True, False])
def test_packed_sequences_do_not_see_each_other(thd: bool) -> None:
    leaves = inputs(12, batch=1)
    ends = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    params = SimpleNamespace(cu_seqlens_q=ends, cu_seqlens_q_padded=None)
    owner = torch.tensor([0] * 5 + [1] + [2] * 6)
    expected = by_hand(*leaves, lower(12) & (owner[:, None] == owner), SIZE**-0.5)
    given = [leaf.squeeze(1) for leaf in leaves] if thd else leaves
    out = attention()(*given, None, packed_seq_params=params)
    assert out.dim() == (2 if thd else 3)
    assert_equal(out.view(12, 1, -1), expected, leaves)


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that any operator returns."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.seen.add(tuple(tensor.shape))
        return out

    def __enter__(self) -> Shapes:
        self.seen: set[tuple[int, ...]] = set()
        super().__enter__()
        return self


def test_no_scores_are_held() -> None:
    """The kernel may return no more than its result and one number for each query, forward and backward."""
    length = 53  # prime: a product of nothing else here
    leaves = inputs(length)
    with Shapes() as shapes:
        attention()(*leaves, None).sum().backward()
    assert not [shape for shape in shapes.seen if shape.count(length) > 1]
    with Shapes() as shapes:
        attention()(*leaves, torch.zeros(1, 1, 1, length, dtype=torch.bool))
    assert [shape for shape in shapes.seen if shape.count(length) > 1], "the probe sees nothing"


def test_dropout_only_in_training() -> None:
    leaves = inputs(8)
    with_dropout = attention(attention_dropout=0.5)  # where nothing is split nobody seeds megatron-core's tracker
    torch.manual_seed(0)
    assert not torch.equal(with_dropout(*leaves, None), with_dropout(*leaves, None))
    assert torch.equal(with_dropout.eval()(*leaves, None), attention()(*leaves, None))


@pytest.mark.parametrize(("key", "value"), [("window_size", (4, 0)), ("softmax_type", "off-by-one")])
def test_what_is_not_computed_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        attention(**{key: value})
