"""A run goes on on other ranks, in another sharding, after several stops, and from a checkpoint of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers

from tests.checkpoint.hf import read_back
from tests.ranks import RankPool
from tests.training.job import Job
from tests.training.script import train
from tests.training.test_load_hf_folder import run
from tests.training.test_resume import STEPS, assert_same_run, losses


def test_a_run_stopped_three_times_with_dropout_is_the_run_without_a_stop(ranks: RankPool, tmp_path: Path) -> None:
    straight, chain = tmp_path / "straight", tmp_path / "chain"
    straight.mkdir(), chain.mkdir()
    ranks.run(train, str(straight), steps=STEPS)
    for steps in (2, 5, 7, STEPS):  # within the first epoch of six steps, and after it
        ranks.run(train, str(chain), "--auto-resume", steps=steps)
    assert_same_run(chain, straight)


FSDP, HSDP = "auto", 1


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("saved_by", "sharding", "loaded_by", "other_sharding"),
    [
        (2, FSDP, 1, FSDP),
        (1, FSDP, 2, FSDP),
        (2, HSDP, 2, FSDP),
        (2, FSDP, 2, HSDP),
        pytest.param(4, FSDP, 2, FSDP, marks=pytest.mark.slow),
        pytest.param(4, 2, 2, FSDP, marks=pytest.mark.slow),
        pytest.param(2, FSDP, 4, 2, marks=pytest.mark.slow),
    ],
    ids=["2-to-1", "1-to-2", "hsdp-to-fsdp", "fsdp-to-hsdp", "4-to-2", "4-hsdp-to-2", "2-to-4-hsdp"],
)
def test_losses_and_order_on_other_ranks(
    saved_by: int, sharding: Any, loaded_by: int, other_sharding: Any, job: Job, request: pytest.FixtureRequest
) -> None:
    """Without dropout, a step of four samples has the loss of the run that was not stopped, and the same samples."""
    pools = {n: request.getfixturevalue(f"ranks{n}") for n in {saved_by, loaded_by}}
    job.data["dataloader_param"]["shuffle"] = True
    job.flags |= {"global-batch-size": 4, "lr-decay-iters": 8, "lr-decay-style": "cosine"}
    folder = job.folder
    job.yaml["sharding_size"] = sharding
    text = run(pools[saved_by], job, save=folder / "straight", save_interval=2)
    shards = saved_by if sharding == FSDP else sharding
    assert f"{saved_by // shards} replica(s) x {shards} shard(s)" in text
    job.yaml["sharding_size"] = other_sharding
    run(pools[loaded_by], job, save=folder / "resumed", load=folder / "straight", ckpt_step=2)
    straight, resumed = losses(folder / "straight"), losses(folder / "resumed")
    assert sorted(resumed) == [3, 4]
    for step, (loss, norm, rate) in resumed.items():
        assert loss == pytest.approx(straight[step][0], abs=1e-6), step
        assert norm == pytest.approx(straight[step][1], rel=1e-4) and rate == straight[step][2]
    # Another order would have other losses, and not every dimension can be divided.
    assert abs(straight[3][0] - straight[4][0]) > 1e-3
    weights = dcp.FileSystemReader(folder / "straight" / "iter_0000002").read_metadata().state_dict_metadata
    assert any(entry.size and entry.size[0] % 2 for entry in weights.values())


def foreign(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Write a checkpoint as other programs of the documented layout do: ``model.model.<name>``, no file of ours."""
    dcp.save({"model": {f"model.{name}": tensor for name, tensor in weights.items()}}, checkpoint_id=folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def test_a_checkpoint_of_another_program(
    job: Job, hf_folder: Path, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    native = transformers.Qwen3VLForConditionalGeneration
    torch.manual_seed(8)
    model = native._from_config(transformers.AutoConfig.from_pretrained(hf_folder), dtype=torch.float32)
    theirs = model.state_dict()
    source = foreign(tmp_path / "whole", theirs)
    flags = {"init_model_with_meta_device": True, "skip_train": True, "export_hf": tmp_path / "out"}
    text = run(ranks2, job, load=source, **flags)
    assert "has no manifest" in text and f"loading checkpoint from {source / 'release'} at iteration 0" in text
    ours = read_back(tmp_path / "out", native)
    assert not [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])]

    name = "model.language_model.layers.1.mlp.up_proj.weight"
    partial = foreign(tmp_path / "partial", {**{k: v for k, v in theirs.items() if k != name}, "extra": torch.ones(3)})
    error = run(ranks1, job, load=partial, **flags)
    assert f"1 weights missing from the checkpoint:\n  model.{name}" in error
    assert "1 weights in the checkpoint but not in the model:\n  model.extra" in error
    text = run(ranks2, job, load=partial, load_strict="false", **{**flags, "init_model_with_meta_device": None})
    assert f"missing from the checkpoint:\n  model.{name}" in text and "not in the model:\n  model.extra" in text
    ours, initial = (read_back(folder, native) for folder in (tmp_path / "out", hf_folder))
    assert [k for k, tensor in theirs.items() if not torch.equal(tensor, ours[k])] == [name]
    assert torch.equal(ours[name], initial[name])
