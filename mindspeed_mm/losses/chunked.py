"""Cross entropy without ever holding the logits of the whole micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mindspeed_mm.losses.cross_entropy import token_losses

LARGE_LOGITS = 2 * 2**30
"""Bytes of fp32 logits from which on they are the peak of a step; see :func:`logits_bytes`."""

Kernel = Callable[..., Tensor]
"""``kernel(head, hidden, targets)`` with (N, H) and (N,): the summed cross entropy, a scalar in fp32. One that takes
``divisors`` too, (N,), divides each token's by its own."""


def logits_bytes(tokens: int, vocabulary: int) -> int:
    """Return the size of the fp32 logits of so many tokens, padding included.

    Cross entropy on whole logits holds about three times as much at its peak: what the head returned, the log
    probabilities, and the gradient of both.
    """
    return 4 * tokens * vocabulary


@dataclass
class HeadResult:
    """What the head returned, to be compared with what the model passed on.

    Attributes:
        sums: (1,), fp32; None unless the head was called with the targets' shape.
    """

    sums: Tensor | None = None


@contextmanager
def head_returns_loss_sums(
    head: nn.Module,
    targets: Tensor,
    chunk_size: int,
    kernel: Kernel | None = None,
    divisors: Tensor | None = None,
) -> Iterator[HeadResult]:
    """Make ``head(hidden)`` return the summed cross entropy of all tokens, (1,), instead of the logits.

    A kernel computes it where the head is a plain ``nn.Linear``. Otherwise the tokens of the micro-batch are cut into
    chunks, the last of which may be shorter. Each chunk's logits are made, reduced to a loss for each token and
    dropped; the backward pass makes them again. At any time ``chunk_size * V`` logits exist instead of ``B * S * V``,
    for one more pass through the head.

    The head's own forward computes each chunk, so LoRA or a forward that somebody has replaced work as they are. It
    has to happen inside the head's call, because only there are the parameters of an FSDP unit gathered.

    Args:
        head: the output projection, called once with (B, S, H) while this context is open.
        targets: (B, S) from :func:`~mindspeed_mm.losses.cross_entropy.shift_labels`.
        chunk_size: tokens of each chunk.
        kernel: computes the sum in one go.
        divisors: (B, S), what the loss of each token is divided by.
    """
    project, replaced = head.forward, "forward" in vars(head)
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not replaced
    result = HeadResult()

    def losses_of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_losses(project(hidden), targets)

    def in_chunks(_: nn.Module, hidden: Tensor, targets: Tensor, divisors: Tensor | int = 1) -> Tensor:
        chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
        losses = [checkpoint(losses_of_chunk, h, t, use_reentrant=False) for h, t in chunks]
        return (torch.cat(losses) / divisors).sum()

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != targets.shape:
            return project(hidden)  # the caller sees that there are no sums
        options = {} if divisors is None else {"divisors": divisors.flatten()}
        total = (kernel if kernel and plain else in_chunks)(head, hidden.flatten(0, 1), targets.flatten(), **options)
        result.sums = torch.stack([total])  # FSDP wants no view
        return result.sums

    head.forward = forward
    try:
        yield result
    finally:
        if replaced:
            head.forward = project
        else:
            del head.forward
