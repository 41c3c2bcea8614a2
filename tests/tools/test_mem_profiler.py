from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mindspeed_mm import accelerator
from mindspeed_mm.configs.tools import MemoryProfileConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.tools import mem_profiler
from mindspeed_mm.tools.mem_profiler import MemoryProfiler, memory_profiler


class Device:
    """A device that keeps (or lacks) a history of its allocations, and the calls it got."""

    def __init__(self, has_history: bool) -> None:
        self.has_history = has_history
        self.calls: list[Any] = []

    def memory_history(self, enable: bool, max_entries: int | None = None, stacks: str = "all") -> bool:
        self.calls.append(("record", max_entries, stacks) if enable else "stop")
        return self.has_history

    def memory_snapshot(self, path: str) -> None:
        self.calls.append("dump")
        Path(path).write_bytes(b"snapshot")

    def memory_stats(self) -> dict[str, int]:
        return dict.fromkeys(("allocated", "max_allocated", "reserved", "max_reserved"), 3 * 2**20)

    def device_type(self) -> str:
        return "device" if self.has_history else "cpu"


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    stand_in = Device(has_history=getattr(request, "param", True))
    monkeypatch.setenv("RANK", "0")
    for name in ("memory_history", "memory_snapshot", "memory_stats", "device_type"):
        monkeypatch.setattr(accelerator, name, getattr(stand_in, name), raising=False)
    return stand_in


def run(config: MemoryProfileConfig, iterations: int, calls: list[Any]) -> None:
    profiler = MemoryProfiler()
    profiler.reset(config)
    for i in range(iterations):
        profiler.step()
        calls.append(i)
    profiler.stop()


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 2, ["record", 0, "dump", "stop", 1, 2]),  # the default: building the model and the first iteration
        (1, 2, ["record", 0, "dump", "stop", 1, 2]),
        (2, 3, [0, "record", 1, "dump", "stop", 2]),
        (2, 9, [0, "record", 1, 2, "dump", "stop"]),  # the run is too short
        (9, 10, [0, 1, 2]),
    ],
)
def test_steps_count_from_reset(tmp_path: Path, device: Device, start: int, end: int, expected: list[Any]) -> None:
    config = MemoryProfileConfig(enable=True, start_step=start, end_step=end, save_path=str(tmp_path / "new"))
    run(config, 3, device.calls)
    assert [call[0] if isinstance(call, tuple) else call for call in device.calls] == expected
    files = [file.name for file in (tmp_path / "new").glob("*")]
    assert len(files) == expected.count("dump")
    assert all(re.fullmatch(r"snapshot_\d{4}(-\d\d){4}_0\.pickle", name) for name in files)


def test_options_reach_the_device(tmp_path: Path, device: Device) -> None:
    run(
        MemoryProfileConfig(enable=True, stacks="python", max_entries=99, save_path=str(tmp_path)),
        2,
        device.calls,
    )
    assert device.calls[0] == ("record", 99, "python")


@pytest.mark.parametrize("device", [False], indirect=True)
def test_a_device_without_history_warns_once_and_writes_nothing(
    tmp_path: Path, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    run(MemoryProfileConfig(enable=True, save_path=str(tmp_path / "new")), 4, [])
    assert [record.message for record in caplog.records] == ["no memory history on cpu"]
    assert device.calls == [("record", None, "all")] and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("rank", "keys"), [("0", {"enable": False}), ("1", {"dump_ranks": [0]}), ("1", {"dump_ranks": []})]
)
def test_off_or_another_rank_does_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, keys: Any
) -> None:
    monkeypatch.setenv("RANK", rank)
    run(MemoryProfileConfig(**{"enable": True, "mem_info": True} | keys), 3, [])
    assert device.calls == [] and capsys.readouterr().out == ""


def test_mem_info(tmp_path: Path, device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    run(MemoryProfileConfig(enable=True, mem_info=True, save_path=str(tmp_path)), 1, [])
    assert capsys.readouterr().out.splitlines() == [
        f"[Rank 0] step {step} memory (MB) | max_reserved: 3.0 | max_allocated: 3.0" for step in (0, 1)
    ]


def test_an_empty_range_is_an_error() -> None:
    with pytest.raises(UserError, match=r"memory_profile\.end_step is 2; it must be greater than start_step"):
        MemoryProfiler().reset(MemoryProfileConfig(enable=True, start_step=2, end_step=2))


def test_documented_names(tmp_path: Path, device: Device) -> None:
    memory_profiler.reset(MemoryProfileConfig())
    memory_profiler.step()
    memory_profiler.stop()
    assert device.calls == []
    assert mem_profiler._record(max_entries=5)
    mem_profiler._dump(tmp_path / "a" / "b.pickle")
    mem_profiler._stop()
    assert device.calls == [("record", 5, "all"), "dump", "stop"]
