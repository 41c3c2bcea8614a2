"""The parity matrix: five steps of a vision language model in every layout, against Hugging Face's in one process.

A layout is a row of `LAYOUTS`. The oracle is Hugging Face's model, torch's AdamW and torch's clipping; loss, gradient
norm, every gradient and every updated weight have to agree on every rank, relative to each tensor's maximum. Batches
hold images, and micro-batches differ in length and in their number of targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.distributed import chunks, parallel
from mindspeed_mm.distributed.main_parameters import MainParameters, unwrap
from mindspeed_mm.engine.megatron import MegatronEngine
from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

LIMIT = 1e-5
STEPS = 5
MICRO_BATCHES = 4
DENSE, EXPERTS = "qwen3_vl", "qwen3_vl_moe"
LAYERS = 4
# With an eps far below the gradients, the update of an element whose gradient is near zero is its rounding error.
ADAM: dict[str, Any] = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1}


@dataclass(frozen=True)
class Layout:
    """A row of the matrix.

    Attributes:
        ranks: how many it takes.
        sizes: of ``ParallelSizes``.
        config: fields of ``TransformerConfig``.
        sharded: distribute the optimizer.
        overlap: reduce gradients and gather parameters during computation.
        family: of the model.
        per_token: the loss of the global batch's tokens, else the mean of micro-batches' means.
        quick: part of the default suite.
    """

    ranks: int
    sizes: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    overlap: bool = False
    family: str = DENSE
    per_token: bool = False
    quick: bool = False


SEQUENCE = {"sequence_parallel": True}
STAGES = {"variable_seq_lengths": True}
ULYSSES, RING = {"cp_comm_type": "a2a"}, {"cp_comm_type": "p2p"}
HYBRID = {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}
ALL_GATHER = {"moe_token_dispatcher_type": "allgather"}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, Layout] = {
    "1": Layout(1),
    "1-experts": Layout(1, family=EXPERTS, per_token=True),
    "tp2": Layout(2, {"tensor": 2}, per_token=True),
    "tp2-sp": Layout(2, {"tensor": 2}, SEQUENCE, quick=True),
    "tp2-sp-recompute": Layout(2, {"tensor": 2}, {**SEQUENCE, **RECOMPUTE}, per_token=True),
    "tp2-sp-experts": Layout(2, {"tensor": 2}, SEQUENCE, family=EXPERTS),
    "pp2": Layout(2, {"pipeline": 2}, STAGES, per_token=True, quick=True),
    "pp2-recompute": Layout(2, {"pipeline": 2}, {**STAGES, **RECOMPUTE}),
    "pp2-experts": Layout(2, {"pipeline": 2}, STAGES, family=EXPERTS),
    "vpp": Layout(2, {"pipeline": 2, "virtual": 2}, STAGES),
    "vpp-overlap": Layout(
        2, {"pipeline": 2, "virtual": 2}, {**STAGES, "overlap_p2p_comm": True, "batch_p2p_comm": False}, per_token=True
    ),
    "dp2": Layout(2),
    "dp2-sharded": Layout(2, sharded=True, per_token=True),
    "dp2-sharded-overlap": Layout(2, sharded=True, overlap=True, quick=True),
    "ep2": Layout(2, {"expert": 2}, family=EXPERTS, per_token=True),
    "ep2-sharded-overlap": Layout(2, {"expert": 2}, sharded=True, overlap=True, family=EXPERTS, quick=True),
    "ep2-allgather": Layout(2, {"expert": 2}, ALL_GATHER, family=EXPERTS, per_token=True, quick=True),
    "ep2-allgather-tp2-sp": Layout(
        2, {"tensor": 2, "expert": 2, "expert_tensor": 1}, {**SEQUENCE, **ALL_GATHER}, family=EXPERTS
    ),
    "cp2-ulysses": Layout(2, {"context": 2}, ULYSSES, quick=True),
    "cp2-ring": Layout(2, {"context": 2}, RING, per_token=True, quick=True),
    "cp2-ring-recompute-sharded": Layout(2, {"context": 2}, {**RING, **RECOMPUTE}, sharded=True),
    "cp2-ulysses-experts": Layout(2, {"context": 2}, ULYSSES, family=EXPERTS, per_token=True),
    "cp2-ring-experts": Layout(2, {"context": 2}, RING, family=EXPERTS),
    "cp2-ep2": Layout(2, {"context": 2, "expert": 2}, RING, family=EXPERTS, per_token=True),
    "cp2-ep2-allgather": Layout(2, {"context": 2, "expert": 2}, {**ULYSSES, **ALL_GATHER}, family=EXPERTS),
    "cp4-hybrid": Layout(4, {"context": 4}, HYBRID, per_token=True),
    "cp4-hybrid-experts": Layout(4, {"context": 4}, HYBRID, family=EXPERTS),
    "cp4-ring": Layout(4, {"context": 4}, RING),
    "cp2-tp2-sp": Layout(4, {"context": 2, "tensor": 2}, {**ULYSSES, **SEQUENCE}),
    "cp2-pp2": Layout(4, {"context": 2, "pipeline": 2}, {**RING, **STAGES}, per_token=True),
    "cp2-dp2-sharded": Layout(4, {"context": 2}, RING, sharded=True, per_token=True),
    "ep2-allgather-dp2": Layout(4, {"expert": 2}, ALL_GATHER, family=EXPERTS),
    "tp2-pp2": Layout(4, {"tensor": 2, "pipeline": 2}, {**SEQUENCE, **STAGES}),
    "tp2-dp2-sharded": Layout(4, {"tensor": 2}, SEQUENCE, sharded=True, per_token=True),
    "pp2-dp2-sharded": Layout(4, {"pipeline": 2}, STAGES, sharded=True),
    "tp2-pp2-experts": Layout(4, {"tensor": 2, "pipeline": 2}, {**SEQUENCE, **STAGES}, family=EXPERTS),
    "tp2-ep2-dp2-sharded": Layout(
        4, {"tensor": 2, "expert": 2, "expert_tensor": 1}, SEQUENCE, sharded=True, family=EXPERTS
    ),
    # Experts are split over other ranks than the dense layers, though there is one expert-parallel rank.
    "dp2-experts-split-allgather": Layout(2, {"expert_tensor": 2}, ALL_GATHER, family=EXPERTS, quick=True),
    "dp2-experts-split-sharded": Layout(
        2, {"expert_tensor": 2}, ALL_GATHER, sharded=True, family=EXPERTS, per_token=True
    ),
    "tp2-sp-experts-whole": Layout(2, {"tensor": 2, "expert_tensor": 1}, SEQUENCE, family=EXPERTS),
    "tp2-sp-experts-whole-sharded": Layout(
        2, {"tensor": 2, "expert_tensor": 1}, SEQUENCE, sharded=True, family=EXPERTS, per_token=True
    ),
    "tp2-cp2-experts-whole": Layout(
        4, {"tensor": 2, "context": 2, "expert_tensor": 1}, {**ULYSSES, **SEQUENCE}, family=EXPERTS
    ),
    # Each expert is split, so its ranks exchange tokens as unevenly as their routers choose.
    "tp2-ep2-split": Layout(4, {"tensor": 2, "expert": 2}, SEQUENCE, family=EXPERTS, per_token=True),
    "tp2-ep2-split-sharded": Layout(4, {"tensor": 2, "expert": 2}, SEQUENCE, sharded=True, family=EXPERTS),
    "tp2-ep2-split-allgather": Layout(4, {"tensor": 2, "expert": 2}, {**SEQUENCE, **ALL_GATHER}, family=EXPERTS),
}


def batches(family: str, step: int) -> list[dict[str, Tensor]]:
    """Return the micro-batches of a step, every one with an image."""
    found = []
    for index in range(MICRO_BATCHES):
        batch = tiny.tiny_batch(family, [1, index % 2], length=12 + 2 * index, seed=10 * step + index)
        batch["labels"][:, : 4 + index] = -100
        found.append(batch)
    return found


def train(folder: str, layout: Layout) -> list[dict[str, Any]]:
    """Train on the ranks of a pool; return of each step loss, norm, and this rank's boxes of gradients and weights."""
    vlm.start(**layout.sizes)
    loss_type = "per_token_loss" if layout.per_token else "default"
    config = {**layout.config, "calculate_per_token_loss": layout.per_token}
    built = vlm.build(folder, megatron=config, loss_cfg={"loss_type": loss_type})
    wrapped = chunks.reduce_gradients(
        built, sharded=layout.sharded, overlap_grad_reduce=layout.overlap, overlap_param_gather=layout.overlap
    )
    mains = MainParameters(wrapped, sharded=layout.sharded)
    engine = MegatronEngine(
        wrapped,
        mains,
        torch.optim.AdamW(mains.values, fused=True, **ADAM),
        clip_grad=1.0,
        sequence_length=1,
        micro_batch_size=2,
        per_token_loss=layout.per_token,
    )
    readers = parallel.loader_group()
    rank, size = dist.get_rank(readers), dist.get_world_size(readers)
    seen = []
    for step in range(STEPS):
        mine = batches(layout.family, step)[rank::size]
        reports = engine.forward_backward(forward_step, iter(mine), len(mine))
        found = {"loss": _loss(reports), "gradients": list(_boxes(engine, gradients=True))}
        found["norm"] = float(engine.optimizer_step().grad_norm)
        found["weights"] = list(_boxes(engine, gradients=False))
        seen.append(found)
    return seen


def forward_step(iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Any, Any]:
    """Do as ``pretrain_vlm.py`` does."""

    def loss_func(output: Any) -> Any:
        losses = output["loss_dict"]
        loss, count = losses["loss"], losses.get("token_nums")
        if count is None:
            return loss, {"loss": loss.detach().clone()}
        return loss, count, {"loss": (loss.detach().clone(), count)}

    return model(**next(iterator)), loss_func


def _loss(reports: list[Any]) -> float:
    pairs = [r["loss"] if isinstance(r["loss"], tuple) else (r["loss"], 1) for r in reports]
    total = torch.tensor([[float(a), float(b)] for a, b in pairs], dtype=torch.float64).sum(0)
    dist.all_reduce(total, group=parallel.replica_group())  # with those that share sequences
    return float(total[0] / total[1])


def _boxes(engine: MegatronEngine, gradients: bool) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """Yield what this rank holds; of gradients only what it updates, NaN elsewhere."""
    from mindspeed_mm.models.megatron.layout import pieces

    if not gradients:
        engine.mains.publish()  # what a forward pass would have gathered
    for index, chunk in enumerate(engine.module):
        inner = unwrap(chunk)
        parameters = dict(inner.named_parameters())
        tensors = {n: torch.full_like(p, torch.nan) if gradients else p.detach() for n, p in parameters.items()}
        names = {id(p): n for n, p in parameters.items()}
        for main in engine.mains.all if gradients else ():
            if main.chunk == index:
                flat = tensors[names[id(main.parameter)]].view(-1)
                flat[main.start : main.start + main.value.numel()] = main.value.grad.reshape(-1)
        for name, parts in pieces(inner).items():
            for piece in parts:
                yield piece.hf_name, piece.block, piece.view(tensors[name]).clone()


@cache
def hf_model(family: str) -> Any:
    """Return the model that all start from; no parameter is all zeros, as biases are at first, or all ones."""
    model = tiny.tiny_model(family, layers=LAYERS)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def oracle(family: str, per_token: bool) -> list[dict[str, Any]]:
    """Train Hugging Face's model the same way in this process."""
    model = deepcopy(hf_model(family))
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    seen = []
    for step in range(STEPS):
        taken = batches(family, step)
        total = torch.zeros((), dtype=torch.float64)
        everything = sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in taken)
        for batch in taken:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            logits, labels = model(**inputs, use_cache=False).logits[:, :-1], batch["labels"][:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            loss = loss / (everything if per_token else int((labels >= 0).sum()) * len(taken))
            loss.backward()
            total += loss.detach()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        seen.append({"loss": float(total), "norm": float(norm), "gradients": gradients, "weights": weights})
    return seen


def check(layout: Layout, answers: list[list[dict[str, Any]]]) -> None:
    """Compare every rank's steps with the oracle's."""
    for step, right in enumerate(oracle(layout.family, layout.per_token)):
        covered = {name: torch.zeros(g.shape, dtype=torch.bool) for name, g in right["gradients"].items()}
        for rank, answer in enumerate(steps[step] for steps in answers):
            for key in ("loss", "norm"):
                assert abs(answer[key] - right[key]) <= LIMIT * right[key], (step, rank, key, answer[key], right[key])
            for key in ("gradients", "weights"):
                # What is zero but for rounding, such as the gradient of keys' bias, has no digits to compare; a weight
                # that starts at zero has as many as a step of AdamW, which is no longer than the learning rate.
                floor = 1e-4 * max(float(value.abs().max()) for value in right[key].values())
                floor = floor if key == "gradients" else max(floor, ADAM["lr"])
                for name, block, found in answer[key]:
                    whole = right[key][name]
                    known = ~found.isnan()
                    off = (found - whole[block]).abs().nan_to_num().max() / max(float(whole.abs().max()), floor)
                    assert off <= LIMIT, (step, rank, key, name, float(off))
                    if key == "gradients":
                        covered[name][block] |= known
        assert all(part.all() for part in covered.values()), [name for name, part in covered.items() if not part.all()]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Hugging Face folders of both models."""
    root = tmp_path_factory.mktemp("hf")
    for family in (DENSE, EXPERTS):
        hf_model(family).save_pretrained(root / family)
    return {family: root / family for family in (DENSE, EXPERTS)}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name", [name if row.quick else pytest.param(name, marks=pytest.mark.slow) for name, row in LAYOUTS.items()]
)
def test_five_steps_are_those_of_hugging_face(
    folders: dict[str, Path], request: pytest.FixtureRequest, name: str
) -> None:
    layout = LAYOUTS[name]
    pool: RankPool = request.getfixturevalue(f"ranks{layout.ranks}")
    check(layout, pool.run(train, str(folders[layout.family]), layout))
