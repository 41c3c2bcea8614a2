"""Optimizers in whole runs: resumed, exported, with fp32 weights under bf16, and repeated bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ranks import RankPool
from tests.training.job import Job, copy_with_dropout, run_here
from tests.training.script import Net, arguments, datasets, train
from tests.training.test_host_syncs import reads_per_step
from tests.training.test_resume import losses, tensors
from tests.training.test_saving import capture

EMA = ("--optimizer-selection", "fused_ema_adamw", "--ema-decay", "0.9")
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has the first Muon")


@pytest.mark.parametrize(
    "flags",
    [EMA, ("--optimizer", "sgd"), pytest.param(("--optimizer", "muon"), marks=needs_muon)],
    ids=["ema", "sgd", "muon"],
)
def test_six_steps_are_three_and_three(ranks2: RankPool, tmp_path: Path, flags: tuple[str, ...]) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir(), resumed.mkdir()
    ranks2.run(train, str(straight), *flags, steps=6)
    ranks2.run(train, str(resumed), *flags, steps=3)
    ranks2.run(train, str(resumed), *flags, "--load", str(resumed), steps=6)
    assert losses(resumed) == losses(straight)
    expected, actual = (tensors(folder / "iter_0000006") for folder in (straight, resumed))
    kind = {"fused_ema_adamw": "ema", "sgd": "momentum_buffer", "muon": "momentum_buffer"}[flags[1]]
    assert expected[f"optimizer.state.layers.1.weight.{kind}"].abs().sum() > 0
    assert expected.keys() == actual.keys()
    assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])]


def test_the_average_is_that_of_the_saved_weights(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(train, str(tmp_path), *EMA, "--save-interval", "1", steps=4)
    saved = [tensors(tmp_path / f"iter_000000{step}") for step in (1, 2, 3, 4)]
    key = "layers.0.weight"
    average = saved[0][f"optimizer.state.{key}.ema"]
    for state in saved[1:]:
        average = 0.9 * average + 0.1 * state[f"model.{key}"]
        torch.testing.assert_close(state[f"optimizer.state.{key}.ema"], average, rtol=1e-6, atol=1e-8)


def resume(folder: str, *flags: str, steps: int) -> tuple[int, str]:
    return capture(lambda: train(folder, "--load", folder, *flags, steps=steps))


def test_averages_begin_and_end_where_a_run_is_resumed_with_and_without_them(ranks2: RankPool, tmp_path: Path) -> None:
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    straight.mkdir(), changed.mkdir()
    ranks2.run(train, str(straight), steps=6)
    ranks2.run(train, str(changed), steps=2)
    ranks2.run(resume, str(changed), *EMA, "--save-interval", "1", steps=4)
    assert "holds averaged weights, which are left behind" in ranks2.run(resume, str(changed), steps=6)[0][1]
    assert losses(changed) == losses(straight), "Adam's moments go on"

    key, saved = "layers.0.weight", {i: tensors(changed / f"iter_000000{i}") for i in (2, 3, 4, 6)}
    average = saved[2][f"model.{key}"]
    for step in (3, 4):
        average = 0.9 * average + 0.1 * saved[step][f"model.{key}"]
        torch.testing.assert_close(saved[step][f"optimizer.state.{key}.ema"], average, rtol=1e-6, atol=1e-8)
    assert saved[6].keys() == saved[2].keys()


def test_a_run_is_not_resumed_by_another_rule_and_says_which_settings_stay(ranks1: RankPool, tmp_path: Path) -> None:
    ranks1.run(train, str(tmp_path), steps=1)
    ((code, text),) = ranks1.run(resume, str(tmp_path), "--optimizer", "sgd", steps=2)
    assert code == 1 and "it was saved by AdamW, and this run has SGD. Pass the --optimizer of the run" in text
    ((code, text),) = ranks1.run(resume, str(tmp_path), "--adam-beta2", "0.95", steps=2)
    assert code == 0 and text.count("betas stays (0.9, 0.999) as it was saved; (0.9, 0.95), which") == 1
    ((code, text),) = ranks1.run(resume, str(tmp_path), steps=3)
    assert code == 0 and "as it was saved" not in text


def test_averaged_weights_are_exported_and_converted(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    from mindspeed_mm.checkpoint.convert import dcp_to_hf
    from mindspeed_mm.errors import UserError

    job.flags |= {"train-iters": 2, "save": tmp_path / "ckpt", "export-hf": tmp_path / "out"}
    job.flags |= {"optimizer-selection": "fused_ema_adamw", "ema-decay": "0.5"}
    ranks2.run(run_here, job.command(), job.folder, timeout=240)
    state = tensors(tmp_path / "ckpt/iter_0000002")

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()

    trained, averaged = weights(tmp_path / "out"), weights(tmp_path / "out-ema")
    assert trained.keys() == averaged.keys()
    for name in trained:
        assert torch.equal(trained[name], state[f"model.model.{name}"]), name
        assert torch.equal(averaged[name], state[f"optimizer.state.model.{name}.ema"]), name
    assert any(not torch.equal(trained[name], averaged[name]) for name in trained)

    assets = job.model["init_from_hf_path"]
    converted = weights(dcp_to_hf(tmp_path / "ckpt", tmp_path / "converted", assets, averaged=True))
    assert not [name for name in averaged if not torch.equal(averaged[name], converted[name])]
    job.flags |= {"optimizer-selection": None, "ema-decay": None, "save": tmp_path / "plain", "export-hf": None}
    ranks2.run(run_here, job.command(), job.folder, timeout=240)
    with pytest.raises(UserError, match="no averaged weights"):
        dcp_to_hf(tmp_path / "plain", tmp_path / "converted", assets, averaged=True)


def train_built_in_bf16(folder: str, *flags: str) -> str:
    """Train a model that the callback built in bfloat16, and return what was printed."""
    import contextlib
    import io

    from mindspeed_mm.training import pretrain

    arguments(folder, *flags, steps=8)
    output = io.StringIO()

    def build() -> nn.Module:
        model = Net().to(torch.bfloat16)
        with torch.no_grad():
            model.head.weight.fill_(1.0)
        return model

    def step(iterator: Any, model: nn.Module) -> Any:
        return model(**{k: v.bfloat16() if k == "x" else v for k, v in next(iterator).items()}), lambda loss: loss

    with contextlib.redirect_stdout(output):
        pretrain(datasets, build, None, step)
    return output.getvalue()


def test_a_model_built_in_bf16_is_updated_in_fp32(ranks2: RankPool, tmp_path: Path) -> None:
    flags = ("--lr", "1e-5", "--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--weight-decay", "0")
    moved = {}
    for name, extra in (("masters", ["--bf16"]), ("pure", [])):
        (tmp_path / name).mkdir()
        printed = ranks2.run(train_built_in_bf16, str(tmp_path / name), *flags, *extra)[0]
        assert "were built in bfloat16" in printed
        assert ("kept and updated in fp32" in printed) == (name == "masters")
        state = tensors(tmp_path / name / "iter_0000008")
        kinds = {t.dtype for key, t in state.items() if not key.endswith(".step")}
        assert kinds == {torch.float32 if name == "masters" else torch.bfloat16}
        moved[name] = (state["model.head.weight"].float() - 1).abs()
    # Steps of 1e-5 around 1, where bfloat16 has nothing between 1 and 0.996.
    assert moved["pure"].max() == 0
    assert 2e-5 < moved["masters"].mean() < 1e-4


def repeat(command: list[str], folder: Path) -> str:
    """Run with deterministic algorithms and switch them off again for the tests that follow."""
    try:
        return run_here(command, folder).text
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_are_equal_bit_for_bit(job: Job, hf_folder: Path, ranks2: RankPool, tmp_path: Path) -> None:
    """Dropout in attention, random weights, a shuffled order, workers and evaluation."""
    folder = copy_with_dropout(hf_folder, tmp_path / "hf")
    job.model |= {"init_from_hf_path": str(folder), "random_init": True}
    job.data["dataloader_param"]["shuffle"] = True
    job.data["dataset_param"]["basic_parameters"]["val_rate"] = 0.25
    job.flags |= {"use-deter-comp": True, "eval-iters": 1, "eval-interval": 2}
    for name, seed, steps, workers in (("one", 5, 4, 1), ("two", 5, 4, 1), ("other", 6, 1, 0)):
        job.flags |= {"save": tmp_path / name, "seed": seed, "train-iters": steps, "num-workers": workers}
        text = ranks2.run(repeat, job.command(), job.folder, timeout=240)[0]
        assert "--use-deter-comp: matrix products depend on the number of threads" in text
    one, two = (tensors(tmp_path / name / "iter_0000004") for name in ("one", "two"))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert not [key for key, value in one.items() if not torch.equal(value, two[key])]
    assert losses(tmp_path / "one")[1] != losses(tmp_path / "other")[1]


def test_the_manifest_says_what_a_run_was_made_of(ranks2: RankPool, tmp_path: Path) -> None:
    flags = ("--lr-scale-modules", "head=0.5", "--weight-decay", "0.2")
    ranks2.run(train, str(tmp_path), *flags, steps=2)
    ranks2.run(train, str(tmp_path), *flags, "--load", str(tmp_path), steps=3)
    first, second = json.loads((tmp_path / "run_manifest.json").read_text())["starts"]
    assert (first["start_iteration"], second["start_iteration"]) == (0, 2)
    assert first["arguments"]["train_iters"] == 2
    assert first["arguments"]["weight_decay"] == 0.2
    assert first["configs"]["fsdp2"]["sub_modules_to_wrap"] == ["layers.{*}"]
    assert first["versions"]["torch"] == torch.__version__.split("+")[0] or first["versions"]["torch"]
    assert first["versions"]["python"] == sys.version.split()[0]
    assert (first["world_size"], first["backend"], first["device"]["type"]) == (2, "gloo", "cpu")
    groups = {tuple(group["names"]): group for group in first["parameter_groups"]}
    assert {names: (g["lr"], g["weight_decay"], g["tensors"], g["parameters"]) for names, g in groups.items()} == {
        ("layers.0.weight", "layers.1.weight"): (0.01, 0.2, 2, 55),
        ("layers.0.bias", "layers.1.bias"): (0.01, 0.0, 2, 10),
        ("head.weight",): (0.005, 0.2, 1, 15),
        ("head.bias",): (0.005, 0.0, 1, 3),
    }


def test_what_is_no_manifest_is_not_overwritten(tmp_path: Path) -> None:
    from mindspeed_mm.errors import UserError
    from mindspeed_mm.training.manifest import write_manifest

    write_manifest(tmp_path, {"start_iteration": 0})
    (tmp_path / "run_manifest.json").write_text("[1]")
    with pytest.raises(UserError, match=r"run_manifest\.json: not a manifest"):
        write_manifest(tmp_path, {"start_iteration": 1})


@pytest.mark.parametrize("flags", [EMA, pytest.param(("--optimizer", "muon"), marks=needs_muon)], ids=["ema", "muon"])
def test_an_optimizer_step_does_not_wait_for_the_device(
    ranks2: RankPool, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    for counts in ranks2.run(reads_per_step, str(tmp_path), *flags):
        assert counts[:3] + counts[4:] == [0] * 5  # the fourth step logs
