"""Known faults, injected into runs on the training path: the first finding has the right phase, module and step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mindspeed_mm.precision.comparing.band import Band
from mindspeed_mm.precision.comparing.compare import compare
from mindspeed_mm.precision.comparing.doctor import Folders, doctor
from mindspeed_mm.precision.records.record import Record
from tests.precision.bench import answers, find, record, save_model
from tests.precision.faults import FAULTS
from tests.precision.more_faults import MORE
from tests.precision.port_faults import PORT
from tests.precision.test_controls import eager, nothing, recomputed
from tests.ranks import RankPool
from tests.training.job import Job

Bench = Callable[[str, int], tuple[RankPool, Path, Record, Band]]


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def bench(hf: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Bench:
    """Return pool, model, reference and its band for a dtype and a number of ranks, made once."""
    made: dict[tuple[str, int], tuple[RankPool, Path, Record, Band]] = {}

    def get(dtype: str, ranks: int) -> tuple[RankPool, Path, Record, Band]:
        if (dtype, ranks) not in made:
            pool: RankPool = request.getfixturevalue(f"ranks{ranks}")
            root = tmp_path_factory.mktemp(f"{dtype}_{ranks}")
            runs = [record(pool, root / str(seed), hf, dtype=dtype, perturb=seed) for seed in range(4)]
            made[dtype, ranks] = (pool, hf, runs[0], Band.measure(runs))
        return made[dtype, ranks]

    return get


def check(bench: Bench, name: str, dtype: str, ranks: int, folder: Path) -> None:
    pool, hf, reference, band = bench(dtype, ranks)
    candidate = record(pool, folder, hf, fault=name, dtype=dtype)
    verdict = compare(reference, candidate, band)
    assert answers(name, verdict.first), verdict.first
    assert verdict.exit_code == 1


QUICK = ["F01 norm eps", "F02 decay of biases and norms", "F04 mean of micro-batch means", "F13 images reversed"]


@pytest.mark.ranks
@pytest.mark.parametrize("name", QUICK)
def test_some_faults(name: str, bench: Bench, tmp_path: Path) -> None:
    check(bench, name, "fp32", 1, tmp_path)


@pytest.mark.ranks
@pytest.mark.parametrize("change", [nothing, eager, recomputed])
def test_harmless_changes(change: Callable[[Job], None], bench: Bench, tmp_path: Path) -> None:
    """Nothing, another attention kernel, activation checkpointing; the rest is in test_controls.py."""
    pool, hf, reference, band = bench("fp32", 1)
    verdict = compare(reference, record(pool, tmp_path, hf, change=change), band)
    assert (verdict.first, verdict.exit_code) == (None, 0)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_all_faults_in_fp32(name: str, ranks: int, bench: Bench, tmp_path: Path) -> None:
    fault = find(name)
    if fault is not None and fault.ranks > ranks:
        pytest.skip("takes more ranks")
    check(bench, name, "fp32", ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_all_faults_in_bf16(name: str, ranks: int, bench: Bench, tmp_path: Path) -> None:
    fault = find(name)
    if fault is not None and fault.ranks > 1:
        pytest.skip("a tower that FSDP leaves alone computes in fp32, which is found first")
    check(bench, name, "bf16", ranks, tmp_path)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", [*MORE, *PORT])
def test_faults_that_nothing_was_written_for(name: str, bench: Bench, tmp_path: Path) -> None:
    fault = find(name)
    check(bench, name, "fp32", fault.ranks if fault else 1, tmp_path)


STAGES = {
    "data": "preparation",
    "weights": "preparation",
    "forward": "step 1 loss",
    "loss": "step 1 loss",
    "backward": "local norms",
    "grad_local": "local norms",
    "grad_reduced": "local norms",
    "grad_clipped": "local norms",
    "optimizer": "optimizer",
}


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", FAULTS)
def test_doctor_stops_at_the_right_stage(name: str, bench: Bench, tmp_path: Path) -> None:
    fault = find(name)
    assert fault is not None
    pool, hf, reference, band = bench("fp32", fault.ranks)
    candidate = record(pool, tmp_path, hf, fault=name)
    verdict, stages = doctor(Folders(reference.folder, candidate.folder, band))
    assert verdict.exit_code == 1 and stages[-1].passed is False
    # What the candidate's own files say is found before anything is computed.
    expected = {STAGES[fault.phase]} | ({"checklist"} if fault.job else set())
    assert stages[-1].name in expected, [str(stage) for stage in stages]
