"""The loss per sample in every kind of layout, against Hugging Face's model on each sample by itself.

The formula is the oracle: the sum over the samples of the global batch of each one's mean over its targets, over the
number of samples. Micro-batches have different numbers of samples, one is packed, and one sample has no target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.distributed import chunks, parallel
from mindspeed_mm.distributed.main_parameters import MainParameters
from mindspeed_mm.engine.megatron import MegatronEngine
from tests.distributed.test_megatron_parity import SEQUENCE, STAGES, ULYSSES, _boxes, forward_step
from tests.models import tiny
from tests.models.megatron import vlm
from tests.models.megatron.test_split_sequences import packed_batch
from tests.ranks import RankPool

FAMILY = "qwen3_vl"
LIMIT = 1e-5


@dataclass(frozen=True)
class Layout:
    """``sizes`` of ``ParallelSizes``, ``config`` fields of ``TransformerConfig``."""

    ranks: int = 2
    sizes: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    quick: bool = False


LAYOUTS = {
    "1": Layout(1),
    "dp2": Layout(),
    "dp2-sharded": Layout(sharded=True, quick=True),
    "tp2-sp": Layout(sizes={"tensor": 2}, config=SEQUENCE),
    "pp2": Layout(sizes={"pipeline": 2}, config=STAGES, quick=True),
    "cp2": Layout(sizes={"context": 2}, config=ULYSSES, quick=True),
    "cp2-dp2-sharded": Layout(4, {"context": 2}, ULYSSES, sharded=True),
    "cp2-pp2": Layout(4, {"context": 2, "pipeline": 2}, {**ULYSSES, **STAGES}),
}


def micro_batches() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return four micro-batches, of 3, 2, 1 and 1 samples, and the samples by themselves."""
    row, samples = packed_batch()
    others = [tiny.tiny_batch(FAMILY, [1], length=12, seed=seed) for seed in (5, 6, 7, 8)]
    others[1]["labels"][:] = -100
    others[3]["labels"][:, :8] = -100
    keys = [key for key in others[0] if key != "mm_token_type_ids"]
    pair = {key: torch.cat([one[key] for one in others[:2]]) for key in keys}
    return [row, pair, *({key: one[key] for key in keys} for one in others[2:])], samples + others


@cache
def oracle() -> tuple[float, dict[str, Tensor]]:
    _, samples = micro_batches()
    total, gradients = 0.0, {}
    for sample in samples:
        if not bool((sample["labels"][:, 1:] >= 0).any()):
            continue
        loss, _, found = vlm.oracle(FAMILY, sample)
        total += loss / len(samples)
        gradients = {name: gradients.get(name, 0) + value / len(samples) for name, value in found.items()}
    return total, gradients


def train(folder: str, layout: Layout, mean_only: bool = False) -> dict[str, Any]:
    """Run one step; return the reported loss, the gradient norm and this rank's boxes of the gradient."""
    vlm.start(**layout.sizes)
    built = vlm.build(folder, megatron=layout.config, loss_cfg={"loss_type": "per_sample_loss"})
    wrapped = chunks.reduce_gradients(built, sharded=layout.sharded)
    mains = MainParameters(wrapped, sharded=layout.sharded)
    engine = MegatronEngine(
        wrapped,
        mains,
        torch.optim.SGD(mains.values),
        clip_grad=0.0,
        sequence_length=1,
        micro_batch_size=2,
        per_sample_loss=True,
    )
    readers = parallel.loader_group()
    mine = micro_batches()[0][dist.get_rank(readers) :: dist.get_world_size(readers)]
    reports = engine.forward_backward(of_samples(mean_only), iter(mine), len(mine))
    pairs = torch.tensor([[float(part) for part in report["loss"]] for report in reports]).double().sum(0)
    dist.all_reduce(pairs, group=parallel.replica_group())
    return {
        "loss": float(pairs[0] / pairs[1]),
        "gradients": list(_boxes(engine, gradients=True)),
        "norm": float(mains.gradient_norm()),
    }


def of_samples(mean_only: bool) -> Any:
    """Return a ``forward_step`` like that of ``pretrain_vlm.py``, or one that returns the mean of each micro-batch."""

    def step(iterator: Iterator[Any], model: Any) -> tuple[Any, Any]:
        def loss_func(output: Any) -> Any:
            losses = output["loss_dict"]
            loss, count = losses["loss"], losses["sample_nums"]
            if mean_only:
                return loss, {"loss": (loss.detach(), torch.ones(()))}
            return loss * count, count, {"loss": ((loss * count).detach(), count)}

        return forward_step(iterator, model)[0], loss_func

    return step


def check(answers: list[dict[str, Any]], loss: float, right: dict[str, Tensor]) -> None:
    norm = torch.nn.utils.get_total_norm(list(right.values()))
    covered = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in right.items()}
    floor = 1e-4 * max(float(value.abs().max()) for value in right.values())
    for rank, answer in enumerate(answers):
        assert abs(answer["loss"] - loss) <= LIMIT * loss, (rank, answer["loss"], loss)
        assert abs(answer["norm"] - float(norm)) <= LIMIT * float(norm), (rank, answer["norm"], norm)
        for name, block, found in answer["gradients"]:
            whole, known = right[name], ~found.isnan()
            off = (found - whole[block]).abs().nan_to_num().max() / max(float(whole.abs().max()), floor)
            assert off <= LIMIT, (rank, name, float(off))
            covered[name][block] |= known
    assert all(part.all() for part in covered.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(FAMILY, tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize(
    "name", [name if row.quick else pytest.param(name, marks=pytest.mark.slow) for name, row in LAYOUTS.items()]
)
def test_all_samples_of_the_global_batch_weigh_the_same(
    folder: Path, request: pytest.FixtureRequest, name: str
) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{LAYOUTS[name].ranks}")
    check(pool.run(train, str(folder), LAYOUTS[name]), *oracle())


def test_means_of_micro_batches_are_averaged(folder: Path, ranks2: RankPool) -> None:
    batches, samples = micro_batches()
    total, gradients, done = 0.0, {}, 0
    for batch in batches:
        count = len(batch["cu_seqlens"]) - 1 if "cu_seqlens" in batch else len(batch["input_ids"])
        for sample in samples[done : done + count]:
            if bool((sample["labels"][:, 1:] >= 0).any()):
                loss, _, found = vlm.oracle(FAMILY, sample)
                share = 1 / count / len(batches)
                total += share * loss
                gradients = {name: gradients.get(name, 0) + share * value for name, value in found.items()}
        done += count
    check(ranks2.run(train, str(folder), LAYOUTS["cp2"], mean_only=True), total, gradients)
