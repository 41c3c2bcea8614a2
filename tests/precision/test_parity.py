"""A record says the same however the global batch and the model were split, and activations are kept or recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.precision.records.record import Record
from mindspeed_mm.precision.records.sketch import distance
from tests.precision.runs import comparable, distances, record, worst
from tests.ranks import RankPool
from tests.training.job import Job

PHASES = ("data weights", "forward loss", "backward", "grad_local", "grad_reduced grad_clipped")
RECOMPUTED = ["model.language_model.layers.{*}", "model.visual.blocks.{*}"]


def check(a: Record, b: Record, step: int = 0, limit: float = 1e-5) -> None:
    found = distances(a, b, step)
    assert comparable(a.step(step)).keys() == comparable(b.step(step)).keys() == found.keys()
    assert {"index"} & {sketch.rows for sketch in a.step(step).entries.values()} == set()
    for phases in PHASES:
        assert worst(found, phases)[0] <= limit, (step, worst(found, phases))
    assert a.step(step).scalars == pytest.approx(b.step(step).scalars, rel=1e-6)


@pytest.fixture
def whole(job: Job, ranks1: RankPool, tmp_path: Path) -> Record:
    """The reference: one rank, all samples at once."""
    return record(ranks1, job, tmp_path / "whole", micro_batch_size=8)


def test_every_split_of_the_global_batch(
    job: Job, whole: Record, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    accumulated = record(ranks1, job, tmp_path / "accumulated", micro_batch_size=1)
    shared = record(ranks2, job, tmp_path / "shared", micro_batch_size=2)
    job.yaml["sharding_size"] = 1
    replicated = record(ranks2, job, tmp_path / "replicated", micro_batch_size=4)
    for other in (accumulated, shared, replicated):
        check(other, whole)
        # The second step starts from weights that rounding, divided by small gradients, has moved apart.
        check(other, whole, step=1, limit=1e-4)
        for one, same in zip(other.step(0).samples, whole.step(0).samples, strict=True):
            ours, theirs = ({**s.fields, "position_ids": ""} for s in (one, same))  # not in a batch without images
            assert ours == theirs and {"input_ids", "labels"} < ours.keys()
            assert (one.id, one.position, one.name, one.tokens) == (same.id, same.position, same.name, same.tokens)


def test_the_sum_of_local_gradients_is_the_reduced_one(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    step = record(ranks2, job, tmp_path / "r", micro_batch_size=2, precision_capture="steps=0", train_iters=1).step(0)
    reduced = {key.site: sketch for key, sketch in step.of_phase("grad_reduced").items()}
    local = {key.site: sketch for key, sketch in step.of_phase("grad_local").items()}
    assert local.keys() == reduced.keys()
    assert max(distance(local[site], reduced[site]).relative for site in local) < 1e-5


@pytest.mark.parametrize("keep", [pytest.param(None, marks=pytest.mark.slow), "matmul"])
def test_recomputed_layers_are_recorded_once(
    keep: str | None, job: Job, whole: Record, ranks1: RankPool, tmp_path: Path
) -> None:
    job.yaml |= {"recompute_modules": RECOMPUTED} | ({"recompute_keep": keep} if keep else {})
    other = record(ranks1, job, tmp_path / "recomputed", micro_batch_size=8)
    assert list(other.step(0).entries) == list(whole.step(0).entries)
    assert set(distances(other, whole).values()) == {0.0}


def test_packs_are_as_their_samples(job: Job, whole: Record, ranks1: RankPool, tmp_path: Path) -> None:
    job.data["dataset_param"]["basic_parameters"]["packing"] = True
    flags: dict[str, Any] = {"micro_batch_size": 1, "global_batch_size": 1, "seq_length": 520}
    check(record(ranks1, job, tmp_path / "packed", train_iters=1, precision_capture="steps=0", **flags), whole)


@pytest.mark.slow
def test_eager_attention_has_the_same_sites(job: Job, whole: Record, ranks1: RankPool, tmp_path: Path) -> None:
    job.model["text_decoder"] = {"attn_implementation": "eager"}
    job.model["image_encoder"] = {"vision_encoder": {"attn_implementation": "eager"}}
    check(record(ranks1, job, tmp_path / "eager", micro_batch_size=8), whole)


def test_chunks_of_the_loss_leave_out_the_logits_only(
    job: Job, whole: Record, ranks1: RankPool, tmp_path: Path
) -> None:
    job.model["loss_cfg"] = {"compute_mode": "chunk", "chunk_size": 16}
    other = record(ranks1, job, tmp_path / "chunks", micro_batch_size=8)
    missing = comparable(whole.step(0)).keys() - comparable(other.step(0)).keys()
    assert missing and all(key.site == "lm_head" or key.what.endswith("logits") for key in missing)
    assert not comparable(other.step(0)).keys() - comparable(whole.step(0)).keys()
    assert "chunks" in other.step(0).notes[0]
    found = distances(other, whole)
    assert max(worst(found, phases)[0] for phases in PHASES) <= 1e-5


@pytest.mark.slow
def test_four_ranks(job: Job, whole: Record, tmp_path: Path) -> None:
    ranks4 = RankPool(4)
    check(record(ranks4, job, tmp_path / "four", micro_batch_size=2), whole)
    job.yaml["sharding_size"] = 2
    check(record(ranks4, job, tmp_path / "two by two", micro_batch_size=1), whole)
    ranks4.stop()
