"""Sequences shared by ranks: attention and its gradients equal those of one rank that has the whole sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm import accelerator
from mindspeed_mm.distributed.context_parallel import HYBRID, RING, ULYSSES, ContextParallel, check_context_parallel
from mindspeed_mm.distributed.sequence_split import SequenceSplit
from mindspeed_mm.errors import UserError
from tests.ranks import RankPool

SCALE, SIZE = 0.3, 8


def by_hand(query: Tensor, key: Tensor, value: Tensor, owner: Tensor) -> Tensor:
    """Causal attention with the scores written out, (s, b, h, d); positions with another ``owner`` are not seen."""
    key, value = (tensor.repeat_interleave(query.shape[2] // tensor.shape[2], dim=2) for tensor in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * SCALE
    visible = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() & (owner[:, None] == owner)
    return torch.einsum("bhst,tbhd->sbhd", scores.masked_fill(~visible, -math.inf).softmax(-1), value)


def compare(
    kind: str,
    degree: int,
    heads: int,
    groups: int,
    length: int,
    ends: list[int] | None,
    dtype: torch.dtype = torch.float64,
    plain: bool = False,
) -> float:
    """Run on each rank: return the largest difference of results and gradients at the positions of this rank."""
    if plain:
        kernel, accelerator.attention._kernel = accelerator.attention._kernel, lambda _: None
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(7)
    batch = 2 if ends is None else 1
    shapes = [(length, batch, n, SIZE) for n in (heads, groups, groups, heads)]
    *leaves, gradient = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    for leaf in leaves:
        leaf.requires_grad_()
    cu_seqlens = None if ends is None else torch.tensor(ends)
    owner = torch.zeros(length, dtype=torch.long)
    if cu_seqlens is not None:
        owner = torch.bucketize(torch.arange(length), cu_seqlens[1:], right=True)
    expected = by_hand(*leaves, owner)

    split = SequenceSplit(length, cu_seqlens, size=world, rank=rank)
    context = ContextParallel.of(dist.group.WORLD, kind, [degree, world // degree])
    local = [split.take(leaf.detach(), 0).requires_grad_() for leaf in leaves]
    actual = context.attend(*local, split.lengths, causal=True, scale=SCALE)
    theirs = torch.autograd.grad(expected, leaves, gradient)
    ours = torch.autograd.grad(actual, local, split.take(gradient, 0))
    if plain:
        accelerator.attention._kernel = kernel
    pairs = [(actual, expected), *zip(ours, theirs, strict=True)]
    assert all(a.any() for a, _ in pairs)
    real = split.source("cpu") >= 0
    return max(float((a - split.take(b.detach(), 0))[real].detach().abs().max()) for a, b in pairs)


PACKED = [0, 5, 6, 19]
TWO_RANKS = [
    ("a2a", 2, 4, 2, 16, None),
    ("a2a", 2, 4, 1, 13, None),  # fewer key heads than ranks; a length that has to be padded
    ("a2a", 2, 4, 2, 23, PACKED),
    ("p2p", 1, 4, 2, 16, None),
    ("p2p", 1, 3, 1, 13, None),
    ("p2p", 1, 4, 2, 23, PACKED),
]
FOUR_RANKS = [
    ("a2a", 4, 4, 2, 16, None),
    ("a2a", 4, 12, 6, 23, PACKED),
    ("p2p", 1, 4, 2, 16, None),
    ("p2p", 1, 4, 4, 23, PACKED),
    ("a2a+p2p", 2, 4, 2, 16, None),
    ("a2a+p2p", 2, 4, 1, 23, PACKED),
]


@pytest.mark.parametrize("case", TWO_RANKS)
def test_two_ranks(case: tuple[Any, ...], ranks2: RankPool) -> None:
    assert max(ranks2.run(compare, *case)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR_RANKS)
def test_four_ranks(case: tuple[Any, ...], ranks4: RankPool) -> None:
    assert max(ranks4.run(compare, *case)) < 1e-12
    assert max(ranks4.run(compare, *case, dtype=torch.float32)) < 2e-6


def test_ring_without_a_kernel(ranks2: RankPool) -> None:
    assert max(ranks2.run(compare, *TWO_RANKS[-1], plain=True)) < 1e-12


def test_single_precision(ranks2: RankPool) -> None:
    assert max(ranks2.run(compare, *TWO_RANKS[0], dtype=torch.float32)) < 1e-6
    assert max(ranks2.run(compare, *TWO_RANKS[3], dtype=torch.float32)) < 1e-6


@pytest.mark.parametrize(
    ("length", "ends", "divisor"), [(16, None, 1), (13, None, 3), (23, PACKED, 1), (24, PACKED, 3)]
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_position_has_one_owner_and_equal_work(
    length: int, ends: list[int] | None, divisor: int, size: int
) -> None:
    cu_seqlens = None if ends is None else torch.tensor(ends)
    splits = [SequenceSplit(length, cu_seqlens, size=size, rank=rank, divisor=divisor) for rank in range(size)]
    sources = [split.source("cpu") for split in splits]
    held = torch.cat(sources)
    assert sorted(held[held >= 0].tolist()) == list(range(length))
    assert len({len(source) for source in sources}) == 1 and len(sources[0]) % divisor == 0
    assert len(held) < length + 2 * size * divisor * len(splits[0].lengths)
    if ends is None and size > 1:
        chunk = splits[0].lengths[0] // (2 * size)
        work = []
        for rank in range(size):
            mine = [*range(rank * chunk, (rank + 1) * chunk)]
            mine += range((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk)
            assert sources[rank].tolist() == [p if p < length else -1 for p in mine]
            work.append(sum(p + 1 for p in mine))  # the keys that these queries see
        assert len(set(work)) == 1
    if ends is not None:
        local = splits[0].local_cu_seqlens
        assert local is not None and len(local) == len(ends)
        assert local[-1] == sum(splits[0].lengths[: len(ends) - 1]) // size
        assert splits[0].cu_seqlens is not None and splits[0].cu_seqlens.dtype == torch.int32


def test_what_is_taken() -> None:
    split = SequenceSplit(6, size=2, rank=1)
    tensor = torch.arange(12).view(2, 6)
    assert split.take(tensor, 1, fill=-100).tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]
    split = SequenceSplit(6, size=2, rank=0)
    assert split.take(tensor, 1, fill=-100).tolist() == [[0, 1, -100, -100], [6, 7, -100, -100]]
    assert SequenceSplit(6).take(tensor, 1) is tensor
    with pytest.raises(ValueError, match="not 6 positions long"):
        split.take(tensor, 0)


def check(size: int, algorithm: str, degree: int | None = None, **more: Any) -> dict[str, Any]:
    return check_context_parallel(size, algorithm, degree, **{"heads": 8, "groups": 2, **more})


def test_settings_of_megatron_core() -> None:
    assert check(1, HYBRID) == {}
    assert check(2, ULYSSES) == {"cp_comm_type": "a2a"} == check(2, HYBRID, 2)
    assert check(2, RING) == {"cp_comm_type": "p2p"} == check(2, HYBRID, 1)
    assert check(8, HYBRID, 2) == {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 4]}


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        ((4, HYBRID), {}, r"--context-parallel-size 4 .* needs --ulysses-degree-in-cp"),
        ((4, HYBRID, 3), {}, r"--ulysses-degree-in-cp 3: 3 does not divide 4"),
        ((3, ULYSSES), {}, r"3 ranks cannot share the 8 attention heads .* divisor of 8, or .* megatron_cp_algo"),
        ((8, ULYSSES), {"tensor_parallel_size": 2}, r"8 attention heads in 2 query groups / --tensor-model-parallel-s"),
        ((2, RING), {"attention_dropout": 0.1}, r"a ring cannot drop .* --attention-dropout 0"),
    ],
)
def test_what_does_not_fit(arguments: tuple[Any, ...], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(*arguments, **more)
