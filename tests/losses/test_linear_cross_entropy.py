"""The cross entropy whose gradients are computed in the forward pass, against PyTorch's on whole logits."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.losses import linear_cross_entropy

N, H, V = 23, 5, 11


def tensors(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor]:
    """Return a projection, hidden states and targets, of which some are none."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[[0, 4, 5, 6, 22]] = -100
    return head, hidden, targets


def on_whole_logits(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).to(torch.float64), targets, reduction="sum")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, N, 100])
def test_sum_and_gradients_are_those_of_whole_logits(bias: bool, chunk_size: int) -> None:
    head, hidden, targets = tensors(bias)
    leaves = [hidden, *head.parameters()]
    whole = on_whole_logits(head, hidden, targets)
    found = linear_cross_entropy(head, hidden, targets, chunk_size)
    torch.testing.assert_close(found, whole, rtol=1e-14, atol=0)
    for factor in (0.25, 3.0):  # a second backward pass finds what the first one found
        expected = torch.autograd.grad(factor * whole, leaves, retain_graph=True)
        for a, b in zip(torch.autograd.grad(factor * found, leaves, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_each_token_may_have_a_divisor_of_its_own(chunk_size: int) -> None:
    head, hidden, targets = tensors(bias=True)
    leaves, divisors = [hidden, *head.parameters()], torch.arange(1, N + 1)
    whole = (F.cross_entropy(head(hidden), targets, reduction="none") / divisors).sum()
    found = linear_cross_entropy(head, hidden, targets, chunk_size, divisors)
    torch.testing.assert_close(found, whole, rtol=1e-14, atol=0)
    expected = torch.autograd.grad(2.0 * whole, leaves)
    for a, b in zip(torch.autograd.grad(2.0 * found, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("chunk_size", "tokens", "words"), [(1, 128, 1000), (300, 128, 1000), (300, 7, 4)])
def test_gradients_of_bf16_weights_are_added_up_in_fp32(
    chunk_size: int, tokens: int, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of one token: added up in bf16, the gradient of a word would lose what is small beside it."""
    module = importlib.import_module(linear_cross_entropy.__module__)  # the package has the function by that name
    monkeypatch.setattr(module, "_PRECISE_TOKENS", tokens)
    monkeypatch.setattr(module, "_WORDS", words)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(512, H, generator=generator).bfloat16().requires_grad_()
    head, targets = nn.Linear(H, V, dtype=torch.bfloat16), torch.randint(V, (512,), generator=generator)
    found = linear_cross_entropy(head, hidden, targets, chunk_size)
    assert found.dtype == torch.float32
    leaves = [hidden, head.weight, head.bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    whole = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    torch.testing.assert_close(found.double(), whole.detach(), rtol=1e-2, atol=0)
    expected = torch.autograd.grad(whole, exact)
    for gradient, of_exact in zip(torch.autograd.grad(found, leaves), expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - of_exact).norm() / of_exact.norm() < 4e-3  # half a step of bf16


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"], ["hidden"]])
def test_what_needs_no_gradient_gets_none(frozen: list[str]) -> None:
    head, hidden, targets = tensors(bias=True)
    leaves = {"hidden": hidden, **dict(head.named_parameters())}
    for name in frozen:
        leaves.pop(name).requires_grad_(False)
    expected = torch.autograd.grad(on_whole_logits(head, hidden, targets), list(leaves.values()))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        found = linear_cross_entropy(head, hidden, targets, 4)
    for a, b in zip(torch.autograd.grad(found, list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert sorted(kept) == sorted(tuple(leaf.shape) for leaf in leaves.values()), "and no logits"


def test_nothing_is_kept_for_a_backward_pass_that_does_not_come() -> None:
    head, hidden, targets = tensors(bias=True)
    with torch.no_grad():
        found = linear_cross_entropy(head, hidden, targets, 4)
    assert not found.requires_grad
    torch.testing.assert_close(found, on_whole_logits(head, hidden, targets).detach())


def test_no_target_at_all_gives_zero_with_a_gradient() -> None:
    head, hidden, targets = tensors(bias=True)
    found = linear_cross_entropy(head, hidden, torch.full_like(targets, -100), 4)
    assert found.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(found, [hidden, *head.parameters()]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    head, hidden, targets = tensors(bias=False)
    with torch.no_grad():
        hidden[7] = value
    whole, found = on_whole_logits(head, hidden, targets), linear_cross_entropy(head, hidden, targets, 4)
    torch.testing.assert_close(found, whole, equal_nan=True)
    ignored = hidden.detach().clone()
    ignored[7], ignored[0] = 0, value  # a token without a target counts for nothing, whatever its logits are
    torch.testing.assert_close(linear_cross_entropy(head, ignored, targets, 4), on_whole_logits(head, ignored, targets))


def test_a_target_outside_of_the_vocabulary_is_an_error() -> None:
    head, hidden, targets = tensors(bias=False)
    targets[3] = V
    with pytest.raises(RuntimeError, match="index 11 is out of bounds"):
        linear_cross_entropy(head, hidden, targets, 4)
