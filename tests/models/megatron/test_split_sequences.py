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


def packed_batch() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return three samples in one row with padding behind them, and the samples by themselves."""
    samples = [
        tiny.tiny_batch("qwen3_vl", [count], length=length, seed=length) for count, length in ((2, 15), (0, 3), (1, 10))
    ]
    model, positions = tiny.tiny_model("qwen3_vl").model, []
    for sample in samples:
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        inputs = {key: sample[key] for key in keys if key in sample}
        length = sample["input_ids"].shape[1]
        plain = torch.arange(length).expand(3, 1, length)
        positions.append(model.get_rope_index(**inputs)[0] if "image_grid_thw" in sample else plain)
        sample["labels"][:, 0] = -100  # no target of the sample before it
    padding = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}
    row = {key: torch.cat([*(s[key] for s in samples), padding[key]], dim=1) for key in padding}
    row["position_ids"] = torch.cat([*positions, torch.zeros(3, 1, 4, dtype=torch.long)], dim=2)
    for key in ("pixel_values", "image_grid_thw"):
        row[key] = torch.cat([s[key] for s in samples if key in s])
    row["cu_seqlens"] = torch.tensor([0, 15, 18, 28], dtype=torch.int32)
    return row, samples


def compare_packed(folder: str, sizes: dict[str, int], megatron: dict[str, Any], loss_type: str) -> dict[str, Any]:
    """Return this rank's largest deviations from Hugging Face's model on each sample by itself."""
    row, samples = packed_batch()
    counts = [int((sample["labels"][:, 1:] >= 0).sum()) for sample in samples]
    loss, right = 0.0, {}
    for sample, count in zip(samples, counts, strict=True):
        mean, _, grads = vlm.oracle("qwen3_vl", sample)
        share = count / sum(counts) if loss_type == "default" else 1 / len(samples)
        loss += share * mean
        right = {name: right.get(name, 0) + share * grad for name, grad in grads.items()}
    vlm.start(**sizes)
    (model,) = vlm.build(folder, megatron=megatron, loss_cfg={"loss_type": loss_type})
    ours = model(**row)["loss_dict"]["loss"] / sizes.get("context", 1)
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


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("sizes", "megatron", "loss_type"),
    [
        ({}, {}, "default"),
        ({"context": 2}, ULYSSES, "per_sample_loss"),
        ({"context": 2}, RING, "default"),
        ({"tensor": 2}, {"sequence_parallel": True}, "per_sample_loss"),
    ],
    ids=["whole", "Ulysses", "ring", "sequence parallel"],
)
def test_packed_samples(
    request: pytest.FixtureRequest, tmp_path: Path, sizes: dict[str, int], megatron: dict[str, Any], loss_type: str
) -> None:
    pool: RankPool = request.getfixturevalue("ranks2" if sizes else "ranks1")
    tiny.save_tiny("qwen3_vl", tmp_path)
    for rank, found in enumerate(pool.run(compare_packed, str(tmp_path), sizes, megatron, loss_type)):
        assert found["loss"] <= LIMIT and found["gradients"][0] <= LIMIT, (rank, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(ranks4: RankPool, tmp_path: Path, name: str) -> None:
    run(ranks4, tmp_path, *FOUR_RANKS[name])
