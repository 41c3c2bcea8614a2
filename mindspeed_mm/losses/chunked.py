"""Cross entropy without ever holding the logits of the whole micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mindspeed_mm.losses.cross_entropy import sum_by_sample, token_losses

LARGE_LOGITS = 2 * 2**30
"""Bytes of fp32 logits from which on they are the peak of a step; see :func:`logits_bytes`."""

FusedKernel = Callable[[nn.Linear, Tensor, Tensor], Tensor]
"""``kernel(head, hidden, targets)`` with (N, H) and (N,): the summed cross entropy, a scalar in fp32."""


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
        sums: one for each sample, or (1,) from a kernel, fp32; None unless the head was called with the targets' shape.
    """

    sums: Tensor | None = None


@contextmanager
def head_returns_loss_sums(
    head: nn.Module,
    targets: Tensor,
    chunk_size: int,
    kernel: FusedKernel | None = None,
    cu_seqlens: Tensor | None = None,
) -> Iterator[HeadResult]:
    """Make ``head(hidden)`` return the summed cross entropy of each sample instead of the logits.

    The tokens of the micro-batch are cut into chunks, the last of which may be shorter. Each chunk's logits are
    made, reduced to a loss for each token and dropped; the backward pass makes them again. At any time
    ``chunk_size * V`` logits exist instead of ``B * S * V``, for one more pass through the head.

    The head's own forward computes each chunk, so a bias, LoRA or a head that is an FSDP unit of its own work
    as they are. It has to happen inside the head's call, because only there are its parameters gathered.

    Args:
        head: the output projection, called once with (B, S, H) while this context is open.
        targets: (B, S) from :func:`~mindspeed_mm.losses.cross_entropy.shift_labels`.
        chunk_size: tokens of each chunk.
        kernel: computes the sum over all samples in one go, where the head is a plain ``nn.Linear``. Its gradient
            is that of one scalar, so a loss that weighs the samples differently cannot use it.
        cu_seqlens: of a packed row, see :func:`~mindspeed_mm.losses.cross_entropy.sum_by_sample`.
    """
    project, replaced = head.forward, "forward" in vars(head)
    fused = kernel if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and not replaced else None
    result = HeadResult()

    def losses_of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return token_losses(project(hidden), targets)

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != targets.shape:
            return project(hidden)  # the caller sees that there are no sums
        flat, flat_targets = hidden.flatten(0, 1), targets.flatten()
        if fused is not None:
            result.sums = torch.stack([fused(head, flat, flat_targets)])  # FSDP wants no view
            return result.sums
        chunks = zip(flat.split(chunk_size), flat_targets.split(chunk_size), strict=True)
        losses = [checkpoint(losses_of_chunk, h, t, use_reentrant=False) for h, t in chunks]
        result.sums = sum_by_sample(torch.cat(losses).view(targets.shape), cu_seqlens)
        return result.sums

    head.forward = forward
    try:
        yield result
    finally:
        if replaced:
            head.forward = project
        else:
            del head.forward
