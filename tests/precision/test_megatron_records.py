"""A record of the Megatron road says the same as one of the other road, whatever the layout of the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm.precision.comparing.compare import compare
from mindspeed_mm.precision.comparing.invariants import invariants
from mindspeed_mm.precision.records.record import Record
from mindspeed_mm.precision.records.sketch import distance
from tests.precision import megatron_runs as runs
from tests.precision.megatron_runs import CP, EP, PP, SHARDED, SP, TP, Program, make_job, on_megatron, save_model
from tests.precision.runs import distances, record, worst
from tests.ranks import RankPool
from tests.training.job import Job

PHASES = ("data weights", "forward loss", "backward", "grad_local", "grad_reduced grad_clipped")
ATTENTION = "model.language_model.layers.0.self_attn"


@pytest.fixture(scope="module")
def even_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL. Tests must not write to it."""
    return save_model(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def fsdp2(even_folder: Path, ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The reference: the other road."""
    folder = tmp_path_factory.mktemp("fsdp2")
    return record(ranks2, make_job(folder, even_folder), folder / "record")


@pytest.fixture
def vlm(tmp_path: Path, even_folder: Path) -> Job:
    return make_job(tmp_path, even_folder)


def check(found: Record, expected: Record, limit: float = 1e-5) -> None:
    """Check that two records have no finding either way, and that all they have in common is the same."""
    for verdict in (compare(expected, found), compare(found, expected), invariants(found)):
        assert not verdict.findings, verdict.findings[0]
    apart = distances(found, expected)
    for phases in PHASES:
        assert worst(apart, phases)[0] <= limit, worst(apart, phases)
    mine, theirs = found.step(0), expected.step(0)
    for phases in ("weights", "grad_local", "grad_reduced", "grad_clipped", "optimizer"):
        names = [{(key.site, key.what) for key in step.of_phase(phases)} for step in (mine, theirs)]
        assert {name for name in names[0] ^ names[1] if name[1] != "buffer"} == set(), phases
    assert mine.scalars == pytest.approx(theirs.scalars, rel=1e-6)
    assert [s.id for s in mine.samples] == [s.id for s in theirs.samples]
    assert {"index"} & {sketch.rows for sketch in mine.entries.values()} == set()


def check_settings(found: Record, expected: Record) -> None:
    """Check that what is in force has the same names and values, other stages' included."""
    mine, theirs = found.manifest["effective"], expected.manifest["effective"]
    for table in ("norm_eps", "rope_base", "frozen", "parameters", "learning_rates", "loss", "clip_grad"):
        assert mine[table] == theirs[table], table
    assert mine["settings"].items() >= theirs["settings"].items()
    for one, other in zip(mine["groups"], theirs["groups"], strict=True):
        assert sorted(one["parameters"]) == sorted(other["parameters"])
        assert {**one, "parameters": 0} == {**other, "parameters": 0}


SLOW = pytest.mark.slow
LAYOUTS: dict[str, dict[str, Any]] = {
    "data parallel, optimizer distributed": SHARDED,
    "tensor": TP,
    "tensor, sequence": SP,
    "pipeline": PP,
    "context": CP,
    "context, optimizer distributed": {**CP, **SHARDED, "calculate_per_token_loss": True},
}


def params(table: dict[str, Any], default: Sequence[str]) -> list[Any]:
    """Return the names of a table, those outside of the default suite marked as slow."""
    return [name if name in default else pytest.param(name, marks=SLOW) for name in table]


@pytest.mark.parametrize("layout", params(LAYOUTS, ["tensor, sequence", "pipeline", "context"]))
def test_two_ranks(layout: str, vlm: Job, fsdp2: Record, ranks2: RankPool, tmp_path: Path) -> None:
    found = on_megatron(ranks2, vlm, tmp_path / "record", **LAYOUTS[layout])
    check(found, fsdp2)
    check_settings(found, fsdp2)


FAULTS: dict[str, tuple[Program | None, dict[str, Any], str, str]] = {
    "norm eps": (runs.norm_eps, PP, "forward", "model.language_model.layers.1.input_layernorm"),
    "rope base": (runs.rope_base, TP, "weights", "model.language_model.rotary_emb.inv_freq"),
    "angles": (runs.wrong_angles, TP, "forward", "model.language_model.rotary_emb"),
    "one rank's input of o_proj": (runs.scaled_input_of_one_rank, SP, "forward", f"{ATTENTION}.o_proj"),
    "norms left alone": (
        runs.norms_left_alone,
        SP,
        "grad_reduced",
        "model.language_model.layers.1.input_layernorm.weight",
    ),
    "scaled loss": (runs.scaled_loss, PP, "loss", "loss"),
    "another weight": (runs.another_weight, SP, "weights", "model.language_model.layers.1.self_attn.k_proj.weight"),
    "lr": (None, {**PP, "lr": "2e-3"}, "optimizer", "lr"),
    "weight decay": (None, {**PP, "weight_decay": "0.1001"}, "optimizer", "weight_decay"),
}


IN_DEFAULT = ["norm eps", "one rank's input of o_proj"]


@pytest.mark.parametrize("name", params(FAULTS, IN_DEFAULT))
def test_a_mistake_is_named(name: str, vlm: Job, fsdp2: Record, ranks2: RankPool, tmp_path: Path) -> None:
    program, flags, phase, site = FAULTS[name]
    first = compare(fsdp2, on_megatron(ranks2, vlm, tmp_path / "record", program, **flags)).first
    assert first is not None and (first.phase, first.step) == (phase, 0), first
    assert first.site == site or (phase == "optimizer" and first.site.startswith(site)), first


@SLOW
def test_the_mean_of_micro_batches(vlm: Job, ranks2: RankPool, tmp_path: Path) -> None:
    vlm.flags["calculate-per-token-loss"] = None
    vlm.model["loss_cfg"] = {"loss_type": "default"}
    expected = record(ranks2, vlm, tmp_path / "fsdp2")
    for name, flags in {"pp": PP, "cp": CP}.items():
        check(on_megatron(ranks2, vlm, tmp_path / name, **flags), expected)


FOUR: dict[str, dict[str, Any]] = {
    "tensor x pipeline": {**TP, **PP},
    "tensor x pipeline, sequence, recomputed": {
        **SP,
        **PP,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "interleaved x data": {**PP, "virtual_pipeline_model_parallel_size": 2, **SHARDED, "micro_batch_size": 1},
    "context x tensor, sequence": {**CP, **SP},
}


@SLOW
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks(layout: str, ranks1: RankPool, ranks4: RankPool, tmp_path: Path) -> None:
    tied = layout in ("tensor x pipeline", "interleaved x data")  # the first and the last stage have the same matrix
    job = make_job(tmp_path, save_model(tmp_path / "hf", num_hidden_layers=4, tie_word_embeddings=tied))
    expected = record(ranks1, job, tmp_path / "fsdp2", micro_batch_size=8)
    check(on_megatron(ranks4, job, tmp_path / "megatron", **FOUR[layout]), expected)


@SLOW
def test_experts(ranks2: RankPool, ranks4: RankPool, tmp_path: Path) -> None:
    job = make_job(tmp_path, save_model(tmp_path / "hf", "qwen3_vl_moe"), "qwen3_vl_moe")
    job.model["loss_cfg"] = {"router_aux_loss_coef": 0.5}
    expected = record(ranks2, job, tmp_path / "fsdp2 with router loss")
    check(on_megatron(ranks2, job, tmp_path / "ep with router loss", **EP), expected)
    del job.model["loss_cfg"]
    expected = record(ranks2, job, tmp_path / "fsdp2")
    check(on_megatron(ranks2, job, tmp_path / "ep", **EP), expected)
    check(on_megatron(ranks4, job, tmp_path / "ep x tp", **EP, **SP, expert_tensor_parallel_size=1), expected)
    check(on_megatron(ranks4, job, tmp_path / "ep x pp", **EP, **PP, **SHARDED), expected)


@SLOW
def test_adapters(vlm: Job, ranks2: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    vlm.flags |= {"lora-r": 4, "lora-alpha": 8, "lora-target-modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    expected = record(ranks2, vlm, tmp_path / "fsdp2", lora_apply_modules=["text_decoder"])
    fused = ["linear_qkv", "linear_proj"]
    for name, flags in {"sp": SP, "pp": PP}.items():
        check(on_megatron(ranks2, vlm, tmp_path / name, **flags, lora_target_modules=fused), expected)


@SLOW
def test_what_is_done_at_every_step(vlm: Job, ranks2: RankPool, tmp_path: Path) -> None:
    """Local norms, weights that stay and the steps before an anomaly are the other road's."""
    asked = {"log_local_norm": True, "precision_mode": "lr0", "precision_on_anomaly": "dump=2"}
    asked |= {"no_save_optim": True, "precision_capture": "steps=0-1,level=parameter"}
    expected = record(ranks2, vlm, tmp_path / "fsdp2", save=tmp_path / "save of fsdp2", **asked)
    for name, flags in {"tp": SP, "pp": {**PP, **SHARDED}}.items():
        found = on_megatron(ranks2, vlm, tmp_path / name, save=tmp_path / f"save of {name}", **asked, **flags)
        rows = [local_norms(tmp_path / f"save of {one}") for one in (name, "fsdp2")]
        assert rows[0].keys() == rows[1].keys() and rows[0] == pytest.approx(rows[1], rel=1e-4, abs=1e-8)
        sums, theirs = (Record.open(tmp_path / one / "lr0").step(1) for one in (name, "fsdp2"))
        assert sums.scalars == pytest.approx(theirs.scalars, rel=1e-6)
        assert sums.entries.keys() == theirs.entries.keys()
        assert max(distance(sums.entries[key], theirs.entries[key]).relative for key in sums.entries) < 1e-5
        for key, sketch in found.step(0).of_phase("weights").items():
            assert (found.step(1).entries[key].vector == sketch.vector).all(), key
        assert not compare(expected, found).findings


def local_norms(folder: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows[0]["local_norm"]  # type: ignore[no-any-return]
