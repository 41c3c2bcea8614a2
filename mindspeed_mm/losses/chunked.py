"""Cross entropy without ever holding the logits of the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mindspeed_mm.losses.cross_entropy import cross_entropy_sums


@dataclass
class HeadResult:
    """What the head returned, to be compared with what the model passed on.

    Attributes:
        sums: (B,), fp32; None until the head was called.
    """

    sums: Tensor | None = None


@contextmanager
def head_returns_loss_sums(head: nn.Module, targets: Tensor, chunk_size: int) -> Iterator[HeadResult]:
    """Make ``head(hidden)`` return the summed cross entropy of each sample instead of the logits.

    The sequence is cut into chunks. Each chunk's logits are made, reduced to a sum and dropped; the backward
    pass makes them again. At any time ``B * chunk_size * V`` logits exist instead of ``B * S * V``.

    The head's own forward computes each chunk, so a bias, LoRA or a head that is an FSDP unit of its own work
    as they are. It has to happen inside the head's call, because only there are its parameters gathered.

    Args:
        head: the output projection, called once with (B, S, H) while this context is open.
        targets: (B, S) from :func:`~mindspeed_mm.losses.cross_entropy.shift_labels`.
        chunk_size: positions of the sequence for each chunk.
    """
    project = head.forward
    result = HeadResult()

    def sums_of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy_sums(project(hidden), targets)

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[:2] != targets.shape:
            raise ValueError(f"the output head was called with {tuple(hidden.shape)}, targets are {targets.shape}")
        chunks = zip(hidden.split(chunk_size, dim=1), targets.split(chunk_size, dim=1), strict=True)
        sums = [checkpoint(sums_of_chunk, h, t, use_reentrant=False) for h, t in chunks]
        result.sums = torch.stack(sums).sum(dim=0)
        return result.sums

    head.forward = forward
    try:
        yield result
    finally:
        del head.forward
