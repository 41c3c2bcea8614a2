"""The loss from logits and labels that are known, by every rule that trainers use: which one did each run follow?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("mean of all tokens", "mean of micro-batch means", "mean of sample means")
IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass handed to the loss.

    Attributes:
        logits: (B, S, V).
        labels: (B, S), not shifted, -100 where nothing is to be predicted.
        rank, index: where and when.
    """

    logits: Tensor
    labels: Tensor
    rank: int = 0
    index: int = 0


@dataclass(frozen=True)
class Candidate:
    """A rule and the loss it gives, in float64.

    Attributes:
        rule: one of :data:`RULES`.
        shift: by how many places the labels are shifted; 1 is right for a causal language model.
        keeps_ignored: tokens labelled -100 count as targets, by their absence of a label 0.
        value: of the global batch.
    """

    rule: str
    shift: int
    keeps_ignored: bool
    value: float

    def __str__(self) -> str:
        shift = "" if self.shift == 1 else f", labels shifted by {self.shift}"
        kept = ", ignored tokens counted in the mean" if self.keeps_ignored else ""
        return f"{self.rule}{shift}{kept}"


def candidates(batches: Sequence[MicroBatch], ignored: int = IGNORED) -> list[Candidate]:
    """Return the loss by every rule; the usual one first.

    Args:
        batches: all micro-batches of all ranks of one step.
        ignored: the label of tokens that are not predicted.
    """
    found = []
    for shift in (1, 0, 2):
        sums = [_sums(batch, shift, ignored) for batch in batches]
        for keeps in (False, True):
            for rule in RULES:
                found.append(Candidate(rule, shift, keeps, _reduce(sums, rule, keeps)))
    return found


def explain_loss(batches: Sequence[MicroBatch], loss: float, tolerance: float = 2e-6) -> list[Candidate]:
    """Return the rules that give this loss, to a relative tolerance; the simplest first.

    Where micro-batches hold equally many tokens several rules give the same.
    """
    return [c for c in candidates(batches) if abs(c.value - loss) <= tolerance * abs(loss)]


def logit_gradients(batches: Sequence[MicroBatch], rule: str = RULES[0], shift: int = 1) -> list[Tensor]:
    """Return the gradient of the loss by each micro-batch's logits, in float64."""
    leaves = [batch.logits.detach().double().requires_grad_(True) for batch in batches]
    sums = [_sums(MicroBatch(leaf, batch.labels), shift, IGNORED) for leaf, batch in zip(leaves, batches, strict=True)]
    _reduced(sums, rule, False).backward()
    return [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]


@dataclass(frozen=True)
class _Sums:
    """Of each sample: the summed loss, its targets, and all its places."""

    losses: Tensor
    targets: Tensor
    places: Tensor


def _sums(batch: MicroBatch, shift: int, ignored: int) -> _Sums:
    logits, labels = batch.logits.double(), batch.labels
    if shift:
        logits, labels = logits[:, :-shift], labels[:, shift:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="none").view_as(
        labels
    )
    return _Sums(losses.sum(1), (labels != ignored).sum(1), torch.full((len(labels),), labels.shape[1]))


def _reduce(sums: Sequence[_Sums], rule: str, keeps: bool) -> float:
    return float(_reduced(sums, rule, keeps))


def _reduced(sums: Sequence[_Sums], rule: str, keeps: bool) -> Tensor:
    counts = [(s.places if keeps else s.targets).clamp(min=1) for s in sums]
    if rule == RULES[0]:
        total = torch.stack([s.losses.sum() for s in sums]).sum()
        return total / torch.stack([(s.places if keeps else s.targets).sum() for s in sums]).sum().clamp(min=1)
    if rule == RULES[1]:
        means = [s.losses.sum() / (s.places if keeps else s.targets).sum().clamp(min=1) for s in sums]
        return torch.stack(means).mean()
    return torch.cat([s.losses / count for s, count in zip(sums, counts, strict=True)]).mean()
