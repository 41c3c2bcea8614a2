"""Runs with LoRA: adapters alone are trained and saved, a run is resumed, and peft reads what was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mindspeed_mm.checkpoint.convert import dcp_to_hf
from mindspeed_mm.cli import app
from mindspeed_mm.errors import UserError
from tests.ranks import RankPool
from tests.training.job import SCRIPTS, Job, run_here
from tests.training.test_resume import losses, tensors

peft = pytest.importorskip("peft")


def run(pool: RankPool, job: Job, **flags: Any) -> str:
    """Run the job in pool ranks with some flags changed, and return what rank 0 printed, with the error if any."""
    before = dict(job.flags)
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    outcomes = pool.run(run_here, job.command(), job.folder, timeout=240)
    job.flags = before
    failed = next((outcome for outcome in outcomes if outcome.code), None)
    return failed.error() if failed else outcomes[0].text


@pytest.fixture
def lora_job(job: Job) -> Job:
    """Ten steps with dropout and adapters in both towers; of four samples, one rank's have no image."""
    for row in job.rows[1::4]:
        row["images"], row["messages"][0]["content"] = [], "What is this?"
    job.flags |= {"lora-target-modules": ["q_proj", "v_proj", "qkv"], "lora-dropout": 0.2, "lora-r": 4}
    job.flags |= {"global-batch-size": 4, "train-iters": 10, "lr-decay-iters": 20}
    return job


def assert_same_run(resumed: Path, straight: Path) -> None:
    assert losses(resumed) == losses(straight)
    expected, actual = (tensors(folder / "iter_0000010") for folder in (straight, resumed))
    assert expected.keys() == actual.keys()
    assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ten_steps_are_five_and_five_and_peft_reads_them(
    lora_job: Job, hf_folder: Path, world_size: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    pool = request.getfixturevalue(f"ranks{world_size}")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    text = run(pool, lora_job, save=straight, export_hf=tmp_path / "adapter")
    assert "LoRA: 1,920 of " in text and "12 tensors | 1,920 parameters" in text, text
    # Built on meta, the weights under the adapters are streamed in: the same ones.
    run(pool, lora_job, save=resumed, train_iters=5, init_model_with_meta_device=True)
    run(pool, lora_job, save=resumed, load=resumed, init_model_with_meta_device=True)
    assert_same_run(resumed, straight)

    saved = tensors(straight / "iter_0000010")
    assert len(saved) == 12 * 4 and all(".lora_" in key for key in saved)  # a weight and AdamW's three
    for folder in (straight / "iter_0000010", tmp_path / "adapter"):
        base = AutoModelForImageTextToText.from_pretrained(hf_folder)
        before = {name: value.clone() for name, value in base.state_dict().items()}
        model = peft.PeftModel.from_pretrained(base, str(folder)).base_model.model
        for name, value in model.state_dict().items():
            origin = before if ".lora_" not in name else saved
            key = name.replace(".base_layer", "") if origin is before else f"model.model.{name}"
            assert torch.equal(value, origin[key]), name
        assert all(value.any() for name, value in model.state_dict().items() if ".lora_B" in name), "nothing learned"

    command = ["convert", "lora-merge", "--hf-dir", hf_folder, "--adapter", straight, "--save-dir", tmp_path / "merged"]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    base = AutoModelForImageTextToText.from_pretrained(hf_folder)
    expected = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(value, merged[name])]
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    with pytest.raises(UserError, match=r"iter_0000010 holds adapters \(LoRA\): use mindspeed-mm convert lora-merge"):
        dcp_to_hf(straight, tmp_path / "none", hf_folder)


def test_what_does_not_fit_is_said(lora_job: Job, ranks1: RankPool, tmp_path: Path) -> None:
    """Each mistake of resuming, with the message that names the fix."""
    adapters, full = tmp_path / "adapters", tmp_path / "full"
    run(ranks1, lora_job, save=adapters, train_iters=1)
    none = {"lora_target_modules": None, "lora_r": None, "lora_dropout": None}
    run(ranks1, lora_job, save=full, train_iters=1, **none)
    for flags, expected in (
        ({"load": adapters, "lora_r": 8}, r"other adapters than this run trains:\n  --lora-r: saved 4, this run 8$"),
        (
            {"load": adapters, "lora_target_modules": ["q_proj"]},
            r"--lora-target-modules: saved \S+q_proj .*, this run \S+q_proj \S+q_proj$",
        ),
        ({"load": full}, r"holds no adapters\. .* pass it as --load-base-model instead"),
        ({"load": adapters, **none}, r"holds adapters \(LoRA\), and this run has none\. Pass the --lora flags"),
        ({"load_base_model": adapters}, r"--load-base-model \S+ does not fit the model"),
        ({"load_base_model": tmp_path}, r"no checkpoint: there is no latest_checkpointed_iteration\.txt"),
        (
            {"lora_target_modules": ["q_porj"]},
            r"--lora-target-modules: 'q_porj' matches no module\. Did you mean 'q_proj'",
        ),
        ({"lora_target_modules": None}, r"--lora-r --lora-dropout: there is no LoRA without --lora-target-modules"),
    ):
        message = run(ranks1, lora_job, **flags)
        assert re.search(expected, message), message
    lora_job.model["image_encoder"] = {"vision_encoder": {"freeze": True}}
    message = run(ranks1, lora_job, lora_target_modules=["qkv"])
    assert re.search(r"all that it matches is frozen, .*: model\.visual\.blocks\.\{0-1\}\.attn\.qkv", message), message
    message = run(ranks1, lora_job, lora_target_modules=["all-linear"], train_iters=1)
    assert "language_model" in message.split("LoRA:")[1] and "visual.blocks" not in message.split("LoRA:")[1]


@pytest.fixture
def own_job(job: Job) -> Job:
    """A model of the user's own, which no folder has the weights of."""
    job.script = SCRIPTS / "pretrain_custom.py"
    job.yaml = {"sharding_size": "auto", "sub_modules_to_wrap": ["text_decoder.decoder.layers.{*}"]}
    job.flags |= {"mm-data": None, "mm-model": None, "micro-batch-size": 8, "global-batch-size": 32, "train-iters": 10}
    job.flags |= {"lr": "3e-3", "lr-decay-iters": 20}
    job.flags["lora-target-modules"] = ["text_decoder.decoder.layers.{0-4}.mlp", "output_layer"]
    return job


def test_on_the_weights_of_a_checkpoint(own_job: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    base, straight, resumed = (tmp_path / name for name in ("base", "straight", "resumed"))
    run(ranks2, own_job, save=base, train_iters=2, lora_target_modules=None)
    run(ranks2, own_job, save=straight, load_base_model=base, init_model_with_meta_device=True)
    run(ranks2, own_job, save=resumed, load_base_model=base, train_iters=5)
    run(ranks2, own_job, save=resumed, load_base_model=base, load=resumed)
    assert_same_run(resumed, straight)
    assert all(".lora_" in key for key in tensors(straight / "iter_0000010"))
    message = run(ranks1, own_job, load=straight, train_iters=20)
    assert re.search(r"adapters alone, without the weights under them\. Pass --load-base-model; .*/base", message)


@pytest.mark.slow
def test_weights_that_cannot_be_read_again_are_saved(own_job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(ranks2, own_job, save=straight, init_model_with_meta_device=True)
    run(ranks2, own_job, save=resumed, init_model_with_meta_device=True, train_iters=5)
    run(ranks2, own_job, save=resumed, init_model_with_meta_device=True, load=resumed)
    assert_same_run(resumed, straight)
    saved = tensors(straight / "iter_0000010")
    assert "model.text_decoder.decoder.layers.0.mlp.0.weight" in saved


@pytest.mark.ranks
def test_averaged_adapters_are_exported_too(lora_job: Job, hf_folder: Path, ranks2: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    lora_job.flags |= {"optimizer-selection": "fused_ema_adamw", "ema-decay": 0.5, "train-iters": 2}
    lora_job.yaml["offload_to_cpu"] = True
    text = run(ranks2, lora_job, save=tmp_path / "ckpt", export_hf=tmp_path / "out", export_hf_interval=1)
    assert text.count("exported the averaged weights to") == 3, text
    saved = tensors(tmp_path / "ckpt/iter_0000002")
    for folder, key in (("out", "model.model.{}"), ("out-ema", "optimizer.state.model.{}.ema")):
        base = AutoModelForImageTextToText.from_pretrained(hf_folder)
        model = peft.PeftModel.from_pretrained(base, str(tmp_path / folder)).base_model.model
        found = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
        assert len(found) == 12
        for name, value in found.items():
            assert torch.equal(value, saved[key.format(name)]), name
