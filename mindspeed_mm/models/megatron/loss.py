"""The cross entropy of each token from the decoder's last hidden states, however the vocabulary is divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mindspeed_mm.losses import token_losses, vocab_parallel_token_losses


def losses_of_logits(logits: Tensor, targets: Tensor, first_word: int = 0) -> Tensor:
    """Return the cross entropy of each position.

    Args:
        logits: (S, B, V), or this tensor-parallel rank's part of the vocabulary.
        targets: (S, B), negative where there is no target.
        first_word: of this rank's part.

    Returns:
        (S, B) fp32, the same on all tensor-parallel ranks.
    """
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return token_losses(logits, targets)
    group = parallel_state.get_tensor_model_parallel_group()
    return vocab_parallel_token_losses(logits, targets, group, first_word)


def losses_in_chunks(decoder: Any, hidden_states: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Return the cross entropy of each position without ever holding all logits.

    Those of ``chunk_size`` tokens exist at a time, and once more in the backward pass.

    Args:
        decoder: with ``logits`` and ``vocabulary``.
        hidden_states: (S, B, H); under sequence parallelism this rank's part of the sequence.
        targets: (S, B), of the whole sequence.
        chunk_size: tokens.
    """
    parts = targets.shape[0] // hidden_states.shape[0]  # of the sequence, one to a tensor-parallel rank
    length = max(1, chunk_size // (parts * targets.shape[1]))
    by_part = targets.unflatten(0, (parts, -1))

    def losses_of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        losses = losses_of_logits(decoder.logits(hidden), targets.flatten(0, 1), decoder.vocabulary.first)
        return losses.unflatten(0, (parts, -1))

    chunks = zip(hidden_states.split(length), by_part.split(length, dim=1), strict=True)
    losses = [checkpoint(losses_of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(losses, dim=1).flatten(0, 1)
