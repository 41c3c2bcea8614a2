"""Whole models on sequences that ranks share or pad: loss and gradients are Hugging Face's for the whole sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

LIMIT = 1e-5
ULYSSES, RING = {"cp_comm_type": "a2a"}, {"cp_comm_type": "p2p"}
HYBRID = {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}


def batch_of(family: str, length: int) -> dict[str, Tensor]:
    return tiny.tiny_batch(family, [2, 1], length=length, seed=3)


def compare(
    family: str, folder: str, sizes: dict[str, int], megatron: dict[str, Any], length: int, loss_type: str
) -> dict[str, Any]:
    """Return this rank's largest deviations from Hugging Face's model."""
    batch = batch_of(family, length)
    loss, _, right = vlm.oracle(family, batch)
    vlm.start(**sizes)
    (model,) = vlm.build(folder, megatron=megatron, loss_cfg={"loss_type": loss_type})
    result = model(**batch)["loss_dict"]
    ours = result["loss"] / sizes.get("context", 1)
    if loss_type == "per_token_loss":
        tokens = result["token_nums"].clone()
        dist.all_reduce(tokens, group=_context_group())
        ours = result["loss"] / tokens
    ours.backward()
    total = ours.detach().clone()
    dist.all_reduce(total, group=_context_group())
    add_up(model)
    return {"loss": abs(float(total) - loss) / loss, "gradients": vlm.worst(vlm.gradients(model), right)}


def _context_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_context_parallel_group()


def add_up(model: Any) -> None:
    """Do what the training does after the last backward pass."""
    from megatron.core import parallel_state

    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if getattr(parameter, "allreduce", True):
            dist.all_reduce(parameter.grad, group=_context_group())
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())


TWO_RANKS = {
    "Ulysses": ("qwen2_5_vl", {"context": 2}, ULYSSES, 16, "default"),
    "Ulysses, padded, per token": ("qwen3_vl", {"context": 2}, ULYSSES, 15, "per_token_loss"),
    "ring": ("qwen3_vl", {"context": 2}, RING, 16, "default"),
    "ring, padded": ("internvl", {"context": 2}, RING, 14, "default"),
    "ring, experts": ("qwen3_vl_moe", {"context": 2}, RING, 18, "per_token_loss"),
    "sequence parallel, padded": ("qwen3_vl", {"tensor": 2}, {"sequence_parallel": True}, 15, "default"),
}
FOUR_RANKS = {
    "hybrid": ("qwen3_vl", {"context": 4}, HYBRID, 19, "default"),
    "ring and sequence parallel": (
        "qwen2_5_vl",
        {"context": 2, "tensor": 2},
        {**RING, "sequence_parallel": True},
        17,
        "per_token_loss",
    ),
}


def run(pool: RankPool, tmp_path: Path, family: str, *case: Any) -> None:
    tiny.save_tiny(family, tmp_path)
    for rank, found in enumerate(pool.run(compare, family, str(tmp_path), *case)):
        assert found["loss"] <= LIMIT and found["gradients"][0] <= LIMIT, (rank, found)


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(ranks2: RankPool, tmp_path: Path, name: str) -> None:
    run(ranks2, tmp_path, *TWO_RANKS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(ranks4: RankPool, tmp_path: Path, name: str) -> None:
    run(ranks4, tmp_path, *FOUR_RANKS[name])
