"""``pretrain_vlm.py`` on a tiny Qwen3-VL from files on disk, beside ``pretrain_transformers.py`` on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.training.job import ROOT, Job, run_here
from tests.training.test_resume import losses, tensors

ADAM = {"adam-eps": "1e-5", "lr-warmup-iters": 2, "lr-decay-style": "cosine", "clip-grad": "1.0"}


@pytest.fixture
def vlm(job: Job) -> Job:
    """The job with everything trained, in a global batch of 4."""
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


def close(one: list[float], other: list[float], limit: float = 1e-5) -> None:
    assert len(one) == len(other)
    assert max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True)) <= limit, (one, other)


TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize("loss", ["default", "per-token"])
def test_both_roads_have_the_same_loss_curve(vlm: Job, ranks2: RankPool, tmp_path: Path, loss: str) -> None:
    if loss == "per-token":
        vlm.flags["calculate-per-token-loss"] = True
    vlm.flags["save"] = tmp_path / "fsdp2"
    assert not any(o.code for o in ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240))
    expected = losses(tmp_path / "fsdp2")
    assert len(expected) == 20
    for name, flags in {"tp": TP, "pp": PP}.items():
        train(ranks2, vlm, save=tmp_path / name, **flags)
        close(losses(tmp_path / name), expected)


def test_resuming_in_the_same_layout_changes_no_bit(vlm: Job, ranks2: RankPool, tmp_path: Path) -> None:
    flags = {"use_distributed_optimizer": True, "train_iters": 6, "lr_decay_iters": 6}
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
    close(losses(tmp_path / "second"), losses(tmp_path / "straight")[3:], 1e-6)
    vlm.flags |= {"save": tmp_path / "third", "load": tmp_path / "first", "train-iters": 6, "lr-decay-iters": 6}
    assert not any(o.code for o in ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240))
    close(losses(tmp_path / "third"), losses(tmp_path / "straight")[3:], 1e-5)
