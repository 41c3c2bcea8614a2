"""Scripts written as the migration guide writes them train on two ranks, save and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool
from tests.training.job import SCRIPTS, Job, Outcome, launch, run_here, save_tiny_hf_folder

# The guide's example, with the tabs it has at the ends of its lines.
GUIDE_YAML = """\
sharding_size: auto\t
sub_modules_to_wrap:\t
  - "text_decoder.output_layer"\t
  - "text_decoder.embedding"\t
  - "text_decoder.rotary_pos_emb"\t
  - "text_decoder.decoder.layers.{*}"\t
param_dtype: "bf16"\t
reduce_dtype: "fp32"\t
cast_forward_inputs: True\t
ignored_modules:\t
  - "image_encoder"\t
recompute_modules:\t
  - "text_decoder.decoder.layers.{*}"\t
num_to_forward_prefetch: 2\t
num_to_backward_prefetch: 2
offload_to_cpu: False
"""
PATTERNS_YAML = """\
sharding_size: auto
sub_modules_to_wrap:
  - text_decoder.decoder.layers.{0-2}
  - text_decoder.decoder.layers.{3,5}
  - text_decoder.decoder.layers.{4}.mlp.{*}
recompute_modules:
  - text_decoder.decoder.layers.{*}
num_to_forward_prefetch: 1
num_to_backward_prefetch: 1
"""


def use(job: Job, script: str, **flags: Any) -> None:
    """Train a script of the user's, without config files unless they are named."""
    job.script = SCRIPTS / script
    job.flags |= {"mm-data": None, "mm-model": None, "micro-batch-size": 8, "global-batch-size": 32}
    job.flags |= {"train-iters": 30, "lr": "3e-3", "clip-grad": 1.0}
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()}


def train(ranks2: RankPool, job: Job) -> Outcome:
    outcomes = ranks2.run(run_here, job.command(), job.folder)
    text = "\n".join(outcome.text for outcome in outcomes)
    assert [outcome.code for outcome in outcomes] == [0, 0], text
    return Outcome(0, text, 0.0)


def falls(losses: list[float], to: float) -> bool:
    return sum(losses[-5:]) / 5 < to * sum(losses[:5]) / 5


@pytest.mark.parametrize(
    ("yaml", "model_class", "meta"),
    [
        (GUIDE_YAML, "CustomModel", None),
        (PATTERNS_YAML, "CustomModel", True),
        (PATTERNS_YAML, "ModelWithStrategy", None),
        (PATTERNS_YAML, "ModelWithFullyShard", None),
        pytest.param(GUIDE_YAML, "ModelWithStrategy", True, marks=pytest.mark.slow),
        pytest.param(GUIDE_YAML, "ModelWithFullyShard", True, marks=pytest.mark.slow),
    ],
)
def test_custom_model(ranks2: RankPool, job: Job, yaml: str, model_class: str, meta: bool | None) -> None:
    job.yaml = yaml
    steps = 60 if meta else 30  # the mixin's N(0, 0.02) starts slower than PyTorch's own values for so small a model
    use(job, "pretrain_custom.py", model_class=model_class, init_model_with_meta_device=meta, train_iters=steps)
    outcome = train(ranks2, job)
    assert f"model: {model_class}" in outcome.text and "text_decoder.decoder.layers.{0-" in outcome.text
    assert len(outcome.losses) == steps and falls(outcome.losses, to=0.9), outcome.losses


@pytest.mark.slow
@pytest.mark.ranks
def test_custom_model_under_torchrun_saves_and_resumes(ranks2: RankPool, job: Job) -> None:
    job.yaml = PATTERNS_YAML
    use(job, "pretrain_custom.py", save="ckpt", save_interval=20, eval_interval=20, eval_iters=2)
    straight = launch(job)
    assert straight.code == 0 and falls(straight.losses, to=0.8), straight.text
    for line in ("validation loss at iteration 20 |", "iteration 30 on test set", "successfully saved checkpoint"):
        assert line in straight.text
    job.flags |= {"load": "ckpt", "ckpt-step": 20, "save": None, "save-interval": None}
    assert train(ranks2, job).losses == straight.losses[20:]


def test_tutorial_with_frozen_encoders(ranks2: RankPool, job: Job) -> None:
    job.yaml = {
        "sharding_size": 2,
        "sub_modules_to_wrap": ["predictor.blocks.{*}", "predictor.proj_out"],
        "ignored_modules": ["ae", "text_encoder"],
        "recompute_modules": ["predictor.blocks.{*}"],
        "param_dtype": "fp32",
    }
    job.model = {"custom": {"latent": 16, "width": 32, "depth": 3}}
    use(
        job,
        "pretrain_diffusion.py",
        **{"num-workers": 8, "min-lr": "3e-3", "lr-decay-style": "constant", "weight-decay": "1e-2"},
        **{"adam-beta1": 0.9, "adam-beta2": 0.999, "adam-eps": "1e-8", "lr-warmup-init": 0, "lr-warmup-iters": 0},
        **{"no-gradient-accumulation-fusion": True, "untie-embeddings-and-output-weights": True},
        **{"mm-model": "model.json", "save": "ckpt", "save-interval": 20},
    )
    straight = train(ranks2, job)
    assert len(straight.losses) == 30 and falls(straight.losses, to=0.95), straight.losses
    job.flags |= {"load": "ckpt", "ckpt-step": 20, "save": None, "save-interval": None}
    resumed = train(ranks2, job)
    assert resumed.losses == straight.losses[20:]


@pytest.fixture(scope="session")
def internvl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_hf_folder("internvl", tmp_path_factory.mktemp("internvl"))


@pytest.mark.parametrize("way", ["plugin", "script"])
def test_adapter_of_the_guide(ranks2: RankPool, tmp_path: Path, internvl_folder: Path, way: str) -> None:
    job = Job(tmp_path, internvl_folder)
    job.model["model_id"] = "internvl"
    job.data["dataloader_param"]["collate_param"]["model_name"] = "internvl"
    job.yaml = {
        "sharding_size": "auto",
        "sub_modules_to_wrap": ["model.vision_tower.encoder.layer.{*}", "model.language_model.layers.{*}"],
    }
    job.flags |= {"train-iters": 8, "global-batch-size": 4}
    if way == "plugin":
        job.flags["plugin"] = SCRIPTS / "internvl_adapter.py"
    else:
        job.script = SCRIPTS / "pretrain_internvl.py"
    outcome = train(ranks2, job)
    assert outcome.text.count("sharding InternVLChatModelGeneration") == 2
    assert len(outcome.losses) == 8 and outcome.losses[-1] < outcome.losses[0], outcome.losses
