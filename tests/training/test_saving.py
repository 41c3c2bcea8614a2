"""Saving beside the training, on a full disk, and what is kept."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mindspeed_mm.checkpoint import manifest, store
from mindspeed_mm.checkpoint.background import HostCopy
from mindspeed_mm.checkpoint.integrity import inspect
from mindspeed_mm.checkpoint.publish import TRACKER, checkpoints_in
from mindspeed_mm.checkpoint.retention import Retention
from mindspeed_mm.errors import UserError
from mindspeed_mm.training import pretrain
from mindspeed_mm.training.saving import Saver
from tests.checkpoint import small
from tests.ranks import RankPool
from tests.training import script
from tests.training.script import train


def digests(folder: Path) -> dict[str, Any]:
    """The digests of all tensors of all checkpoints in a folder."""
    return {path.name: manifest.read(path).tensors for path in checkpoints_in(folder)}  # type: ignore[union-attr]


def test_async_saves_what_sync_saves(ranks: RankPool, tmp_path: Path) -> None:
    at_once, beside, resumed = (tmp_path / name for name in ("sync", "async", "resumed"))
    for folder in (at_once, beside, resumed):
        folder.mkdir()
    ranks.run(train, str(at_once), "--save-interval", "1", steps=10)
    ranks.run(train, str(beside), "--save-interval", "1", "--async-save", steps=10)
    assert digests(at_once) == digests(beside) and len(digests(beside)) == 10
    assert all(inspect(path).good for path in checkpoints_in(beside))
    ranks.run(train, str(resumed), "--async-save", "--load", str(beside), "--ckpt-step", "7", steps=10)
    assert digests(resumed)["iter_0000010"] == digests(at_once)["iter_0000010"]


def test_what_is_kept(ranks1: RankPool, tmp_path: Path) -> None:
    keep = ("--keep-last", "2", "--keep-every", "5", "--keep-best", "1")
    ranks1.run(train, str(tmp_path), "--save-interval", "1", "--eval-interval", "1", *keep, steps=12)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {row["iteration"]: row["validation loss"] for row in rows if "validation loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert [int(path.name[-7:]) for path in checkpoints_in(tmp_path)] == sorted({5, 10, 11, 12, best})
    found = manifest.read(tmp_path / f"iter_{best:07d}")
    assert found and found.validation_loss == losses[best]


def test_keep_best_needs_an_evaluation_at_every_save(tmp_path: Path) -> None:
    from mindspeed_mm.arguments import parse_args, validate_args

    script.arguments(tmp_path, "--keep-best", "1", "--save-interval", "6", steps=10)
    with pytest.raises(UserError, match="--save-interval 6 must be a multiple of --eval-interval 4"):
        validate_args(parse_args(None, {}), 1)


class Gate:
    """Stands in for the disk: a write waits until it is let through, then does what it is told."""

    def __init__(self) -> None:
        self.open = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.written: list[int] = []
        self.errors: list[BaseException | None] = []

    def write(self, folder: Path, snapshot: store.Snapshot, *_: Any) -> Path:
        self.entered.release()
        assert self.open.acquire(timeout=20)
        if error := self.errors.pop(0) if self.errors else None:
            raise error
        self.written.append(snapshot.iteration)
        return folder / f"iter_{snapshot.iteration:07d}"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr("mindspeed_mm.training.saving.write_snapshot", gate.write)
    return gate


def taking(iteration: int) -> Callable[[HostCopy | None], store.Snapshot]:
    return lambda copy: store.Snapshot(iteration, {}, {})


def test_one_save_at_a_time_and_the_training_goes_on(gate: Gate, tmp_path: Path) -> None:
    saver = Saver(tmp_path, beside=True, keep=Retention())
    saver.save(1, taking(1))
    assert gate.entered.acquire(timeout=20)
    for _ in range(3):
        saver.check()  # does not wait
    second = threading.Thread(target=lambda: saver.save(2, taking(2)))
    second.start()
    assert not gate.entered.acquire(timeout=0.2) and second.is_alive(), "the second waits for the first"
    gate.open.release(2)
    second.join(20)
    saver.finish()
    assert gate.written == [1, 2] and saver.newest == tmp_path / "iter_0000002"


def test_what_goes_wrong_beside_the_training_is_told_at_the_next_step(
    gate: Gate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(tmp_path, beside=True, keep=Retention())
    gate.errors = [None, UserError("saving failed: no space"), ValueError("a bug"), UserError("still full")]
    for iteration in (1, 2):
        gate.open.release()
        saver.save(iteration, taking(iteration))
    while saver._background.busy:
        pass
    assert "no space" not in capsys.readouterr().err
    saver.check()
    warning = capsys.readouterr().err
    assert "warning: saving failed: no space" in warning and "iter_0000001 stays the newest" in warning
    saver.check()
    assert not capsys.readouterr().err
    gate.open.release()
    saver.save(3, taking(3))
    with pytest.raises(ValueError, match="a bug"):
        saver.wait()
    gate.open.release()
    with pytest.raises(UserError, match="still full"):
        saver.finish()
    gate.open.release()
    saver.finish()
    assert gate.written == [1, 3]


def test_a_copy_is_apart_from_what_it_was_made_of() -> None:
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    copy = HostCopy()
    first = copy.take(tensors)
    tensors["a"].mul_(5)
    assert torch.equal(first["a"], torch.ones(3)) and first["b"].dtype == torch.bfloat16
    second = copy.take({"a": tensors["a"]})
    assert second.keys() == {"a"} and torch.equal(second["a"], tensors["a"])
    assert second["a"].data_ptr() == first["a"].data_ptr(), "the host memory is used again"


def test_fifty_async_saves_do_not_grow(tmp_path: Path) -> None:
    model, optim = small.build(0)
    model.register_parameter("large", torch.nn.Parameter(torch.zeros(2**20)))  # 4 MiB
    saver = Saver(tmp_path, beside=True, keep=Retention(last=1))
    process, sizes, files, threads = psutil.Process(), [], [], []

    def take(copy: HostCopy | None) -> store.Snapshot:
        return store.take_snapshot(step, model=model, optimizer=optim, extra={}, rank_state={}, copy_to=copy)

    for step in range(60):
        small.train(model, optim, range(step, step + 1))
        saver.save(step, take)
        saver.check()
        if step >= 9:
            saver.wait()
            sizes.append(process.memory_info().rss)
            files.append(process.num_fds())
            threads.append(threading.active_count())
    saver.finish()
    assert len(checkpoints_in(tmp_path)) == 1
    assert max(files) == files[0] and max(threads) == threads[0]
    assert sizes[-1] - sizes[0] < 4 * 2**20, "less than one more copy after fifty saves"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB: a checkpoint of two ranks takes about 200 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def train_on(folder: str, full_from: int, full_until: int, how: str, *flags: str) -> Any:
    """Train ten steps, saving every second one; the disk is full before some of them."""
    ballast, calls = Path(folder) / f"ballast_{os.environ['RANK']}", [0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def forward_step(data_iterator: Any, model: Any) -> Any:
        if model.training:
            calls[0] += 1
            if calls[0] in (full_from, full_until):
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()
            if calls[0] == full_from and how == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            elif calls[0] == full_from and os.environ["RANK"] == "0":
                with open(ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                    while True:
                        file.write(bytes(4096))
            if calls[0] == full_until and how == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            elif calls[0] == full_until and os.environ["RANK"] == "0":
                ballast.unlink()
        return script.forward_step(data_iterator, model)

    def main() -> None:
        script.arguments(folder, "--save-interval", "2", *flags, steps=10)
        pretrain(script.datasets, script.Net, None, forward_step)

    try:
        return capture(main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def capture(main: Callable[[], None]) -> tuple[int, str]:
    """Return the exit code and the output of a run in this process."""
    import contextlib
    import io

    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return code, output.getvalue()


@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["sync", "async"])
@pytest.mark.parametrize("how", ["limit", "disk"])
def test_training_outlives_a_full_disk(
    how: str, flags: tuple[str, ...], ranks2: RankPool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("small_disk") if how == "disk" else tmp_path
    code, text = ranks2.run(train_on, str(folder), 4, 7, how, "--keep-last", "1", *flags)[0]
    assert code == 0
    failed = re.findall(r"warning: saving .*iter_000000(\d) failed on rank \d: .*", text)
    assert failed == ["4", "6"], text
    assert text.count("iter_0000002 stays the newest checkpoint; the next save is the next attempt.") == 2
    assert (folder / TRACKER).read_text() == "10"
    assert [path.name for path in checkpoints_in(folder)] == ["iter_0000010"]
    assert inspect(folder / "iter_0000010").good
    steps = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 11)), "no line is lost"


@pytest.mark.parametrize("flags", [(), ("--async-save",)], ids=["sync", "async"])
def test_a_run_whose_last_state_is_not_saved_fails(flags: tuple[str, ...], ranks1: RankPool, tmp_path: Path) -> None:
    ((code, text),) = ranks1.run(train_on, str(tmp_path), 4, 99, "limit", *flags)
    assert code == 1 and re.search(r"error: saving .*iter_0000010 failed on rank 0: ", text), text
    assert [path.name for path in checkpoints_in(tmp_path)] == ["iter_0000002"]
    assert inspect(tmp_path / "iter_0000002").good and (tmp_path / TRACKER).read_text() == "2"
    assert not list(tmp_path.glob("*.staging"))


def test_what_a_killed_save_leaves_is_gone_at_the_next_start(ranks1: RankPool, tmp_path: Path) -> None:
    ranks1.run(train, str(tmp_path), steps=2)
    for name in ("iter_0000004.staging", "iter_0000001.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_text("half")
    (tmp_path / TRACKER).unlink()  # killed before it was written: no reason to start over
    ranks1.run(train, str(tmp_path), "--auto-resume", steps=3)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["iter_0000002", "iter_0000003"]
    steps = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 3
