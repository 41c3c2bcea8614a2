"""Whole runs: which samples each step takes, wherever it was resumed from, and ranks with different amounts of data."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import UserError
from mindspeed_mm.training.checkpointing import one_position
from tests.data.tiny import write_jsonl
from tests.ranks import RankPool
from tests.training.job import SCRIPTS, Job, launch, run_here
from tests.training.test_resume import losses, tensors
from tests.training.test_transformers_road import run as train

STEPS, GLOBAL = 6, 8


@pytest.fixture
def numbers(job: Job) -> Job:
    """A job of six steps of eight numbers out of 22: more than two epochs, which end within a step."""
    job.script = SCRIPTS / "pretrain_numbers.py"
    job.yaml = {"sub_modules_to_wrap": ["layer"]}
    job.flags |= {"mm-data": None, "mm-model": None, "global-batch-size": GLOBAL, "train-iters": STEPS}
    return job


def taken(folder: Path, ranks: int) -> dict[int, list[int]]:
    """Return the numbers of each step, in the order of the micro batches, those of the first rank first."""
    steps: dict[int, list[list[list[int]]]] = {}
    for rank in range(ranks):
        rows = [json.loads(line) for line in (folder / f"taken_{ranks}_{rank}.jsonl").read_text().splitlines()]
        for step in {step for step, _ in rows}:
            steps.setdefault(step, []).append([batch for found, batch in rows if found == step])
    return {step: [n for micro in zip(*parts, strict=True) for part in micro for n in part]
            for step, parts in steps.items()}  # fmt: skip


def run(pool: RankPool, job: Job, **flags: object) -> dict[int, list[int]]:
    """Run the job and return what it took."""
    before = dict(job.flags)
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    Path(str(job.flags["save"])).mkdir(exist_ok=True)
    codes = [outcome.code for outcome in pool.run(run_here, job.command(), job.folder)]
    assert codes == [0] * pool.world_size
    job.flags = before
    return taken(Path(str(flags["save"])), pool.world_size)


def resume_from_every_save(job: Job, first: RankPool, pools: list[RankPool], tmp_path: Path) -> None:
    straight = run(first, job, save=tmp_path / "straight", save_interval=1)
    order = [n for step in range(STEPS) for n in straight[step]]
    assert all(sorted(order[start : start + 22]) == list(range(22)) for start in (0, 22))
    for pool in pools:
        for step in range(1, STEPS):
            folder = tmp_path / f"{pool.world_size}_from{step}"
            rest = run(pool, job, save=folder, load=tmp_path / "straight", ckpt_step=step)
            assert rest == {later: straight[later] for later in range(step, STEPS)}, (pool.world_size, step)


def test_a_two_epoch_run_of_two_ranks_is_resumed_from_each_save_on_one(
    numbers: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    numbers.flags["num-workers"] = 0
    resume_from_every_save(numbers, ranks2, [ranks1], tmp_path)


@pytest.mark.slow
def test_a_two_epoch_run_of_two_ranks_is_resumed_from_each_save_on_two_and_four(
    numbers: Job, ranks2: RankPool, ranks4: RankPool, tmp_path: Path
) -> None:
    numbers.flags["num-workers"] = 2
    resume_from_every_save(numbers, ranks2, [ranks2, ranks4], tmp_path)


@pytest.mark.slow
def test_four_ranks_with_different_numbers_of_batches_train_and_evaluate_to_the_end(
    numbers: Job, tmp_path: Path
) -> None:
    """Each rank starts over when its own loader ends; an evaluation counts every sample of every rank once."""
    numbers.flags |= {"save": tmp_path / "save", "global-batch-size": 4, "eval-iters": -1, "eval-interval": 3}
    (tmp_path / "save").mkdir()
    outcome = launch(numbers, nproc=4, env={"NUMBERS_UNEVEN": "starts over"})
    assert outcome.code == 0, outcome.text
    assert taken(tmp_path / "save", 4) == {
        step: [10 * rank + step % (2 + rank) for rank in range(4)] for step in range(STEPS)
    }
    everything = [10 * rank + n for rank in range(4) for n in range(2 + rank)]
    means = [float(value) for value in re.findall(r"validation loss at .*\| loss value: (\S+) \|", outcome.text)]
    assert means and means == pytest.approx([sum(everything) / len(everything)] * len(means), rel=1e-6)


@pytest.mark.slow
def test_four_ranks_whose_iterators_end_at_different_steps_end_with_the_reason(numbers: Job, tmp_path: Path) -> None:
    numbers.flags |= {"save": tmp_path / "save", "global-batch-size": 4}
    (tmp_path / "save").mkdir()
    start = time.monotonic()
    outcome = launch(numbers, nproc=4, env={"NUMBERS_UNEVEN": "ends"})
    assert re.search(r"The training iterator ended after 2 batches, before the run did", outcome.error())
    assert time.monotonic() - start < 90


def from_data_json(job: Job, kind: str) -> None:
    """Let the job stream its rows, mix two parts of them, or pack what it streams from two files."""
    basic = job.data["dataset_param"]["basic_parameters"]
    if kind == "streamed":
        basic["streaming"] = True
    elif kind == "packed streams":
        files = [write_jsonl(job.folder / f"part{n}.jsonl", job.rows[n::2]) for n in range(2)]
        basic["mixture"] = [{"dataset": str(file), "weight": 1 + n} for n, file in enumerate(files)]
        basic |= {"dataset": None, "streaming": True, "packing": True}
        job.flags["seq-length"] = 150
    else:
        source = {"dataset": basic.pop("dataset"), "dataset_dir": str(job.folder), "max_samples": 5, "weight": 1}
        basic["mixture"] = [source, {**source, "max_samples": 3, "weight": 2}]
    job.data["dataloader_param"] |= {"shuffle": True, "drop_last": False}
    job.flags |= {"num-workers": 1, "train-iters": 8, "lr-decay-iters": 8}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streamed", "mixed", "packed streams"])
def test_a_run_from_data_json_is_resumed_bit_for_bit(kind: str, job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    from_data_json(job, kind)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for flags in (
        {"save": straight, "save-interval": 5},  # the epoch has eight samples: it ends in the middle of a step
        {"save": resumed, "load": straight, "ckpt-step": 5},
    ):
        before = dict(job.flags)
        job.flags |= {"global-batch-size": 6, **flags}
        outcomes = ranks2.run(run_here, job.command(), job.folder, timeout=240)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].text
        job.flags = before
    expected, actual = (tensors(folder / "iter_0000008") for folder in (straight, resumed))
    assert {step: losses(straight)[step] for step in (6, 7, 8)} == losses(resumed)
    assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["streamed", "mixed", "packed streams"])
def test_a_run_from_data_json_goes_on_at_another_world_size(
    kind: str, job: Job, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    for number, row in enumerate(job.rows):  # so that another sample is another loss
        row["messages"][1]["content"] += " Surely." * number
    from_data_json(job, kind)
    job.flags |= {"calculate-per-token-loss": True, "global-batch-size": 6, "train-iters": 5, "lr-decay-iters": 5}
    train(ranks2, job, save=tmp_path / "straight")
    expected = losses(tmp_path / "straight")
    for first, second in ((ranks2, ranks1), (ranks1, ranks2)):
        folder = tmp_path / f"from{first.world_size}"
        train(first, job, save=folder, train_iters=3)
        train(second, job, save=folder, load=folder)
        assert list(losses(folder)) == list(expected) == [1, 2, 3, 4, 5]
        for step, values in expected.items():
            assert losses(folder)[step] == pytest.approx(values, rel=1e-5), (first.world_size, step)


def test_ranks_that_have_come_apart_are_named_when_a_run_is_saved() -> None:
    here, there = {"epoch": 0, "window": 3, "unit": 8}, {"epoch": 0, "window": 3, "unit": 9}
    assert one_position([{"train": here}, {}, {"train": dict(here)}]) == {"train": here}
    with pytest.raises(UserError, match=r"apart in the train data: rank 2 is at .*'unit': 9.*, rank 1 at .*'unit': 8"):
        one_position([{}, {"train": here}, {"train": there}])
