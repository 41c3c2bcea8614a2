"""``--load`` of a Hugging Face folder: its weights at step 0, whatever else the model could have started from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.checkpoint.hf import differing, read_back
from tests.ranks import RankPool
from tests.training import script
from tests.training.job import Job, run_here
from tests.training.test_resume import losses


@pytest.fixture
def other(hf_folder: Path, tmp_path: Path) -> Path:
    """A folder of the job's model with other weights, in bfloat16, and nothing else."""
    config = transformers.AutoConfig.from_pretrained(hf_folder)
    torch.manual_seed(8)
    model = transformers.Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "other", max_shard_size="60KB")
    return tmp_path / "other"


def run(pool: RankPool, job: Job, **flags: Any) -> str:
    """Run the job with some flags changed; return what rank 0 printed, or its error."""
    before = dict(job.flags)
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    outcomes = pool.run(run_here, job.command(), job.folder)
    job.flags = before
    failed = next((outcome for outcome in outcomes if outcome.code), None)
    return failed.error() if failed else outcomes[0].text


@pytest.mark.parametrize("onto_meta", [None, True], ids=["built", "meta"])
def test_its_weights_replace_those_of_the_model(
    onto_meta: bool | None, job: Job, other: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    job.model |= {"random_init": bool(onto_meta)}
    flags = {"init_model_with_meta_device": onto_meta, "skip_train": True, "export_hf": tmp_path / "out"}
    text = run(ranks2, job, load=other, **flags)
    assert f"loading weights from {other}" in text
    native = transformers.Qwen3VLForConditionalGeneration
    expected = {name: tensor.float() for name, tensor in read_back(other, native).items()}
    assert not differing(expected, read_back(tmp_path / "out", native))


def test_a_run_from_it_is_a_run_from_scratch_and_is_resumed(
    job: Job, other: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    job.flags |= {"lr-warmup-iters": 1, "lr-decay-iters": 8}
    loaded, straight = tmp_path / "loaded", tmp_path / "straight"
    again = {"save": loaded, "load": other, "finetune": True, "auto_resume": True}
    run(ranks2, job, train_iters=2, **again)
    text = run(ranks2, job, **again)
    assert f"loading checkpoint from {loaded / 'iter_0000002'}" in text and f"from {other}" not in text
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "other" / name).write_text((Path(job.model["init_from_hf_path"]) / name).read_text())
    job.model["init_from_hf_path"] = str(other)
    run(ranks2, job, save=straight)
    assert losses(loaded) == losses(straight) and sorted(losses(straight)) == [1, 2, 3, 4]


def test_what_it_cannot_be_loaded_with(job: Job, other: Path, ranks1: RankPool) -> None:
    error = run(ranks1, job, load=other, ckpt_step=3)
    assert "--ckpt-step 3 asks for iter_0000003" in error and "without --ckpt-step" in error
    error = run(ranks1, job, load=other, lora_target_modules=["q_proj"], lora_r=4)
    assert "puts adapters on it with --load-base-model" in error
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    job.model["init_from_hf_path"] = str(other)
    (other / "config.json").write_text(json.dumps(config))
    error = run(ranks1, job, load=other, init_model_with_meta_device=True)
    assert "weights do not fit the model" in error and "weights missing" in error


def of_no_hf_model(folder: str, hf: str) -> str:
    from tests.training.test_saving import capture

    code, text = capture(lambda: script.train(folder, "--load", hf, steps=1))
    assert code == 1
    return text


def test_a_model_of_ones_own(other: Path, ranks1: RankPool, tmp_path: Path) -> None:
    (text,) = ranks1.run(of_no_hf_model, str(tmp_path), str(other))
    assert f"error: {other} is a Hugging Face folder, and the model of this run is no Hugging Face model" in text
