"""A job on two hosts: it trains, the cable is cut, a host dies and comes back."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindspeed_mm.checkpoint.manifest import read
from tests.training.hosts import Hosts, why_not
from tests.training.job import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ranks]
TROUBLE = str(ROOT / "tests" / "training" / "trouble.py")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path) as hosts:
        yield hosts


def command(folder: Path, steps: int, trouble: str = "none", *flags: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    return [TROUBLE, str(folder), str(steps), trouble, *flags]


def test_two_hosts_with_a_shared_disk(hosts: Hosts, tmp_path: Path) -> None:
    save = tmp_path / "ckpt"
    agents = [hosts.launch(host, command(save, 4)) for host in range(2)]
    outcomes = [agent.wait(150) for agent in agents]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert sum(len(outcome.losses) for outcome in outcomes) == 4
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "4"


def test_two_hosts_with_disks_of_their_own(hosts: Hosts, tmp_path: Path) -> None:
    """Under one name each has another folder; the run is resumed from them, and ends where an undisturbed one does."""
    straight, save = tmp_path / "straight", tmp_path / "ckpt"
    disks = [tmp_path / f"disk_{host}" for host in range(2)]
    for folder in (straight, save, *disks):
        folder.mkdir()
    for steps, flags in ((4, ()), (6, ("--auto-resume",))):
        run = command(save, steps, "none", *flags, "--lr-decay-iters", "6")
        agents = [hosts.launch(host, run, mounts={save: disks[host]}) for host in range(2)]
        assert [agent.wait(150).code for agent in agents] == [0, 0], _said(hosts)
    assert "is not on one disk: ranks 0, 1 are the first on theirs" in _said(hosts)
    assert "loading checkpoint from" in _said(hosts) and not any(save.iterdir())
    agents = [hosts.launch(host, command(straight, 6, "none", "--lr-decay-iters", "6")) for host in range(2)]
    assert [agent.wait(150).code for agent in agents] == [0, 0], _said(hosts)
    expected = read(straight / "iter_0000006")
    for disk in disks:
        assert (disk / "latest_checkpointed_iteration.txt").read_text() == "6"
        found = read(disk / "iter_0000006")
        assert expected and found and expected.tensors == found.tensors


def test_the_cable_is_cut(hosts: Hosts, tmp_path: Path) -> None:
    flags = ("--distributed-timeout-minutes", "0.2")
    agents = [hosts.launch(host, command(tmp_path / "ckpt", 100_000, "none", *flags)) for host in range(2)]
    time.sleep(1)
    _wait_for_step(hosts, 20)
    hosts.cut()
    cut = time.time()
    for agent in agents:  # the ranks end; torchrun on the host that lost the other's may wait for the network longer
        agent.wait_for("\nerror (rank ", 60 - (time.time() - cut))
    assert agents[0].wait(60).code != 0
    assert re.search(r"no progress for .*\n  rank \d \(mm-[ab], pid \d+\) does not answer", _said(hosts)), _said(hosts)
    assert "lost contact with the other hosts: no answer from the job's store at 10.213.7." in _said(hosts)


@pytest.mark.parametrize("victim", [1])
def test_a_host_dies_and_comes_back(hosts: Hosts, tmp_path: Path, victim: int) -> None:
    flags = ("--save-interval", "50", "--distributed-timeout-minutes", "0.5")
    run = command(tmp_path / "ckpt", 100_000, "none", *flags)
    for host in range(2):
        hosts.launch(host, run, restarts=3)
    _wait_for_step(hosts, 60)
    hosts.die(victim)
    hosts.launch(victim, run, restarts=3)
    for _ in range(2):
        _wait_for(hosts, r"loading checkpoint from \S+ at iteration (\d+)0\b", 120)
    last = _wait_for_step(hosts, 100)
    assert last > 50


def _said(hosts: Hosts) -> str:
    return "".join(path.read_text() for path in sorted(hosts.folder.glob("host_*.log")))


def _wait_for(hosts: Hosts, pattern: str, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while not (found := re.findall(pattern, _said(hosts))):
        assert time.monotonic() < deadline, _said(hosts)
        time.sleep(0.5)
    return found


def _wait_for_step(hosts: Hosts, step: int) -> int:
    deadline = time.monotonic() + 120
    while True:
        steps = [int(n) for n in re.findall(r"iteration +(\d+)/", _said(hosts))]
        if steps and steps[-1] >= step:
            return steps[-1]
        assert time.monotonic() < deadline, _said(hosts)
        time.sleep(0.5)
