"""The reductions against loops written out by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.losses import (
    REDUCTIONS,
    cross_entropy_sums,
    head_returns_loss_sums,
    linear_cross_entropy,
    mean_token_loss,
    per_sample_loss,
    shift_labels,
    spread_over_samples,
    token_sum_loss,
)

B, S, V, H = 3, 7, 11, 5


@pytest.fixture
def labels() -> Tensor:
    """Three samples with 6, 3 and no targets; the last one marks its padding with -1."""
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))
    labels[1, :4] = -100
    labels[2] = -1
    return labels


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 4, 5, 100])
def test_losses_and_gradients_equal_a_naive_loop_in_fp64(labels: Tensor, chunk_size: int | None, bias: bool) -> None:
    """The loop is written with nothing but exp and log, so that not even torch's cross entropy is shared."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias, dtype=torch.float64)
    hidden = torch.randn(B, S, H, dtype=torch.float64, requires_grad=True)
    leaves = [hidden, *head.parameters()]

    samples = []
    for b in range(B):
        row = []
        for s in range(S - 1):
            if (label := int(labels[b, s + 1])) >= 0:
                scores = [(head.weight[v] * hidden[b, s]).sum() + (head.bias[v] if bias else 0) for v in range(V)]
                row.append(-(scores[label].exp() / sum(score.exp() for score in scores)).log())
        samples.append(row)
    count = sum(len(row) for row in samples)
    expected = {
        "default": sum(sum(row) for row in samples) / count,
        "per_sample_loss": sum(sum(row) / len(row) for row in samples if row) / B,
        "per_token_loss": sum(sum(row) for row in samples),
    }
    targets = shift_labels(labels)
    counts = (targets >= 0).sum(dim=1)
    for name, by_hand in expected.items():
        if chunk_size is None:
            loss = REDUCTIONS[name](cross_entropy_sums(head(hidden), targets), counts)
        elif name == "per_sample_loss":
            divisors = spread_over_samples(B * counts.clamp(min=1), S)
            with head_returns_loss_sums(head, targets, chunk_size, divisors=divisors):
                loss = head(hidden).sum()
        else:
            with head_returns_loss_sums(head, targets, chunk_size):
                loss = REDUCTIONS[name](head(hidden), counts)
        torch.testing.assert_close(loss, by_hand, rtol=1e-13, atol=0)
        found = torch.autograd.grad(loss, leaves)
        for a, b in zip(found, torch.autograd.grad(by_hand, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(B, S, V, generator=torch.Generator().manual_seed(1))
    return values.to(dtype).requires_grad_()


def by_hand(logits: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """Cross entropy of every target token, sample by sample."""
    return [
        [F.cross_entropy(row[s].float(), label[s + 1]) for s in range(S - 1) if label[s + 1] >= 0]
        for row, label in zip(logits, labels, strict=True)
    ]


def sums_and_counts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    targets = shift_labels(labels)
    return cross_entropy_sums(logits, targets), (targets >= 0).sum(dim=1)


def test_labels_move_one_position_to_the_left() -> None:
    shifted = shift_labels(torch.tensor([[5, 6, 7], [-100, -1, 8]]))
    assert shifted.tolist() == [[6, 7, -100], [-100, 8, -100]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_equal_loops(labels: Tensor, dtype: torch.dtype) -> None:
    sums, counts = sums_and_counts(logits(dtype), labels)
    tokens = by_hand(logits(dtype), labels)
    assert sums.dtype == torch.float32
    assert counts.tolist() == [6, 3, 0]
    everything = torch.stack([t for row in tokens for t in row])
    torch.testing.assert_close(token_sum_loss(sums, counts), everything.sum())
    torch.testing.assert_close(mean_token_loss(sums, counts), everything.mean())
    of_samples = [torch.stack(row).mean() if row else torch.zeros(()) for row in tokens]
    torch.testing.assert_close(per_sample_loss(sums, counts), torch.stack(of_samples).mean())


def test_mean_has_the_gradient_of_torch_bit_for_bit(labels: Tensor) -> None:
    ours, theirs = logits(), logits()
    mean_token_loss(*sums_and_counts(ours, labels)).backward()
    F.cross_entropy(
        theirs[:, :-1].flatten(0, 1), labels[:, 1:].flatten().where(labels[:, 1:].flatten() >= 0, -100)
    ).backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_double_precision_is_kept(labels: Tensor) -> None:
    assert sums_and_counts(logits(torch.float64), labels)[0].dtype == torch.float64


@pytest.mark.parametrize("name", REDUCTIONS)
def test_no_target_at_all_gives_zero_with_a_gradient(name: str) -> None:
    x = logits()
    loss = REDUCTIONS[name](*sums_and_counts(x, torch.full((B, S), -100)))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("split", [1, 3])
def test_per_sample_mean_does_not_depend_on_the_split(labels: Tensor, split: int) -> None:
    sums, counts = sums_and_counts(logits(), labels)
    parts = [per_sample_loss(s, c) for s, c in zip(sums.chunk(split), counts.chunk(split), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), per_sample_loss(sums, counts))


@pytest.mark.parametrize("kernel", [None, partial(linear_cross_entropy, chunk_size=4)])
@pytest.mark.parametrize("chunk_size", [1, 3, S, 100])
def test_chunks_equal_the_whole(labels: Tensor, chunk_size: int, kernel: Any) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V), torch.randn(B, S, H, requires_grad=True)
    targets = shift_labels(labels)
    divisors = torch.tensor([1, 2, 3])  # so that each sample's sum has a gradient of its own

    whole = (cross_entropy_sums(head(hidden), targets) / divisors).sum()
    expected = torch.autograd.grad(whole, [hidden, *head.parameters()])
    with head_returns_loss_sums(head, targets, chunk_size, kernel, spread_over_samples(divisors, S)):
        (chunked,) = head(hidden)
    found = torch.autograd.grad(chunked, [hidden, *head.parameters()])

    torch.testing.assert_close(chunked, whole)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert head(hidden).shape == (B, S, V), "the head is itself again"


def test_chunks_never_hold_all_logits() -> None:
    head, hidden = nn.Linear(H, V, bias=False), torch.randn(B, S, H, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t)
    with hooks, head_returns_loss_sums(head, shift_labels(torch.ones(B, S, dtype=torch.long)), 2):
        head(hidden)
    assert kept and all(V not in shape for shape in kept)


@pytest.mark.parametrize("bias", [True, False])
def test_chunks_of_a_bf16_head_are_the_whole_bit_for_bit(labels: Tensor, bias: bool) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(H, V, bias=bias).bfloat16(), torch.randn(B, S, H).bfloat16().requires_grad_()
    targets = shift_labels(labels)
    whole = cross_entropy_sums(head(hidden), targets)
    with head_returns_loss_sums(head, targets, 4):
        chunked = head(hidden)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked.sum(), whole.sum(), rtol=1e-6, atol=0)  # added up in another order
    (expected,) = torch.autograd.grad(whole.sum(), hidden)
    (found,) = torch.autograd.grad(chunked.sum(), hidden)
    assert torch.equal(found, expected)


def test_a_forward_that_somebody_else_replaced_is_kept(labels: Tensor) -> None:
    head, hidden = nn.Linear(H, V), torch.randn(B, S, H)
    plain, head.forward = head.forward, lambda x: plain(2 * x)
    with head_returns_loss_sums(head, shift_labels(labels), 4, kernel=lambda *_: pytest.fail("knows only the weights")):
        found = head(hidden)
    assert torch.equal(head(hidden), plain(2 * hidden))
    torch.testing.assert_close(found.sum(), cross_entropy_sums(plain(2 * hidden), shift_labels(labels)).sum())


def test_a_kernel_gives_one_sum_for_all_samples(labels: Tensor) -> None:
    head, hidden, targets = nn.Linear(H, V), torch.randn(B, S, H), shift_labels(labels)

    def kernel(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
        assert (hidden.shape, targets.shape) == ((B * S, H), (B * S,))
        return F.cross_entropy(F.linear(hidden, head.weight, head.bias), targets, reduction="sum")

    counts = (targets >= 0).sum(dim=1)
    with head_returns_loss_sums(head, targets, 4, kernel):
        found = head(hidden)
    whole = cross_entropy_sums(head(hidden), targets)
    assert found.shape == (1,)
    for name in ("default", "per_token_loss"):
        torch.testing.assert_close(REDUCTIONS[name](found, counts), REDUCTIONS[name](whole, counts))
