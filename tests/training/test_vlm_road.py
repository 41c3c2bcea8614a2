"""``pretrain_vlm.py`` on a tiny Qwen3-VL from files on disk, beside ``pretrain_transformers.py`` on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.training.job import ROOT, Job, run_here, save_tiny_hf_folder
from tests.training.test_resume import losses, tensors

ADAM = {"adam-eps": "1e-5", "lr-warmup-iters": 2, "lr-decay-style": "cosine", "clip-grad": "1.0"}


@pytest.fixture(scope="session")
def even_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL whose vocabulary two ranks can share. Tests must not write to it."""
    return save_tiny_hf_folder("qwen3_vl", tmp_path_factory.mktemp("hf"), vocabulary=320)


@pytest.fixture
def vlm(tmp_path: Path, even_folder: Path) -> Job:
    """A job in which everything is trained, in a global batch of 4."""
    job = Job(tmp_path, even_folder)
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


@pytest.mark.parametrize("loss", ["default", "per-token"])
def test_both_roads_have_the_same_loss_curve(vlm: Job, ranks2: RankPool, tmp_path: Path, loss: str) -> None:
    if loss == "per-token":
        vlm.flags["calculate-per-token-loss"] = True
    vlm.flags["save"] = tmp_path / "fsdp2"
    assert not any(o.code for o in ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240))
    for name, flags in {"tp": TP, "pp": PP}.items():
        train(ranks2, vlm, save=tmp_path / name, **flags)
        close(tmp_path / name, tmp_path / "fsdp2", range(1, 21))


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
    close(tmp_path / "second", tmp_path / "straight", range(4, 7), 1e-6)
    vlm.flags |= {"save": tmp_path / "third", "load": tmp_path / "first", "train-iters": 6, "lr-decay-iters": 6}
    assert not any(o.code for o in ranks2.run(run_here, vlm.command(), vlm.folder, timeout=240))
    close(tmp_path / "third", tmp_path / "straight", range(4, 7))
