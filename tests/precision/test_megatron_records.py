"""A record of the Megatron road says the same as one of the other road, of any layout of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.precision.compare import compare
from mindspeed_mm.precision.record import Record
from tests.precision.megatron_runs import CP, PP, SP, TP, on_megatron
from tests.precision.runs import distances, record, varied_rows, worst
from tests.ranks import RankPool
from tests.training.job import Job, save_tiny_hf_folder

PHASES = ("data weights", "forward loss", "backward", "grad_local", "grad_reduced grad_clipped")


@pytest.fixture(scope="session")
def even_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL whose vocabulary two ranks can share. Tests must not write to it."""
    return save_tiny_hf_folder("qwen3_vl", tmp_path_factory.mktemp("hf"), vocabulary=320)


@pytest.fixture
def vlm(tmp_path: Path, even_folder: Path) -> Job:
    """Two steps of eight samples of all kinds, in which everything is trained."""
    job = Job(tmp_path, even_folder)
    job.rows = varied_rows(tmp_path)
    job.model["image_encoder"] = {"vision_encoder": {"freeze": False}}
    job.flags |= {"train-iters": 2, "global-batch-size": 8, "micro-batch-size": 2, "calculate-per-token-loss": True}
    job.flags |= {"precision-capture": "steps=0-1", "clip-grad": "0.5", "adam-eps": "1e-5", "seq-length": 160}
    return job


def check(found: Record, expected: Record, limit: float = 1e-5) -> None:
    """Check that two records have no finding, and that all they have in common is the same."""
    verdict = compare(expected, found)
    assert not verdict.findings, verdict.findings[0]
    apart = distances(found, expected)
    for phases in PHASES:
        assert worst(apart, phases)[0] <= limit, worst(apart, phases)


def test_one_rank(vlm: Job, ranks1: RankPool, tmp_path: Path) -> None:
    fsdp2 = record(ranks1, vlm, tmp_path / "fsdp2")
    megatron = on_megatron(ranks1, vlm, tmp_path / "megatron")
    a, b = fsdp2.step(0).entries, megatron.step(0).entries
    print("ONLY MEGATRON", [str(k) for k in b if k not in a])
    print("MISSING", [str(k) for k in a if k not in b and k.phase not in ("forward", "backward")])
    print("MISSING fwd", [str(k) for k in a if k not in b and k.phase in ("forward",)])
    print("MISSING bwd", [str(k) for k in a if k not in b and k.phase in ("backward",)])
    d = distances(megatron, fsdp2)
    for p in PHASES: print(worst(d, p))
    print(sorted(((v, str(k)) for k, v in d.items()), reverse=True)[:20])
    check(megatron, fsdp2)


def test_effective_values_have_the_same_names(vlm: Job, ranks1: RankPool, tmp_path: Path) -> None:
    vlm.model["text_decoder"] = {"attention_dropout": 0.1}
    vlm.flags |= {"train-iters": 1, "precision-capture": "steps=0,level=parameter"}
    megatron = on_megatron(ranks1, vlm, tmp_path / "megatron").manifest["effective"]
    fsdp2 = record(ranks1, vlm, tmp_path / "fsdp2").manifest["effective"]
    for key in fsdp2:
        print(key, str(fsdp2.get(key))[:1500], "\n        ", str(megatron.get(key))[:1500])
