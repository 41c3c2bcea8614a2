"""The Megatron engine against Hugging Face's model, torch's AdamW and torch's clipping in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.gpt import Case, compare, train
from tests.ranks import RankPool

ONE_RANK = {
    "plain": Case(),
    "tied": Case(tied=True),
    "pair": Case(form="pair"),
    "triple": Case(form="triple"),
    "per-token": Case(form="per_token"),
    "sharded": Case(sharded=True),
}
TWO_RANKS = {
    # Without the marks that initialisation sets, half of the gradient would be missing from its norm.
    "TP2, marks": Case({"tensor": 2}, {"perform_initialization": False}),
    "TP2": Case({"tensor": 2}),
    "TP2+SP": Case({"tensor": 2}, {"sequence_parallel": True}, form="per_token"),
    "PP2": Case({"pipeline": 2}, {"variable_seq_lengths": True}, form="triple"),
    "VPP": Case({"pipeline": 2, "virtual": 2}, {"batch_p2p_comm": True}, tied=True),
    # Sends that still run read what the schedule would free: silently wrong, unless the engine forbids that.
    "VPP, overlap": Case(
        {"pipeline": 2, "virtual": 2},
        {"overlap_p2p_comm": True, "deallocate_pipeline_outputs": True, "batch_p2p_comm": False},
    ),
    "DP2": Case(form="per_token"),
    "DP2 sharded": Case(sharded=True, form="triple"),
    "DP2 sharded, overlaps": Case(sharded=True, overlap_grad_reduce=True, overlap_param_gather=True),
}


QUICK = {"triple", "per-token", "TP2, marks", "VPP, overlap", "DP2"}


def names(cases: dict[str, Case]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in cases]


@pytest.mark.parametrize("name", names(ONE_RANK))
def test_one_rank(ranks1: RankPool, name: str) -> None:
    compare(ONE_RANK[name], ranks1.run(train, ONE_RANK[name]))


@pytest.mark.parametrize("name", names(TWO_RANKS))
def test_two_ranks(ranks2: RankPool, name: str) -> None:
    compare(TWO_RANKS[name], ranks2.run(train, TWO_RANKS[name]))
