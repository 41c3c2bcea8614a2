"""The loss per sample in every kind of layout, against Hugging Face's model on each sample by itself.

The formula is the oracle: the sum over the samples of the global batch of each one's mean over its targets, over the
number of samples. Micro-batches have different numbers of samples, one is packed, and one sample has no target.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mindspeed_mm.distributed import chunks
from mindspeed_mm.distributed.main_parameters import MainParameters
from mindspeed_mm.engine.megatron import MegatronEngine
from mindspeed_mm.errors import UserError
from tests.distributed.megatron_step import Layout, check, run
from tests.distributed.test_megatron_parity import SEQUENCE, STAGES, ULYSSES
from tests.models import tiny
from tests.models.megatron import vlm
from tests.models.megatron.test_split_sequences import packed_batch
from tests.ranks import RankPool

FAMILY = "qwen3_vl"
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


@cache
def micro_batches() -> tuple[list[dict[str, Tensor]], list[list[dict[str, Tensor]]]]:
    """Return four micro-batches, of 3, 2, 1 and 1 samples, and the samples of each by themselves."""
    row, packed = packed_batch()
    others = [tiny.tiny_batch(FAMILY, [1], length=12, seed=seed) for seed in (5, 6, 7, 8)]
    others[1]["labels"][:] = -100
    others[3]["labels"][:, :8] = -100
    keys = [key for key in others[0] if key != "mm_token_type_ids"]
    pair = {key: torch.cat([one[key] for one in others[:2]]) for key in keys}
    batches = [row, pair, *({key: one[key] for key in keys} for one in others[2:])]
    return batches, [packed, others[:2], others[2:3], others[3:]]


@cache
def oracle(mean_of_means: bool) -> tuple[float, dict[str, Tensor]]:
    _, samples = micro_batches()
    total, gradients = 0.0, {}
    everything = sum(len(group) for group in samples)
    for group in samples:
        share = 1 / (len(group) * len(samples)) if mean_of_means else 1 / everything
        for sample in group:
            if not bool((sample["labels"][:, 1:] >= 0).any()):
                continue
            loss, _, found = vlm.oracle(FAMILY, sample)
            total += share * loss
            gradients = {name: gradients.get(name, 0) + share * value for name, value in found.items()}
    return total, gradients


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(FAMILY, tmp_path_factory.mktemp("hf"))


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name", [name if row.quick else pytest.param(name, marks=pytest.mark.slow) for name, row in LAYOUTS.items()]
)
def test_all_samples_of_the_global_batch_weigh_the_same(
    folder: Path, request: pytest.FixtureRequest, name: str
) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{LAYOUTS[name].ranks}")
    loss, gradients = oracle(mean_of_means=False)
    answers = pool.run(run, str(folder), LAYOUTS[name], micro_batches()[0], "per_sample_loss")
    check(answers, {"loss": loss}, gradients)


def test_means_of_micro_batches_are_averaged(folder: Path, ranks2: RankPool) -> None:
    loss, gradients = oracle(mean_of_means=True)
    answers = ranks2.run(run, str(folder), LAYOUTS["cp2"], micro_batches()[0], "per_sample_loss", means=True)
    check(answers, {"loss": loss}, gradients)


def mismatch(folder: str) -> str:
    vlm.start()
    wrapped = chunks.reduce_gradients(vlm.build(folder), sharded=False)
    mains = MainParameters(wrapped, sharded=False)
    optimizer = torch.optim.SGD(mains.values)
    sizes = {"clip_grad": 0.0, "sequence_length": 1, "micro_batch_size": 1}
    try:
        MegatronEngine(wrapped, mains, optimizer, per_sample_loss=True, **sizes)
    except UserError as error:
        return str(error)
    return "no error"


def test_a_model_whose_gradients_would_be_divided_twice_is_refused(folder: Path, ranks1: RankPool) -> None:
    (told,) = ranks1.run(mismatch, str(folder))
    assert "calculate_per_token_loss of the TransformerConfig is False" in told and "--calculate-per-sample" in told
