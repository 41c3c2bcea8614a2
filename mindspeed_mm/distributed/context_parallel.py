"""Attention over sequences that context-parallel ranks share, in the way ``--context-parallel-algo`` says.

Ulysses and ring are two ends of one scale: of ``size`` ranks, groups of neighbours exchange heads (Ulysses), and the
ranks with the same place in their groups form a ring. One group of all is Ulysses, groups of one are a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mindspeed_mm import accelerator
from mindspeed_mm.distributed.ring_attention import ring_attention
from mindspeed_mm.distributed.ulysses import can_share_heads, to_heads, to_positions
from mindspeed_mm.errors import UserError

ULYSSES, RING, HYBRID = "ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"


def check_context_parallel(
    size: int,
    algorithm: str,
    ulysses_degree: int | None,
    *,
    heads: int,
    groups: int,
    tensor_parallel_size: int = 1,
    attention_dropout: float = 0.0,
) -> dict[str, Any]:
    """Check that sequences can be shared that way, and return how megatron-core calls it.

    Args:
        size: ``--context-parallel-size``.
        algorithm: ``--context-parallel-algo``.
        ulysses_degree: ``--ulysses-degree-in-cp``.
        heads: attention heads of the text decoder.
        groups: its key and value heads.
        tensor_parallel_size: ranks that share the heads already.
        attention_dropout: ``--attention-dropout``.

    Returns:
        The fields ``cp_comm_type`` and ``hierarchical_context_parallel_sizes`` for ``TransformerConfig``, empty for
        one rank.

    Raises:
        UserError: the numbers do not fit.
    """
    if size == 1:
        return {}
    degree = {ULYSSES: size, RING: 1}.get(algorithm) or ulysses_degree
    flags = f"--context-parallel-size {size} --context-parallel-algo {algorithm}"
    if degree is None:
        raise UserError(f"{flags} needs --ulysses-degree-in-cp: how many of the {size} ranks exchange heads")
    if algorithm == HYBRID:
        flags = f"{flags} --ulysses-degree-in-cp {degree}"
        if size % degree:
            raise UserError(f"{flags}: {degree} does not divide {size}; use a divisor of it")
    own_heads, own_groups = heads // tensor_parallel_size, max(groups // tensor_parallel_size, 1)
    if not can_share_heads(own_heads, own_groups, degree):
        share = f" / --tensor-model-parallel-size {tensor_parallel_size}" if tensor_parallel_size > 1 else ""
        raise UserError(
            f"{flags}: {degree} ranks cannot share the {heads} attention heads in {groups} query groups{share}; use a "
            f"divisor of {own_heads}, or --context-parallel-algo {RING}"
        )
    if degree < size and attention_dropout:
        raise UserError(
            f"{flags}: a ring cannot drop attention weights; use --attention-dropout 0, or {ULYSSES}, instead of "
            f"--attention-dropout {attention_dropout}"
        )
    kind = "a2a" if degree == size else "p2p" if degree == 1 else "a2a+p2p"
    return {"cp_comm_type": kind} | (
        {"hierarchical_context_parallel_sizes": [degree, size // degree]} if "+" in kind else {}
    )


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share sequences with this one.

    Attributes:
        size: how many there are.
        ulysses: those that exchange heads, None if there are none.
        ring: those that pass keys and values on, None if there are none.
    """

    size: int
    ulysses: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None

    @classmethod
    def of(cls, group: dist.ProcessGroup, kind: str | None, hierarchy: Sequence[int] | None) -> ContextParallel:
        """Return the groups for megatron-core's settings. All ranks of ``group`` have to call it.

        Args:
            group: all context-parallel ranks of a sequence.
            kind: ``cp_comm_type``: "a2a", "a2a+p2p", or "p2p", which None stands for.
            hierarchy: ``hierarchical_context_parallel_sizes``, for "a2a+p2p": the ranks that exchange heads, and
                the groups of them.
        """
        size = group.size()
        if kind == "a2a+p2p":
            assert hierarchy is not None
            return cls(size, *_neighbours_and_ring(group, hierarchy[0]))
        if kind not in ("a2a", "p2p", None):
            raise UserError(f"cp_comm_type: '{kind}' needs Transformer Engine; use a2a, p2p or a2a+p2p")
        return cls(size, group, None) if kind == "a2a" else cls(size, None, group)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[int] | None,
        *,
        causal: bool,
        scale: float,
        dropout: float = 0.0,
    ) -> Tensor:
        """Return the attention of this rank's positions to all.

        Args:
            query: (s, b, h, d), positions as :class:`~mindspeed_mm.distributed.sequence_split.SequenceSplit` cuts them.
            key: (s, b, g, d).
            value: (s, b, g, d).
            lengths: of the packed sequences, with their padding, all ranks together; None for one in each row.
            causal: positions see only what comes before them; a ring knows nothing else.
            scale: of the scores.
            dropout: probability that a weight is dropped; not in a ring.

        Returns:
            (s, b, h, d).
        """
        lengths = [length // self.size for length in lengths] if lengths else [query.shape[0]]
        wider = lengths
        if self.ulysses is not None:
            query, key, value = to_heads(query, key, value, lengths, self.ulysses)
            wider = [length * self.ulysses.size() for length in lengths]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.ring is not None:
            if not causal or dropout:
                raise NotImplementedError("ring attention is causal and without dropout")
            out = ring_attention(query, key, value, wider, scale=scale, group=self.ring)
        else:
            out = accelerator.attend_each(query, key, value, wider, causal=causal, scale=scale, dropout=dropout)
        out = out.permute(2, 0, 1, 3)
        return out if self.ulysses is None else to_positions(out, lengths, self.ulysses)


_subgroups: dict[tuple[dist.ProcessGroup, int], tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def _neighbours_and_ring(group: dist.ProcessGroup, degree: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Return this rank's group of ``degree`` neighbours, and the ranks with its place in each such group.

    megatron-core makes them as well, but newer versions only if einops is installed, which they do not require.
    """
    if (group, degree) not in _subgroups:
        ranks, mine = dist.get_process_group_ranks(group), group.rank()
        first = mine // degree * degree
        members = ranks[first : first + degree], ranks[mine % degree :: degree]
        # Only the members take part: other ranks may be building other layers.
        neighbours, ring = (dist.new_group(part, use_local_synchronization=True) for part in members)
        _subgroups[group, degree] = neighbours, ring
    return _subgroups[group, degree]
