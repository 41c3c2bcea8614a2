"""Harmless changes of a run, of which a comparison must say nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mindspeed_mm.precision.comparing.band import Band
from mindspeed_mm.precision.comparing.compare import compare
from mindspeed_mm.precision.records.record import Record
from mindspeed_mm.precision.selftest.model import Recipe, TinyVLM, train
from tests.precision.bench import record, save_model
from tests.precision.more_faults import with_optimizer
from tests.ranks import RankPool
from tests.training.job import Job

SEEDS = range(5)
Change = Callable[[Job], None]


def loop_adamw() -> contextlib.AbstractContextManager[None]:
    return with_optimizer(lambda groups, **options: torch.optim.AdamW(groups, foreach=False, fused=False, **options))


def eager(job: Job) -> None:
    job.model["text_decoder"] = {"attn_implementation": "eager"}
    job.model["image_encoder"] = {"vision_encoder": {"attn_implementation": "eager"}}


def permuted(job: Job) -> None:
    rows: Any = job.rows
    for start in range(0, len(rows), 4):
        rows[start : start + 4] = [rows[start + i] for i in (3, 0, 2, 1)]


def recomputed(job: Job) -> None:
    job.yaml = {**job.yaml, "recompute_modules": ["model.visual.blocks.{*}", "model.language_model.layers.{*}"]}  # type: ignore[dict-item]


def one_micro_batch(job: Job) -> None:
    job.flags["micro-batch-size"] = 4


def four_micro_batches(job: Job) -> None:
    job.flags["micro-batch-size"] = 1


def nothing(job: Job) -> None:
    pass


def epochs_of_four(job: Job) -> None:
    rows: Any = job.rows
    job.rows = rows[:4]
    job.flags["seq-length"] = 512


def packed(job: Job) -> None:
    epochs_of_four(job)
    job.data["dataset_param"]["basic_parameters"]["packing"] = True
    job.flags |= {"micro-batch-size": 1, "global-batch-size": 1}


CONTROLS: dict[str, dict[str, Any]] = {
    "a rerun": {},
    "b AdamW in a loop": {"program": loop_adamw},
    "c eager attention": {"change": eager},
    "d samples of a batch permuted": {"change": permuted},
    "e rounding noise": {"perturb": 77},
    "j activation checkpointing": {"change": recomputed},
    "k four micro-batches": {"change": four_micro_batches},
    "k one micro-batch": {"change": one_micro_batch},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """Return the model, the reference on one rank and its band for a seed, a dtype and a change of both sides."""
    made: dict[tuple[int, str, Change], tuple[Path, Record, Band]] = {}

    def get(seed: int, dtype: str, change: Change = nothing) -> tuple[Path, Record, Band]:
        if (seed, dtype, change) not in made:
            pool: RankPool = request.getfixturevalue("ranks1")
            root = tmp_path_factory.mktemp(f"reference_{seed}")
            hf = save_model(root / "hf", seed)
            runs = [
                record(pool, root / str(noise), hf, dtype=dtype, perturb=noise, seed=seed, change=change)
                for noise in range(4)
            ]
            made[seed, dtype, change] = (hf, runs[0], Band.measure(runs))
        return made[seed, dtype, change]

    return get


def check(reference: Any, pool: RankPool, folder: Path, seed: int, dtype: str, **changes: Any) -> None:
    hf, known, band = reference(seed, dtype)
    verdict = compare(known, record(pool, folder, hf, seed=seed, dtype=dtype, **changes), band)
    assert not verdict.findings, verdict.findings[0]
    assert verdict.exit_code == 0


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONTROLS)
def test_controls_on_one_rank(
    name: str, dtype: str, seed: int, reference: Any, ranks1: RankPool, tmp_path: Path
) -> None:
    check(reference, ranks1, tmp_path, seed, dtype, **CONTROLS[name])


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_rank_and_two(dtype: str, seed: int, reference: Any, ranks2: RankPool, tmp_path: Path) -> None:
    """Controls f and g: data parallelism, sharded by FSDP2."""
    check(reference, ranks2, tmp_path, seed, dtype)


@pytest.fixture(scope="module")
def ranks4() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.stop()


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("seed", SEEDS)
def test_one_rank_and_four(seed: int, reference: Any, ranks4: RankPool, tmp_path: Path) -> None:
    check(reference, ranks4, tmp_path, seed, "fp32")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("seed", SEEDS)
def test_padded_and_packed(seed: int, reference: Any, ranks1: RankPool, tmp_path: Path) -> None:
    """Control i. A step is an epoch of the same four samples in both."""
    hf, known, band = reference(seed, "fp32", epochs_of_four)
    verdict = compare(known, record(ranks1, tmp_path, hf, seed=seed, change=packed), band)
    assert not verdict.findings, verdict.findings[0]


def tensor_parallel(folder: str) -> None:
    """Train the tiny model of the self-test with its MLPs split over the ranks, in a pool rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def split(model: TinyVLM) -> None:
        column = ColwiseParallel(use_local_output=False)
        for layer in model.language_model.layers:
            assert isinstance(layer, nn.Module)
            row = RowwiseParallel(output_layouts=Replicate())
            plan: Any = {"mlp.gate_proj": column, "mlp.up_proj": column, "mlp.down_proj": row}
            parallelize_module(layer, mesh, plan)

    train(Path(folder), Recipe(change=split), dist.get_rank(), dist.get_world_size())


@pytest.mark.slow
@pytest.mark.ranks
def test_one_rank_and_tensor_parallelism(ranks1: RankPool, ranks2: RankPool, ranks4: RankPool, tmp_path: Path) -> None:
    """Control h."""
    runs = []
    for noise in range(4):
        train(tmp_path / str(noise), Recipe(noise=noise))
        runs.append(Record.open(tmp_path / str(noise)))
    band = Band.measure(runs)
    for pool in (ranks2, ranks4):
        folder = tmp_path / f"tp{pool.world_size}"
        pool.run(tensor_parallel, str(folder))
        verdict = compare(runs[0], Record.open(folder), band)
        assert not verdict.findings, verdict.findings[0]
        assert [m for m in verdict.table if m.phase == "forward" and "mlp" in m.site]
