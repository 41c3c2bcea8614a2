"""A record says the same however the global batch and the model were split."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.precision.record import Record
from tests.precision.runs import distances, record, worst
from tests.ranks import RankPool
from tests.training.job import Job


@pytest.fixture
def whole(job: Job, ranks1: RankPool, tmp_path: Path) -> Record:
    """The reference: one rank, all samples at once."""
    return record(ranks1, job, tmp_path / "whole", micro_batch_size=8)


def check(a: Record, b: Record, limit: float = 1e-5) -> None:
    for step in (0, 1):
        assert a.step(step).entries.keys() == b.step(step).entries.keys()
        found = distances(a, b, step)
        for phases in ("data weights", "forward loss", "backward", "grad_local", "grad_reduced grad_clipped"):
            distance, what = worst(found, phases)
            # The second step starts from weights that rounding, divided by small gradients, has moved apart.
            assert distance <= limit * (1 if step == 0 else 10), (step, what)
        assert a.step(step).scalars == pytest.approx(b.step(step).scalars, rel=1e-6)
        for one, other in zip(a.step(step).samples, b.step(step).samples, strict=True):
            assert (one.id, one.position, one.name, one.tokens) == (other.id, other.position, other.name, other.tokens)
            assert {
                key: one.fields[key] for key in one.fields.keys() & other.fields.keys()
            }.items() <= other.fields.items()


def test_splits_of_the_global_batch(
    job: Job, whole: Record, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    check(record(ranks1, job, tmp_path / "accumulated", micro_batch_size=1), whole)
    check(record(ranks2, job, tmp_path / "two ranks", micro_batch_size=2), whole)
