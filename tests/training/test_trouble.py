"""What happens to a real job when something happens to one of its ranks."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.training.job import ROOT, Outcome, torchrun

pytestmark = pytest.mark.ranks
SCRIPT = str(ROOT / "tests" / "training" / "trouble.py")
SHORT = ("--distributed-timeout-minutes", "0.1", "--preparation-timeout-minutes", "1")


def launch(folder: Path, trouble: str, *flags: str, steps: int = 6, restarts: int = 0) -> Outcome:
    """Run two ranks; ``trouble`` as in trouble.py."""
    options = ("--standalone", "--max-restarts", str(restarts))
    return torchrun([SCRIPT, str(folder), str(steps), trouble, *flags], folder, *options, timeout=300)


def seconds_after(outcome: Outcome, folder: Path) -> float:
    return outcome.ended - float((folder / "happened").read_text())


def newest(folder: Path) -> int:
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def test_a_rank_that_hangs_is_named_and_the_restarted_job_goes_on(tmp_path: Path) -> None:
    outcome = launch(tmp_path, "sleep:forward:1:4", *SHORT, "--save-interval", "2", restarts=1)
    assert outcome.code == 0, outcome.text
    assert re.search(r"^error \(rank \d\): no progress for", outcome.text, re.MULTILINE), outcome.text
    assert re.search(r"rank 1 \(\S+ pid \d+\) hangs in forward of iteration 4, for", outcome.text), outcome.text
    assert "trouble.py:" in outcome.text and "in happens" in outcome.text
    assert "loading checkpoint from" in outcome.text and newest(tmp_path) == 6
    first, again = outcome.losses[:3], outcome.losses[3:]
    assert len(again) == 4 and again[0] == first[2], "step 3 is made again from the same state"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        ("stop:forward:1:3", r"rank 1 .* does not answer: .*known to be in forward of iteration 3"),
        ("block:forward:0:3", r"rank 0 .* does not answer: .*known to be in forward of iteration 3"),
        ("sleep:worker:1:3", r"rank 1 .* hangs in data of iteration \d"),
        ("sleep:data:0:4", r"rank 0 .* hangs in data of iteration 4"),
    ],
)
def test_who_hangs_is_named(trouble: str, named: str, tmp_path: Path) -> None:
    outcome = launch(tmp_path, trouble, *SHORT)
    assert outcome.code != 0 and re.search(named, outcome.text), outcome.text
    assert len(re.findall(r"^error", outcome.text, re.MULTILINE)) == 1, outcome.text
    assert seconds_after(outcome, tmp_path) < 100


@pytest.mark.slow
def test_a_save_that_hangs_has_more_time(tmp_path: Path) -> None:
    flags = ("--distributed-timeout-minutes", "0.1", "--preparation-timeout-minutes", "0.4", "--save-interval", "2")
    outcome = launch(tmp_path, "sleep:save:1:2", *flags)
    assert re.search(r"rank 1 .* hangs in save of iteration 2, for", outcome.text), outcome.text
    assert 24 < seconds_after(outcome, tmp_path) < 90


@pytest.mark.slow
@pytest.mark.parametrize("where", ["setup", "preparation", "forward", "worker", "save"])
def test_a_rank_that_raises_ends_all(where: str, tmp_path: Path) -> None:
    outcome = launch(tmp_path, f"raise:{where}:1:3", "--save-interval", "3")
    assert "KeyError: 'trouble'" in outcome.error() and "(rank 1)" in outcome.error()
    assert seconds_after(outcome, tmp_path) < 30


@pytest.mark.slow
@pytest.mark.parametrize(("where", "saved"), [("setup", 0), ("preparation", 0), ("forward", 3), ("save", 3)])
def test_a_signal_to_the_launcher(where: str, saved: int, tmp_path: Path) -> None:
    outcome = launch(tmp_path, f"term:{where}:0:3", "--save-interval", "3", steps=200)
    assert "error (rank" not in outcome.text and "Traceback" not in outcome.text.split("SignalException")[0][:-4000]
    assert newest(tmp_path) == saved and not list(tmp_path.glob("*staging*")), outcome.text
    assert seconds_after(outcome, tmp_path) < 30


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_goes_on(tmp_path: Path) -> None:
    outcome = launch(tmp_path, "usr1:forward:1:3")
    assert outcome.code == 0 and len(outcome.losses) == 6, outcome.text
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003", "iter_0000006"]


@pytest.mark.slow
def test_an_early_save_signal_does_not_kill(tmp_path: Path) -> None:
    outcome = launch(tmp_path, "usr1:preparation:0", steps=2)
    assert outcome.code == 0 and (tmp_path / "iter_0000001").is_dir(), outcome.text


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_restarted_job_goes_on(tmp_path: Path) -> None:
    start = time.time()
    outcome = launch(tmp_path, "kill:forward:1:5", "--save-interval", "2", restarts=1)
    assert outcome.code == 0 and newest(tmp_path) == 6, outcome.text
    assert re.search(
        r"lost contact with rank 1 \(\S+ pid \d+\), last seen in forward of iteration 5, which was killed", outcome.text
    ), outcome.text
    assert outcome.ended - start < 200
