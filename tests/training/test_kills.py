"""Whenever a run is killed, it goes on from a whole checkpoint and ends where it would have ended."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint.integrity import inspect
from mindspeed_mm.checkpoint.publish import TRACKER, checkpoints_in
from tests.ranks import RankPool
from tests.training.mortal import PHASES, kill_at_random, run_until_killed
from tests.training.script import train
from tests.training.test_saving import digests

STEPS = 5
FLAGS = ("--save-interval", "1", "--keep-last", "1", "--auto-resume")
# How often a run comes to the phase before it is struck: in its third save, with two checkpoints behind it.
ROUND = {"before staging": 3, "mid-shard": 2 * 24 + 10, "before rename": 3, "before tracker": 3, "during retention": 2}


@pytest.fixture(scope="module")
def uninterrupted(ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> object:
    """The digests of a run's last checkpoint."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    ranks2.run(train, str(folder), *FLAGS, steps=STEPS)
    return digests(folder)[f"iter_{STEPS:07d}"]


@pytest.mark.parametrize(
    ("how", "victim"),
    [
        ("sync", 1),
        ("async", 0),
        pytest.param("sync", 0, marks=pytest.mark.slow),
        pytest.param("async", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_save_costs_nothing(
    phase: str, how: str, victim: int, ranks2: RankPool, uninterrupted: object, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--async-save") if how == "async" else FLAGS
    codes = run_until_killed(tmp_path, phase, victim, ROUND[phase], *flags, steps=STEPS)
    assert codes[victim] == -signal.SIGKILL, codes
    reached = int((tmp_path / TRACKER).read_text())
    assert 0 < reached < STEPS, "it was killed in the middle"
    assert inspect(tmp_path / f"iter_{reached:07d}").good

    ranks2.run(train, str(tmp_path), *flags, steps=STEPS)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {f"iter_{STEPS:07d}"}
    assert all(inspect(path).good for path in checkpoints_in(tmp_path))
    assert digests(tmp_path)[f"iter_{STEPS:07d}"] == uninterrupted


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_random_kills(kills: int, ranks2: RankPool, tmp_path: Path) -> None:
    disturbed, straight = tmp_path / "disturbed", tmp_path / "straight"
    disturbed.mkdir(), straight.mkdir()
    rng, ways = random.Random(kills), ((), ("--async-save",))
    for kill in range(kills):
        codes = kill_at_random(disturbed, rng, *FLAGS, *ways[kill % 2], steps=100_000)
        assert -signal.SIGKILL in codes
        assert inspect(disturbed / f"iter_{int((disturbed / TRACKER).read_text()):07d}").good, f"kill {kill}"
    steps = int((disturbed / TRACKER).read_text()) + 3
    ranks2.run(train, str(disturbed), *FLAGS, steps=steps)
    ranks2.run(train, str(straight), steps=steps)
    assert digests(disturbed)[f"iter_{steps:07d}"] == digests(straight)[f"iter_{steps:07d}"]
