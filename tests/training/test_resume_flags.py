"""What ``--no-save-*``, ``--no-load-*`` and ``--finetune`` leave out, by what becomes of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool
from tests.training import test_positions
from tests.training.job import Job
from tests.training.script import train
from tests.training.test_positions import numbers as numbers  # a fixture
from tests.training.test_resume import losses, tensors
from tests.training.test_saving import capture

SAVED, MORE = 4, 3


def printed(folder: str, *flags: str, steps: int) -> tuple[int, str]:
    return capture(lambda: train(folder, *flags, steps=steps))


@pytest.fixture(scope="module")
def straight(ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven steps that has saved its fourth."""
    folder = tmp_path_factory.mktemp("straight")
    ranks2.run(train, str(folder), "--save-interval", str(SAVED), steps=SAVED + MORE)
    return folder


def resume(pool: RankPool, folder: Path, source: Path, *flags: str, steps: int = SAVED + MORE) -> Path:
    folder.mkdir()
    where = ("--load", str(source), "--ckpt-step", str(SAVED))
    for code, text in pool.run(printed, str(folder), *where, *flags, steps=steps):
        assert code == 0, text
    return folder


def first_steps(folder: Path, iteration: int) -> set[int]:
    """Return which step of Adam's each weight has come to, and check that the first has started from zero moments.

    There the moments are 0.1 and 0.001 times the gradient and its square.
    """
    state = tensors(folder / f"iter_{iteration:07d}")
    steps = set()
    for key, step in state.items():
        if key.startswith("optimizer.state.") and key.endswith(".step"):
            steps.add(int(step))
            mean, square = (state[key.removesuffix("step") + name] for name in ("exp_avg", "exp_avg_sq"))
            if step == 1:
                torch.testing.assert_close(mean.square() / 0.1**2, square / 0.001, rtol=1e-3, atol=1e-12)
            else:
                assert not torch.allclose(mean.square() / 0.1**2, square / 0.001, rtol=1e-3, atol=1e-12)
    return steps


def rate(folder: Path, iteration: int) -> float:
    return float(losses(folder)[iteration][2])


def test_without_the_optimizer_moments_and_schedule_start_anew(
    straight: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    whole = resume(ranks2, tmp_path / "whole", straight, steps=SAVED + 1)
    assert first_steps(whole, SAVED + 1) == {SAVED + 1} and rate(whole, SAVED + 1) == rate(straight, SAVED + 1)

    left_out = resume(ranks2, tmp_path / "left out", straight, "--no-load-optim", steps=SAVED + 1)
    assert first_steps(left_out, SAVED + 1) == {1}
    assert rate(left_out, SAVED + 1) == rate(straight, 1) != rate(straight, SAVED + 1)
    assert losses(left_out)[SAVED + 1][0] == losses(straight)[SAVED + 1][0], "weights, data and dropout go on"


def test_an_optimizer_that_is_not_saved_has_to_be_left_out(
    straight: Path, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    ranks2.run(train, str(saved), "--no-save-optim", steps=SAVED)
    state = tensors(saved / f"iter_{SAVED:07d}")
    weights = tensors(straight / f"iter_{SAVED:07d}")
    assert state.keys() == {name for name in weights if name.startswith("model.")}
    assert not [name for name, value in state.items() if not torch.equal(value, weights[name])]

    code, text = ranks1.run(printed, str(tmp_path), "--load", str(saved), steps=SAVED + 1)[0]
    assert code == 1 and "was saved without optimizer state; pass --no-load-optim or --finetune" in text
    by_saving = resume(ranks2, tmp_path / "by saving", saved, "--no-load-optim")
    by_loading = resume(ranks2, tmp_path / "by loading", straight, "--no-load-optim")
    assert losses(by_saving) == losses(by_loading) and set(losses(by_saving)) == {5, 6, 7}


def test_without_random_states_they_start_anew(straight: Path, ranks2: RankPool, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    ranks2.run(train, str(saved), "--no-save-rng", steps=SAVED)
    for rank in range(2):
        name = f"iter_{SAVED:07d}/rank_{rank}.pt"
        with_it, without = (torch.load(folder / name, weights_only=True) for folder in (straight, saved))
        assert with_it.keys() - without.keys() == {"rng"}
    by_saving = resume(ranks2, tmp_path / "by saving", saved)
    by_loading = resume(ranks2, tmp_path / "by loading", straight, "--no-load-rng")
    after = {step: values for step, values in losses(straight).items() if step > SAVED}
    assert losses(by_saving) == losses(by_loading) != after
    assert losses(resume(ranks2, tmp_path / "whole", straight)) == after
    assert first_steps(by_loading, SAVED + MORE) == {SAVED + MORE}, "all else goes on"


def test_finetuning_starts_everything_but_the_weights_anew(straight: Path, ranks2: RankPool, tmp_path: Path) -> None:
    tuned = resume(ranks2, tmp_path / "tuned", straight, "--finetune", "--lr-warmup-iters", "0", steps=1)
    assert first_steps(tuned, 1) == {1} and rate(tuned, 1) == 0.01
    before, after = tensors(straight / f"iter_{SAVED:07d}"), tensors(tuned / "iter_0000001")
    for name in (name for name in before if name.startswith("model.")):
        # Adam's first step is the learning rate for each weight, and the decay.
        far = (after[name] - before[name]).abs().max()
        assert 0 < far <= 1.1 * 0.01, name


def test_finetuning_takes_the_data_from_the_beginning(numbers: Job, ranks1: RankPool, tmp_path: Path) -> None:
    first = test_positions.run(ranks1, numbers, save=tmp_path / "first", save_interval=3)
    load = {"load": tmp_path / "first", "ckpt_step": 3}
    assert test_positions.run(ranks1, numbers, save=tmp_path / "again", finetune=True, **load) == first
    on = test_positions.run(ranks1, numbers, save=tmp_path / "on", **load)
    assert on == {step: first[step] for step in (3, 4, 5)}
