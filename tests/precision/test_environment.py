"""precision env: what is in force on each kind of device, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mindspeed_mm import accelerator
from mindspeed_mm.accelerator import determinism
from mindspeed_mm.precision.settings.config_side import Side, understand
from mindspeed_mm.precision.settings.config_sources import read_sources
from mindspeed_mm.precision.settings.environment import judge_environment
from tests.precision.command import run

NPU = {
    "HCCL_DETERMINISTIC": "true",
    "LCCL_DETERMINISTIC": "1",
    "CLOSE_MATMUL_K_SHIFT": "1",
    "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
    "PYTHONHASHSEED": "0",
}
GPU = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONHASHSEED": "0", "NCCL_ALGO": "Ring"}


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[accelerator.Condition]]]:
    """Give the conditions of a device type with these variables, deterministic algorithms turned on."""

    def conditions(kind: str, backend: str, variables: dict[str, str]) -> list[accelerator.Condition]:
        monkeypatch.setattr(determinism, "device_type", lambda: kind)
        return accelerator.conditions(variables, backend)

    switches = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield conditions
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = switches


@pytest.mark.parametrize(
    ("kind", "backend", "variables"),
    [("cpu", "gloo", {"PYTHONHASHSEED": "0"}), ("cuda", "cpu:gloo,cuda:nccl", GPU), ("npu", "cpu:gloo,npu:hccl", NPU)],
)
def test_each_device_can_be_repeatable(on, kind: str, backend: str, variables: dict[str, str]) -> None:
    rows = on(kind, backend, variables)
    assert judge_environment(rows, Side(), asked=True).exit_code == 0
    assert ("gloo" in {row.name for row in rows}) and ("NCCL_ALGO" in {row.name for row in rows}) == (kind == "cuda")


@pytest.mark.parametrize(
    ("kind", "backend", "variables", "name"),
    [
        ("npu", "npu:hccl", {**NPU, "HCCL_DETERMINISTIC": "false"}, "HCCL_DETERMINISTIC"),
        ("npu", "npu:hccl", {k: v for k, v in NPU.items() if not k.startswith("CLOSE")}, "CLOSE_MATMUL_K_SHIFT"),
        ("cuda", "nccl", {**GPU, "CUBLAS_WORKSPACE_CONFIG": ":0:0"}, "CUBLAS_WORKSPACE_CONFIG"),
        ("cuda", "nccl", {**GPU, "NCCL_ALGO": "NVLS"}, "NCCL_ALGO"),
        ("cuda", "nccl", {**GPU, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"}, "NVTE_ALLOW_NONDETERMINISTIC_ALGO"),
        ("cpu", "gloo", {}, "PYTHONHASHSEED"),
    ],
)
def test_what_is_not_repeatable_is_refused_when_determinism_is_asked_for(
    on, kind: str, backend: str, variables: dict[str, str], name: str
) -> None:
    rows = on(kind, backend, variables)
    verdict = judge_environment(rows, Side(), asked=True)
    assert [finding.site for finding in verdict.findings] == [name] and verdict.exit_code == 1
    assert verdict.findings[0].next_command
    assert judge_environment(rows, Side(), asked=False).exit_code == 0


def test_algorithms_that_only_warn_are_not_enough(on) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    verdict = judge_environment(on("cpu", "gloo", {"PYTHONHASHSEED": "0"}), Side(), asked=True)
    assert verdict.first is not None and "only warns" in verdict.first.evidence


def test_settings_of_a_run_that_contradict_its_determinism_are_refused(on, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    base = "python pretrain.py --micro-batch-size 1 --num-layers 2 --lr 1e-5 --deterministic-mode"
    rows = on("cpu", "gloo", {"PYTHONHASHSEED": "0"})
    for extra, site in (
        ("", None),
        ("export HCCL_DETERMINISTIC=false", "hccl_deterministic"),
        ("export NVTE_ALLOW_NONDETERMINISTIC_ALGO=1", "te_nondeterministic_allowed"),
        ("x --moe-input-jitter-eps 0.01", "router_jitter"),
    ):
        script.write_text(f"{extra}\n{base}\n")
        found = judge_environment(rows, understand(read_sources(str(script))), asked=False)
        assert [finding.site for finding in found.findings] == ([site] if site else []), extra
        assert found.exit_code == (1 if site else 0)


def test_the_command_tells_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    code, text = run("env")
    assert code == 0 and "gloo" in text and "not asked for" in text
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    try:
        code, text = run("env", "--deterministic")
        assert code == (0 if not __import__("sys").flags.hash_randomization else 1)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
