"""What deterministic runs set, and what they say they cannot do."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm import accelerator
from mindspeed_mm.accelerator import numerics


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Pretend to run on another device type, whose context exists or not; torch's switches are put back."""

    def pretend(kind: str, started: bool = False) -> None:
        monkeypatch.setattr(numerics, "device_type", lambda: kind)
        monkeypatch.setattr(numerics, "is_cpu", lambda: kind == "cpu")
        monkeypatch.setattr(numerics, "_module", lambda: SimpleNamespace(is_initialized=lambda: started))
        monkeypatch.setattr(os, "environ", {"PYTHONHASHSEED": "0"})

    switches = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield pretend
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = switches


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cpu", {}),
        ("cuda", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
        ("npu", {"HCCL_DETERMINISTIC": "true", "LCCL_DETERMINISTIC": "1", "CLOSE_MATMUL_K_SHIFT": "1",
                 "ATB_MATMUL_SHUFFLE_K_ENABLE": "0"}),
    ],
)  # fmt: skip
def test_each_device_gets_its_own_variables(on, kind: str, expected: dict[str, str]) -> None:
    on(kind)
    accelerator.use_deterministic_algorithms()
    # Where torch was never compiled with before, it adds a folder of its own.
    added = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    assert added == {"PYTHONHASHSEED": "0", **expected}
    assert torch.are_deterministic_algorithms_enabled()


def test_what_comes_too_late_or_contradicts_is_named(on) -> None:
    on("cuda", started=True)
    assert any(line.startswith("the device was in use before CUBLAS") for line in accelerator.determinism_limits())
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    assert not any("CUBLAS" in line for line in accelerator.determinism_limits())
    on("npu")
    os.environ["HCCL_DETERMINISTIC"] = "TRUE"
    assert not any("HCCL" in line for line in accelerator.determinism_limits())
    os.environ["HCCL_DETERMINISTIC"] = "false"
    assert any(line.startswith("HCCL_DETERMINISTIC=false") for line in accelerator.determinism_limits())


@pytest.mark.ranks
@pytest.mark.parametrize(("seed", "named"), [(None, True), ("random", True), ("7", False)])
def test_a_hash_seed_that_is_missing_is_named(seed: str | None, named: bool) -> None:
    code = "from mindspeed_mm.accelerator import numerics; print(numerics.determinism_limits())"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONHASHSEED"} | (
        {"PYTHONHASHSEED": seed} if seed else {}
    )
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("PYTHONHASHSEED" in printed.stdout) == named


def test_seed_all_repeats_everything_that_is_drawn_attention_dropout_included() -> None:
    q = torch.ones(1, 1, 8, 4)

    def draw() -> tuple[float, ...]:
        accelerator.seed_all(42)
        dropped = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        return random.random(), numpy.random.rand(), torch.rand(()).item(), *dropped.flatten().tolist()

    first = draw()
    assert draw() == first
    accelerator.seed_all(43)
    assert random.random() != first[0]
    assert F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).flatten().tolist() != list(first[3:])


def test_seed_all_may_choose_deterministic_kernels(on) -> None:
    on("cpu")
    accelerator.seed_all(1)
    assert not torch.are_deterministic_algorithms_enabled()
    accelerator.seed_all(1, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
