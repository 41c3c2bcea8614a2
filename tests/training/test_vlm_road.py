"""``pretrain_vlm.py`` on a tiny Qwen3-VL from files on disk, beside ``pretrain_transformers.py`` on the same files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.training.job import ROOT, Job, run_here, save_tiny_hf_folder
from tests.training.test_resume import losses, tensors

ADAM = {"adam-eps": "1e-5", "lr-warmup-iters": 2, "lr-decay-style": "cosine", "clip-grad": "1.0"}


@pytest.fixture(scope="session")
def odd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL whose vocabulary has to be padded. Tests must not write to it."""
    return save_tiny_hf_folder("qwen3_vl", tmp_path_factory.mktemp("hf"), vocabulary=321)


@pytest.fixture
def vlm(tmp_path: Path, odd_folder: Path) -> Job:
    """A job in which everything is trained, in a global batch of 4."""
    job = Job(tmp_path, odd_folder)
    job.model["image_encoder"] = {"vision_encoder": {"freeze": False}}
    job.flags |= {"global-batch-size": 4, "train-iters": 20, **ADAM}
    return job


def on_megatron(job: Job, **flags: Any) -> list[str]:
    """Return the command of the same job on the Megatron road."""
    before, script = dict(job.flags), job.script
    job.script = ROOT / "pretrain_vlm.py"
    job.flags |= {"use-torch-fsdp2": None, "fsdp2-config-path": None, "ckpt-format": "torch_dist"}
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    command = job.command()
    job.flags, job.script = before, script
    return command


def train(pool: RankPool, job: Job, **flags: Any) -> None:
    outcomes = pool.run(run_here, on_megatron(job, **flags), job.folder, timeout=240)
    assert not any(outcome.code for outcome in outcomes), "\n".join(outcome.text for outcome in outcomes)


def close(one: Path, other: Path, steps: range, limit: float = 1e-5) -> None:
    """Check that loss and grad norm of two runs are the same, and the learning rate exactly."""
    mine, theirs = losses(one), losses(other)
    assert sorted(mine) == list(steps)
    for step in steps:
        (*numbers, rate), (*wanted, expected_rate) = mine[step], theirs[step]
        assert rate == expected_rate
        worst = max(abs(a - b) / abs(b) for a, b in zip(numbers, wanted, strict=True))
        assert worst <= limit, (step, worst, numbers, wanted)


TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    "loss", [pytest.param("default", marks=pytest.mark.slow), pytest.param("sample", marks=pytest.mark.slow), "token"]
)
def test_both_roads_have_the_same_loss_curve(vlm: Job, ranks2: RankPool, tmp_path: Path, loss: str) -> None:
    if loss != "default":
        vlm.flags[f"calculate-per-{loss}-loss"] = True
    vlm.flags["save"] = tmp_path / "fsdp2"
    assert not any(o.code for o in ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240))
    for name, flags in {"tp": TP, "pp": PP}.items():
        train(ranks2, vlm, save=tmp_path / name, **flags)
        close(tmp_path / name, tmp_path / "fsdp2", range(1, 21))


@pytest.mark.slow
def test_both_roads_have_the_same_router_loss(ranks2: RankPool, tmp_path: Path) -> None:
    job = Job(tmp_path, save_tiny_hf_folder("qwen3_vl_moe", tmp_path / "hf", vocabulary=321))
    job.model |= {"model_id": "qwen3_vl_moe", "image_encoder": {"vision_encoder": {"freeze": False}}}
    job.model["loss_cfg"] = {"router_aux_loss_coef": 0.1}
    job.flags |= {"global-batch-size": 4, "train-iters": 6, "calculate-per-token-loss": True, **ADAM}
    job.flags["save"] = tmp_path / "fsdp2"
    assert not any(o.code for o in ranks2.run(run_here, job.command(), job.folder, timeout=240))
    flags = {**TP, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    train(ranks2, job, save=tmp_path / "ep", **flags, moe_token_dispatcher_type="alltoall")
    close(tmp_path / "ep", tmp_path / "fsdp2", range(1, 7))
    mine, theirs = (
        [json.loads(line)["aux_loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ep", "fsdp2")
    )
    assert len(mine) == 6 and all(abs(a - b) <= 1e-5 * b for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        {**TP},
        pytest.param({**PP}, marks=pytest.mark.slow),
        pytest.param({"use_distributed_optimizer": True, "bf16": True, "no_load_rng": None}, marks=pytest.mark.slow),
        pytest.param(
            {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tp", "pp", "sharded-bf16", "sharded-overlap"],
)
def test_resuming_in_the_same_layout_changes_no_bit(
    vlm: Job, ranks2: RankPool, tmp_path: Path, layout: dict[str, Any]
) -> None:
    vlm.model["text_decoder"] = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    flags = {**layout, "train_iters": 6, "lr_decay_iters": 6}
    train(ranks2, vlm, save=tmp_path / "straight", **flags)
    train(ranks2, vlm, save=tmp_path / "resumed", **{**flags, "train_iters": 3})
    train(ranks2, vlm, save=tmp_path / "resumed", load=tmp_path / "resumed", **flags)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    expected, actual = (tensors(tmp_path / name / "iter_0000006") for name in ("straight", "resumed"))
    assert expected.keys() == actual.keys()
    assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])]


def test_a_checkpoint_resumes_in_another_layout_and_on_the_other_road(
    vlm: Job, ranks2: RankPool, tmp_path: Path
) -> None:
    flags = {"train_iters": 6, "lr_decay_iters": 6}
    train(ranks2, vlm, save=tmp_path / "straight", **TP, **flags)
    train(ranks2, vlm, save=tmp_path / "first", **TP, **{**flags, "train_iters": 3})
    train(ranks2, vlm, save=tmp_path / "second", load=tmp_path / "first", **PP, **flags)
    close(tmp_path / "second", tmp_path / "straight", range(4, 7), 1e-6)
    vlm.flags |= {"save": tmp_path / "third", "load": tmp_path / "first", "train-iters": 6, "lr-decay-iters": 6}
    assert not any(o.code for o in ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240))
    close(tmp_path / "third", tmp_path / "straight", range(4, 7))


@pytest.mark.slow
def test_the_documented_yaml_shards_this_model_too(vlm: Job, ranks2: RankPool, tmp_path: Path) -> None:
    vlm.flags |= {"train-iters": 3, "lr-decay-iters": 3}
    train(ranks2, vlm, save=tmp_path / "megatron", **TP)
    vlm.script = ROOT / "pretrain_vlm.py"
    vlm.flags["save"] = tmp_path / "fsdp2"
    vlm.yaml = {
        "sharding_size": "auto",
        "sub_modules_to_wrap": [
            "text_decoder.decoder.layers.{*}",
            "text_decoder.embedding",
            "text_decoder.output_layer",
        ],
    }
    assert not any(o.code for o in ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240))
    close(tmp_path / "fsdp2", tmp_path / "megatron", range(1, 4))


def test_evaluation_saving_beside_and_export(vlm: Job, ranks2: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    vlm.data["dataset_param"]["basic_parameters"]["val_rate"] = 0.25
    vlm.flags |= {"train-iters": 4, "eval-iters": 2, "eval-interval": 2, "save-interval": 2, "async-save": True}
    train(ranks2, vlm, save=tmp_path / "tp", export_hf=tmp_path / "hf", **TP)
    train(ranks2, vlm, save=tmp_path / "pp", keep_best=1, **PP)
    rows = [validation(tmp_path / name) for name in ("tp", "pp")]
    assert [sorted(one) for one in rows] == [[2, 4], [2, 4]]
    assert all(abs(rows[0][step] - rows[1][step]) <= 1e-5 * rows[0][step] for step in (2, 4))
    assert (tmp_path / "pp" / "iter_0000004" / "manifest.json").is_file()
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").state_dict()
    saved = tensors(tmp_path / "tp" / "iter_0000004")
    assert not [n for n, value in exported.items() if not torch.equal(value, saved[f"model.model.{n}"])]


@pytest.mark.parametrize(
    "flags",
    [
        {**TP, "export_hf_interval": 2},
        pytest.param({"use_distributed_optimizer": True, "overlap_param_gather": True, "overlap_grad_reduce": True,
                      "export_hf_interval": 2}, marks=pytest.mark.slow),
    ],
    ids=["tp", "sharded"],
)  # fmt: skip
def test_averaged_weights_are_exported_and_change_nothing(
    vlm: Job, ranks2: RankPool, tmp_path: Path, flags: dict[str, Any]
) -> None:
    from transformers import AutoModelForImageTextToText

    vlm.flags |= {"train-iters": 4, "optimizer-selection": "fused_ema_adamw", "ema-decay": 0.5}
    train(ranks2, vlm, save=tmp_path / "averages", export_hf=tmp_path / "out", **flags)
    train(ranks2, vlm, save=tmp_path / "alone", **{**flags, "export_hf_interval": None})
    assert losses(tmp_path / "averages") == losses(tmp_path / "alone")
    saved = tensors(tmp_path / "averages" / "iter_0000004")
    for folder, key in (("out", "model.model.{}"), ("out-ema", "optimizer.state.model.{}.ema")):
        exported = AutoModelForImageTextToText.from_pretrained(tmp_path / folder).state_dict()
        assert not [n for n, value in exported.items() if not torch.equal(value, saved[key.format(n)])], folder


def test_a_batch_without_labels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    from mindspeed_mm.errors import UserError

    monkeypatch.setattr("mindspeed_mm.training.get_args", lambda: None)
    loss_func = runpy.run_path(str(ROOT / "pretrain_vlm.py"))["loss_func"]
    with pytest.raises(UserError, match="the batch has no 'labels'"):
        loss_func({"loss": None, "logits": torch.ones(1, 2, 3)})


def validation(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row["validation loss"] for row in rows if "validation loss" in row}


@pytest.mark.slow
def test_a_layout_that_does_not_fit_is_refused_before_ranks_meet(vlm: Job) -> None:
    outcome = last_rank_alone(on_megatron(vlm, tensor_model_parallel_size=3, global_batch_size=8), vlm.folder, 3)
    assert outcome.startswith("error")
    assert "--tensor-model-parallel-size 3 does not divide the 4 attention heads (num_attention_heads)" in outcome


def last_rank_alone(command: list[str], folder: Path, world_size: int) -> str:
    """Run the last rank of a job whose other ranks never start; return its message."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(world_size), "RANK": str(world_size - 1)}
    process = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return process.stderr[process.stderr.index("error") :]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_skipped_on_all_stages(vlm: Job, ranks2: RankPool, tmp_path: Path) -> None:
    script = (ROOT / "pretrain_vlm.py").read_text(encoding="utf-8")
    bad = "if args.iteration == 1:\n        loss = loss * float('nan')\n    report ="
    vlm.use_script(script.replace("report =", bad, 1), "pretrain_vlm.py")
    vlm.flags |= {"train-iters": 3, "nan-policy": "skip", "use-torch-fsdp2": None, "fsdp2-config-path": None}
    vlm.flags |= {"ckpt-format": "torch_dist", "save": tmp_path / "out", "pipeline-model-parallel-size": 2}
    outcomes = ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240)
    assert not any(outcome.code for outcome in outcomes), outcomes
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [False, True, False]
    assert math.isnan(rows[1]["grad_norm"]) and math.isfinite(rows[2]["loss"])
