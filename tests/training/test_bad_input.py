"""A user's mistake ends the job on all ranks: one message, last in the log, and nothing already saved is touched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankPool
from tests.training.job import SCRIPT, Job, Outcome, fingerprint, launch, run_here


def _turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def _without_weights(job: Job) -> None:
    folder = shutil.copytree(job.model["init_from_hf_path"], job.folder / "hf")
    (folder / "model.safetensors").unlink()
    job.model["init_from_hf_path"] = str(folder)


def _use_callback(job: Job, text: str) -> None:
    """Replace callbacks of the repository's script by those in ``text``."""
    main = "from mindspeed_mm.training import get_args, pretrain\nfrom pretrain_transformers import *\n"
    call = "pretrain({}, {}, None, forward_step, extra_args_provider=mm_extra_args_provider)\n"
    job.use_script(f"import torch\n{main}{text}\n{call.format('train_valid_test_datasets_provider', 'model_provider')}")


def _loss(expression: str) -> Callable[[Job], None]:
    forward = "def forward_step(it, model):\n    return model(**next(it)), lambda output: "
    return lambda job: _use_callback(job, forward + expression)


def _provider(expression: str) -> Callable[[Job], None]:
    return lambda job: _use_callback(job, f"def train_valid_test_datasets_provider():\n    return {expression}")


def _batch(**changes: str) -> Callable[[Job], None]:
    """Let the loader of a user's own give one batch, over and over."""
    batch = {"input_ids": "torch.arange(16).view(2, 8)", "labels": "torch.arange(16).view(2, 8)", **changes}
    return _provider(f"[dict({', '.join(f'{key}={value}' for key, value in batch.items())})], None, None")


def _small_vocabulary(job: Job) -> None:
    folder = shutil.copytree(job.model["init_from_hf_path"], job.folder / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 50
    (folder / "config.json").write_text(json.dumps(config))
    job.model.update(init_from_hf_path=str(folder), random_init=True)


def _freeze_everything(job: Job) -> None:
    frozen = {"freeze": True}
    job.model |= {"image_encoder": {"vision_encoder": frozen, "vision_projector": frozen}, "text_decoder": frozen}


def _set(section: str, **values: Any) -> Callable[[Job], None]:
    return lambda job: getattr(job, section).update(values)


def _rows(value: Any) -> Callable[[Job], None]:
    return lambda job: setattr(job, "rows", value)


def _row(content: str, *images: str) -> dict[str, Any]:
    return {
        "images": list(images),
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}],
    }


BROKEN_PIXELS = """
def forward_step(it, model):
    batch = next(it)
    batch["pixel_values"][0] = float("inf")
    return model(**batch), loss_func
"""

# What is wrong, how it is brought about, and what the message must say: the place, the value and the fix.
CASES: dict[str, tuple[Callable[[Job], Any], str]] = {
    "no data file": (_rows(None), r"train\.jsonl: no such data file; check basic_parameters\.dataset"),
    "an empty data file": (_rows(""), r"train\.jsonl: the data file is empty"),
    "a broken line": (
        _rows('{"messages": []\n{oops}\n'),
        r"train\.jsonl:1: broken JSON: .*; each line must",
    ),
    "a missing image": (
        _rows([_row("<image>", "images/none.png")]),
        r"train\.jsonl:1: image 'images/none\.png' not found in .*; check the path",
    ),
    "a truncated image": (
        lambda job: _truncate(job.folder / "images" / "1.png"),
        r"train\.jsonl:2: image \S+/images/1\.png cannot be decoded: .*; replace the file",
    ),
    "an image outside of the data folder": (
        _rows([_row("<image>", "../a.png")]),
        r"train\.jsonl:1: image '\.\./a\.png' is outside the data folder .*; move it inside",
    ),
    "more placeholders than images": (
        _rows([_row("<image><image>", "images/0.png")]),
        r"train\.jsonl:1: .*2 <image> placeholder\(s\) .* but 1 file\(s\)",
    ),
    "the wrong order of roles": (
        _rows([_turns("user", "user")]),
        r"train\.jsonl:1: message 2 is from 'user', expected 'assistant'",
    ),
    "an unknown key in model.json": (
        _set("model", int_from_hf_path="x"),
        r"model\.json: int_from_hf_path: unknown key.* Did you mean 'init_from_hf_path'\?",
    ),
    "an unknown key in data.json": (
        lambda job: job.data["dataloader_param"].update(shufle=True),
        r"data\.json: dataloader_param\.shufle: unknown key.* Did you mean 'shuffle'\?",
    ),
    "an unknown key in the yaml": (
        _set("yaml", shard_size=2),
        r"fsdp2_config\.yaml: shard_size: unknown key.* Did you mean 'sharding_size'\?",
    ),
    "no config file": (
        _set("flags", **{"mm-model": "modle.json"}),
        r"modle\.json: no such file\. Did you mean 'model\.json'\?",
    ),
    "an HF folder without weights": (
        _without_weights,
        r"init_from_hf_path: '\S+/hf' has no weights .* Set random_init",
    ),
    "an HF folder without weights, built on meta": (
        lambda job: (_without_weights(job), job.flags.update({"init-model-with-meta-device": True})),
        r"/hf has no weights: neither model\.safetensors nor .*; download them",
    ),
    "a sharding_size that does not divide": (
        _set("yaml", sharding_size=3),
        r"sharding_size: 3 does not divide the \d data-parallel ranks; use auto",
    ),
    "a module path that matches nothing": (
        _set("yaml", sub_modules_to_wrap=["model.language_model.layer.{*}"]),
        r"model\.language_model\.layer\.\{\*\}.*model\.language_model\.layers",
    ),
    "a freeze pattern that matches nothing": (
        _set("model", freeze=["model.visual", "model.language_model.layer.{0}"]),
        r"model\.json: freeze: 'model\.language_model\.layer\.\{0\}' matches no module .*model\.language_model\.layers",
    ),
    "freezing everything": (
        _set("model", freeze=["model", "lm_head.weight"]),
        r"model\.json: every parameter is frozen, nothing is left to train\. Shorten the list 'freeze'",
    ),
    "a global batch that does not divide": (
        _set("flags", **{"micro-batch-size": 2, "global-batch-size": 7}),
        r"--global-batch-size 7 is not a multiple of --micro-batch-size 2 x \d data-parallel ranks = \d; use ",
    ),
    "--load of a folder that does not exist": (
        _set("flags", load="nowhere"),
        r"--load nowhere: no such folder\. Give the --save folder",
    ),
    "--load of a folder without a checkpoint": (
        _set("flags", load="images"),
        r"--load images: no checkpoint: there is no latest_checkpointed_iteration\.txt\. It holds .* or leave --load",
    ),
    "--load without a checkpoint, built on meta": (
        _set("flags", load="images", **{"init-model-with-meta-device": True}),
        r"--load images: no checkpoint",
    ),
    "an unknown flag": (
        _set("flags", **{"trian-iters": 3}),
        r"unknown flag --trian-iters; .* Did you mean '--train-iters'\?",
    ),
    "a flag with a wrong value": (_set("flags", lr="fast"), r"--lr: 'fast' is not a number; give a number"),
    "a loss that is a list": (_loss("[output['loss']]"), r"loss_func returned a list of length 1\. It must return"),
    "a loss that is a float": (_loss("float(output['loss'])"), r"loss_func returned a float\. It must return"),
    "a loss of many numbers": (
        _loss("output['loss'].repeat(3)"),
        r"loss_func returned a tensor of shape \(3,\) as the loss: it must be one number",
    ),
    "a loss without a gradient": (
        _loss("output['loss'].detach()"),
        r"loss_func returned a loss without a gradient: .*not detached",
    ),
    "a report that is no dict": (_loss("(output['loss'], 1)"), r"loss_func returned a int as the report"),
    "a forward_step without loss_func": (
        lambda job: _use_callback(job, "def forward_step(it, model):\n    return model(**next(it))"),
        r"forward_step returned a dict: it must return '\(output, loss_func\)'",
    ),
    "a provider of two loaders": (
        _provider("None, None"),
        r"train_valid_test_datasets_provider returned 2 values: it must return the train, validation and test",
    ),
    "a provider of something else": (_provider("3, None, None"), r"returned a int for train: it must be a DataLoader"),
    "an iterator that ends too early": (
        _provider("iter([]), None, None"),
        r"training iterator ended after 0 batches, before the run did",
    ),
    "a provider of no model": (
        lambda job: _use_callback(job, "def model_provider():\n    pass"),
        r"model_provider returned a NoneType: it must return a torch\.nn\.Module",
    ),
    "a token that the model does not have": (
        _small_vocabulary,
        r"train\.jsonl:1: input_ids has \d+ at position \d+, the model's vocabulary has 50 tokens\. Use the tokenizer",
    ),
    "an input id outside of the vocabulary": (
        _batch(input_ids="torch.tensor([[1] * 8, [1, 1, -1] + [1] * 5])"),
        r"row 1 of the batch: input_ids has -1 at position 2, the model's vocabulary has \d+ tokens",
    ),
    "a label outside of the vocabulary": (
        _batch(labels="torch.tensor([[-100] * 8, [-100, 99999] + [1] * 6])"),
        r"row 1 of the batch: labels has 99999 at position 1, .*; -100 marks what is no target",
    ),
    "a global batch without a target": (
        _batch(labels="torch.full((2, 8), -100)"),
        r"iteration 1: no sample of the global batch has a target: every label is -100, .*samples 0 to 1\)",
    ),
    "pixels that are not finite": (
        lambda job: _use_callback(job, BROKEN_PIXELS),
        r"iteration 1: not finite: loss: nan \| grad norm: nan\n  rank \d, micro-batch 1 of \d: loss nan, samples \S*"
        r"train\.jsonl:\d\n    the batch itself is not finite: pixel_values\n  .*not finite: model\.model\.visual\."
        r"patch_embed\.proj \(Conv3d; its input is not finite already\)",
    ),
    "no learning rate": (_set("flags", lr=None), r"--lr is missing; give the highest learning rate"),
    "two lengths of the warm-up": (
        _set("flags", **{"lr-warmup-iters": 1, "lr-warmup-fraction": 0.1}),
        r"--lr-warmup-fraction 0\.1 and --lr-warmup-iters 1 both set the length of the warm-up; remove one",
    ),
    "a warm-up longer than the run": (
        _set("flags", **{"lr-warmup-iters": 9}),
        r"--lr-warmup-iters 9 leaves no step of the 4 of --lr-decay-iters or --train-iters; shorten the warm-up",
    ),
    "a frozen model": (_freeze_everything, r"every parameter is frozen, nothing is left to train"),
    "rollback without checkpoints": (
        _set("flags", save=None, **{"nan-policy": "rollback"}),
        r"--nan-policy rollback goes back to a checkpoint of --save; add --save, or use --nan-policy skip",
    ),
    "rollback with data that cannot go back": (
        lambda job: (_provider("iter([{}] * 9), None, None")(job), job.flags.update({"nan-policy": "rollback"})),
        r"--nan-policy rollback: the training data is a list_iterator without a position, which cannot go back; return",
    ),
    "an export to where no folder can be": (
        _set("flags", **{"export-hf": "data.json/hf"}),
        r"/data\.json/hf cannot be written: .*; export to another folder",
    ),
    "an export over the original weights": (
        lambda job: job.flags.update({"export-hf": job.model["init_from_hf_path"]}),
        r"is also the folder of the original weights; export to another one",
    ),
    "a plugin that does not exist": (
        _set("flags", plugin="adapter.py"),
        r"--plugin: there is no file '\S+adapter\.py'",
    ),
}


def bring_about(job: Job, name: str) -> str:
    """Set the case up, next to a folder of checkpoints, and return what the message must say."""
    checkpoint = job.folder / "ckpt" / "iter_0000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").write_bytes(b"tensors")
    (job.folder / "ckpt" / "latest_checkpointed_iteration.txt").write_text("2")
    job.flags["save"] = "ckpt"
    change, expected = CASES[name]
    change(job)
    return expected


def check(outcome: Outcome, expected: str) -> None:
    message = outcome.error()
    assert re.search(expected, message), f"{expected!r} is not in:\n{message}"
    assert "Traceback" not in message and len(message) < 1200, message


@pytest.mark.parametrize("name", CASES)
def test_message(name: str, ranks1: RankPool, job: Job) -> None:
    expected = bring_about(job, name)
    saved = fingerprint(job.folder / "ckpt")
    (outcome,) = ranks1.run(run_here, job.command(), job.folder)
    check(outcome, expected)
    after = fingerprint(job.folder / "ckpt")
    assert {path: after.get(path) for path in saved} == saved


# One mistake for each moment: the command line, the config files, the data, the model, sharding, weights, a step.
ON_ALL_RANKS = ("--load of a folder without a checkpoint",)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ON_ALL_RANKS else pytest.mark.slow) for n in CASES])
def test_two_ranks_end_together(name: str, job: Job) -> None:
    expected = bring_about(job, name)
    saved = fingerprint(job.folder / "ckpt")
    check(launch(job), expected)
    after = fingerprint(job.folder / "ckpt")
    assert {path: after.get(path) for path in saved} == saved


@pytest.mark.ranks
def test_a_mistake_that_one_rank_finds_in_a_worker(job: Job) -> None:
    _truncate(job.folder / "images" / "3.png")  # the second row that rank 1 reads
    job.flags |= {"num-workers": 1, "save": "ckpt"}
    outcome = launch(job)
    check(outcome, r"^error \(rank 1\): \S*train\.jsonl:4: image \S+/3\.png cannot be decoded: .*; replace the file$")
    assert len(outcome.losses) == 1 and not list(job.folder.glob("ckpt/iter*"))


@pytest.mark.ranks
def test_a_rank_that_is_killed(job: Job) -> None:
    _use_callback(
        job,
        """
import os, signal, time
from mindspeed_mm.training import get_args
def forward_step(it, model):
    if get_args().iteration == 2 and os.environ["RANK"] == "1":
        print(f"killed at {time.time()}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return model(**next(it)), loss_func
""",
    )
    job.flags["num-workers"] = 1
    outcome = launch(job)
    check(
        outcome,
        r"^error \(rank 0\): lost contact with rank 1 \(\S+ pid \d+\), last seen in forward of iteration 3, which was",
    )
    assert len(outcome.losses) == 2 and "exitcode  : -9" in outcome.text
    killed = re.search(r"killed at (\S+)", outcome.text)
    assert killed and outcome.ended - float(killed[1]) < 30


SAVE_FAILS = """
import os
from mindspeed_mm.checkpoint import store
write = store.write_flushed
def full_disk(path, content):
    if get_args().iteration == 3 and os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device", str(path))
    write(path, content)
store.write_flushed = full_disk
"""


@pytest.mark.slow
@pytest.mark.ranks
def test_a_rank_that_cannot_save(ranks2: RankPool, job: Job) -> None:
    _use_callback(job, SAVE_FAILS)
    job.flags |= {"save": "ckpt", "save-interval": 2, "exit-interval": 3}
    outcome = launch(job)
    check(outcome, r"saving ckpt/iter_0000003 failed on rank 1: .*No space left on device")
    assert (job.folder / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert [path.name for path in job.folder.glob("ckpt/iter*")] == ["iter_0000002"]
    job.script = SCRIPT
    job.flags |= {"load": "ckpt", "save": None, "exit-interval": None}
    resumed = ranks2.run(run_here, job.command(), job.folder)[1]
    assert resumed.code == 0 and len(resumed.losses) == 2, resumed.text


@pytest.mark.slow
@pytest.mark.ranks
def test_a_mistake_of_one_rank_while_the_model_is_built(job: Job) -> None:
    _use_callback(
        job,
        """
import os
from mindspeed_mm.errors import UserError
build = model_provider
def model_provider():
    if os.environ["RANK"] == "1":
        raise UserError("model.json: only rank 1 sees this")
    return build()
""",
    )
    check(launch(job), r"^error \(rank 1\): model\.json: only rank 1 sees this$")


@pytest.mark.slow
@pytest.mark.ranks
def test_a_bug_is_shown_once_with_its_traceback(job: Job) -> None:
    _use_callback(job, "def model_provider():\n    return {}['weights']")
    outcome = launch(job)
    message = outcome.error()
    assert message.count("Traceback") == 1 and message.endswith("KeyError: 'weights'")
    assert "pretrain_custom.py" in message and "in model_provider" in message


@pytest.mark.slow
@pytest.mark.ranks
def test_an_interrupt_before_training(job: Job) -> None:
    _use_callback(job, "def model_provider():\n    raise KeyboardInterrupt")
    check(launch(job), r"^error \(rank \d\): interrupted by Ctrl-C; checkpoints already saved are complete\.$")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_saves_and_ends(job: Job, number: str) -> None:
    _use_callback(
        job,
        f"""
import os, signal
def forward_step(it, model):
    if get_args().iteration == 2 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.{number})
    return model(**next(it)), loss_func
""",
    )
    job.flags |= {"num-workers": 2, "save": "ckpt", "train-iters": 200}
    outcome = launch(job)
    assert f"exiting program after receiving {number}" in outcome.text, outcome.text
    assert not re.search(r"^error", outcome.text, re.MULTILINE), outcome.text
    assert int((job.folder / "ckpt" / "latest_checkpointed_iteration.txt").read_text()) == len(outcome.losses) < 200
