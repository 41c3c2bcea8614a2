"""Decisions of the accelerator layer, for this machine and, with a stand-in device type, for the others."""

from __future__ import annotations

import os
import platform
import random
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

from mindspeed_mm import accelerator
from mindspeed_mm.accelerator import backend, hardware, kernels, profiling
from mindspeed_mm.errors import UserError


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Pretend to run on another device type."""

    def pretend(kind: str) -> None:
        for module in (backend, hardware, kernels, profiling):
            monkeypatch.setattr(module, "device_type", lambda: kind)

    return pretend


@pytest.mark.parametrize(
    ("kind", "requested", "chosen", "warns"),
    [
        ("cpu", None, "gloo", False),
        ("cpu", "gloo", "gloo", False),
        ("cpu", "nccl", "gloo", True),  # a published script on a laptop
        ("cpu", "hccl", "gloo", True),
        ("cpu", "npu:hccl,cpu:gloo", "gloo", True),
        ("cuda", None, "cpu:gloo,cuda:nccl", False),
        ("cuda", "nccl", "cpu:gloo,cuda:nccl", False),
        ("cuda", "gloo", "gloo", False),
        ("cuda", "hccl", "cpu:gloo,cuda:nccl", True),  # a published script on a GPU
        ("cuda", "npu:hccl,cpu:gloo", "cpu:gloo,cuda:nccl", True),
        ("npu", None, "cpu:gloo,npu:hccl", False),
        ("npu", "nccl", "cpu:gloo,npu:hccl", False),  # NPU scripts say nccl and mean the device's library
        ("npu", "npu:hccl,cpu:gloo", "cpu:gloo,npu:hccl", False),
    ],
)
def test_backend(on, kind: str, requested: str | None, chosen: str, warns: bool) -> None:
    on(kind)
    name, warning = accelerator.resolve_backend(requested)
    assert name == chosen
    assert (warning is not None) == warns
    if warning:
        assert requested in warning
        assert chosen in warning


def test_this_machine_is_found_and_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware.device_type.cache_clear()
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "cpu")
    assert accelerator.device_type() == "cpu"
    hardware.device_type.cache_clear()
    monkeypatch.setenv("MINDSPEED_MM_DEVICE", "gpu")
    with pytest.raises(UserError, match=r"MINDSPEED_MM_DEVICE: 'gpu'.*Did you mean"):
        accelerator.device_type()
    monkeypatch.delenv("MINDSPEED_MM_DEVICE")
    hardware.device_type.cache_clear()


def test_too_many_processes_for_the_devices(on, monkeypatch: pytest.MonkeyPatch) -> None:
    on("npu")
    chosen: list[int] = []
    stand_in = SimpleNamespace(device_count=lambda: 2, set_device=chosen.append, current_device=lambda: chosen[-1])
    monkeypatch.setattr(hardware, "_module", lambda: stand_in)
    accelerator.set_device(1)
    assert chosen == [1]
    with pytest.raises(UserError, match="--nproc_per_node: local rank 2 has no device"):
        accelerator.set_device(2)


def test_peak_is_known_or_none_but_never_guessed(on, monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator.peak_flops(torch.bfloat16) is None
    on("cuda")
    for name, expected in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA Unheard Of", None)):
        monkeypatch.setattr(hardware, "_module", lambda name=name: SimpleNamespace(get_device_name=lambda: name))
        assert accelerator.peak_flops(torch.bfloat16) == expected


def test_random_state_round_trip(tmp_path) -> None:
    accelerator.seed_all(3)
    torch.save(accelerator.rng_state(), tmp_path / "state.pt")
    expected = (random.random(), numpy.random.rand(), torch.rand(()).item())
    accelerator.set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == expected


def test_memory_of_a_cpu_process_is_its_resident_set() -> None:
    before = accelerator.memory_stats()["allocated"]
    block = torch.ones(32 * 2**20, dtype=torch.uint8)
    assert accelerator.memory_stats()["allocated"] - before > 0.8 * block.numel()


@pytest.mark.ranks
def test_megatron_core_imports_without_dynamo_and_compile_is_put_back() -> None:
    code = (
        "import sys, torch, torch.distributed.fsdp; compiled = torch.compile\n"
        "def compilers(): return {m for m in sys.modules if m.startswith(('torch._dynamo', 'torch._inductor'))}\n"
        "before = compilers()\n"  # empty, but torch 2.7 imports Dynamo for FSDP2
        "from mindspeed_mm import accelerator; accelerator.prepare_megatron_layers()\n"
        "import mindspeed_mm.models.megatron.decoder; assert 'megatron.core.models.gpt' in sys.modules\n"
        "assert compilers() == before\n"
        "assert torch.compile is compiled\n"
    )
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.ranks
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_memory_of_a_step_is_kept_for_the_next_unless_the_user_has_chosen(chosen: dict[str, str]) -> None:
    code = """if True:
        import resource, torch
        from mindspeed_mm import accelerator

        def page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            kept = [torch.ones(5 << 20) for _ in range(10)]  # 20 MiB each
            del kept
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        accelerator.set_device(0)
        print(*(page_faults() for _ in range(5)))
    """
    environment = {**os.environ, **chosen}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    faults = [int(n) for n in result.stdout.split()]
    pages = 10 * (20 << 20) // resource.getpagesize()
    assert faults[0] > 0.9 * pages
    assert faults[-1] > 0.9 * pages if chosen else faults[-1] < 0.1 * pages


@pytest.mark.parametrize("accumulates", [True, False])
def test_ligers_kernel_is_used_on_cuda_where_it_is_installed(
    on, monkeypatch: pytest.MonkeyPatch, accumulates: bool
) -> None:
    seen: dict[str, object] = {}

    class Loss:  # with the public signature of Liger's, old and new
        if accumulates:

            def __init__(self, ignore_index: int, reduction: str, accum_dtype: object = None) -> None:
                seen.update(ignore_index=ignore_index, reduction=reduction, accum_dtype=accum_dtype)
        else:

            def __init__(self, ignore_index: int, reduction: str) -> None:
                seen.update(ignore_index=ignore_index, reduction=reduction)

        def __call__(self, lin_weight, _input, target, bias=None):
            logits = torch.nn.functional.linear(_input, lin_weight, bias)
            return torch.nn.functional.cross_entropy(
                logits, target, **{k: seen[k] for k in ("ignore_index", "reduction")}
            )

    def chosen(kind: str):
        kernels.fused_linear_cross_entropy.cache_clear()
        on(kind)
        return accelerator.fused_linear_cross_entropy()

    try:
        monkeypatch.setitem(sys.modules, "liger_kernel", None)
        assert chosen("cuda") is None, "not installed"
        stand_in = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=Loss)
        monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=stand_in))
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
        assert chosen("cpu") is None and chosen("npu") is None
        kernel = chosen("cuda")
    finally:
        kernels.fused_linear_cross_entropy.cache_clear()
    head, hidden, targets = torch.nn.Linear(4, 7), torch.randn(5, 4), torch.tensor([0, -100, 6, 2, -100])
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(kernel(head, hidden, targets), expected)
    assert (seen["ignore_index"], seen["reduction"]) == (-100, "sum")
    assert seen.get("accum_dtype") == (torch.float32 if accumulates else None)
