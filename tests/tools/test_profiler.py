from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, record_function

from mindspeed_mm import accelerator
from mindspeed_mm.configs.tools import ProfileConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.tools.profiler import Profiler


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(accelerator, "profiler_activities", lambda with_cpu=True: [ProfilerActivity.CPU], raising=False)


def train(profiler: Profiler, iterations: int, between: dict[int, Any] | None = None) -> None:
    """Run iterations 0, 1, ... that are marked in a trace by their number; ``between[i]`` runs after iteration i."""
    profiler.start()
    for i in range(iterations):
        with record_function(f"iteration_{i}"):
            torch.ones(4).sum()
        if between and i in between:
            between[i]()
        profiler.step()
    profiler.stop()


def traces(folder: Path) -> list[tuple[str, list[int]]]:
    """Return the file name and the recorded iterations of each trace."""
    found = []
    for file in sorted(folder.glob("*.pt.trace.json"), key=lambda file: file.stat().st_mtime_ns):
        events = json.loads(file.read_text())["traceEvents"]
        names = {event["name"] for event in events if str(event.get("name")).startswith("iteration_")}
        found.append((file.name, sorted(int(name.split("_")[1]) for name in names)))
    return found


def static(folder: Path, **keys: Any) -> ProfileConfig:
    return ProfileConfig(enable=True, ranks=[0], static_param={"save_path": str(folder), **keys})


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 3), (1, 2), (3, 5)])
def test_records_the_asked_iterations_and_no_others(tmp_path: Path, start: int, end: int) -> None:
    train(Profiler(static(tmp_path, start_step=start, end_step=end)), 7)
    ((name, iterations),) = traces(tmp_path)
    assert name.startswith("rank0.")
    assert iterations == list(range(start, end))


def test_a_short_run_keeps_what_was_recorded(tmp_path: Path) -> None:
    train(Profiler(static(tmp_path, start_step=1, end_step=9)), 3)
    assert [iterations for _, iterations in traces(tmp_path)] == [[1, 2]]


def test_a_run_that_never_got_there_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(Profiler(static(tmp_path, start_step=5, end_step=6)), 3)
    assert traces(tmp_path) == []
    assert "the run ended after 3 iterations, recording was to start after 5" in caplog.text


@pytest.mark.parametrize(("ranks", "recorded"), [([1], True), ([-1], True), ([0, 2], False)])
def test_only_listed_ranks_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: list[int], recorded: bool
) -> None:
    monkeypatch.setenv("RANK", "1")
    config = static(tmp_path, start_step=0, end_step=1)
    config.ranks = ranks
    train(Profiler(config), 2)
    assert [name.split(".")[0] for name, _ in traces(tmp_path)] == (["rank1"] if recorded else [])


def test_off_means_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = static(tmp_path, start_step=0, end_step=1)
    config.enable = False
    train(Profiler(config), 2)
    assert traces(tmp_path) == [] and caplog.text == ""


def test_an_empty_range_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profile\.static_param\.end_step is 4; it must be greater than start_step"):
        Profiler(static(tmp_path, start_step=4, end_step=4))


def test_keys_without_effect_are_named_when_they_are_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Profiler(static(tmp_path, level="level1"))
    assert caplog.text == ""
    Profiler(static(tmp_path, level="level2"))
    assert "level: for Ascend's own profiler" in caplog.text


class TestDynamic:
    def profiler(self, folder: Path, ranks: tuple[int, ...] = (0,)) -> Profiler:
        return Profiler(
            ProfileConfig(
                enable=True, profile_type="dynamic", ranks=list(ranks), dynamic_param={"config_path": str(folder)}
            )
        )

    def ask(self, folder: Path, text: str | None = None, **keys: Any) -> None:
        file = folder / "profiler_config.json"
        before = file.stat().st_mtime_ns if file.exists() else 0
        file.write_text(text or json.dumps({"prof_dir": str(folder), **keys}))
        os.utime(file, ns=(before + 10**6, before + 10**6))  # a clock that is coarser than this test

    def test_a_file_to_edit_is_offered(self, tmp_path: Path) -> None:
        train(self.profiler(tmp_path / "new"), 2)
        assert json.loads((tmp_path / "new" / "profiler_config.json").read_text())["start_step"] == 0
        assert traces(tmp_path / "new") == []

    def test_requests_are_served_while_training_runs(self, tmp_path: Path) -> None:
        between = {
            0: lambda: self.ask(tmp_path, start_step=-1),  # from the next iteration
            3: lambda: self.ask(tmp_path, start_step=6, active=2, warmup=1),
            8: lambda: self.ask(tmp_path, start_step=0),
        }
        train(self.profiler(tmp_path), 12, between)
        assert [iterations for _, iterations in traces(tmp_path)] == [[1], [6, 7]]

    def test_a_request_that_lies_there_is_served_once(self, tmp_path: Path) -> None:
        self.ask(tmp_path, start_step=2)
        train(self.profiler(tmp_path), 6)
        assert [iterations for _, iterations in traces(tmp_path)] == [[2]]

    def test_a_later_request_replaces_one_that_waits(self, tmp_path: Path) -> None:
        self.ask(tmp_path, start_step=100)
        train(self.profiler(tmp_path), 6, {1: lambda: self.ask(tmp_path, start_step=3)})
        assert [iterations for _, iterations in traces(tmp_path)] == [[3]]

    def test_a_step_that_has_passed_is_reported(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        train(self.profiler(tmp_path), 5, {3: lambda: self.ask(tmp_path, start_step=2)})
        assert traces(tmp_path) == [] and "start_step 2" in caplog.text and "4 iterations are finished" in caplog.text

    def test_a_broken_request_does_not_stop_the_training(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        between = {
            0: lambda: self.ask(tmp_path, '{"start_step": '),
            1: lambda: self.ask(tmp_path, start_stp=3),
            2: lambda: self.ask(tmp_path, start_step=-1),
        }
        with caplog.at_level(logging.WARNING):
            train(self.profiler(tmp_path), 6, between)
        assert "line 1, column" in caplog.text and "Did you mean 'start_step'?" in caplog.text
        assert [iterations for _, iterations in traces(tmp_path)] == [[3]]

    def test_the_request_may_choose_the_ranks(self, tmp_path: Path) -> None:
        self.ask(tmp_path, start_step=-1, is_rank=True, rank_list=[3])
        train(self.profiler(tmp_path), 3)
        assert traces(tmp_path) == []
        self.ask(tmp_path, start_step=-1, is_rank=True, rank_list=[0])
        train(self.profiler(tmp_path, ranks=(7,)), 3)
        assert len(traces(tmp_path)) == 1
