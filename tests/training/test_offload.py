"""Parameters and optimizer on the host, weights created on the host, parts frozen: whole runs of a custom model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.ranks import RankPool
from tests.training.script import Net, arguments, datasets, forward_step
from tests.training.test_resume import STEPS, assert_same_run, losses, tensors

OFFLOAD = {"offload_to_cpu": True, "pin_memory": True}


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    return request.getfixturevalue(f"ranks{request.param}")


def run(folder: str, yaml: dict[str, Any], *flags: str, steps: int = STEPS, model: Any = Net) -> None:
    """Train with keys added to the yaml."""
    from mindspeed_mm.training import pretrain

    Path(folder).mkdir(exist_ok=True)
    arguments(folder, *flags, "--global-batch-size", "8", "--clip-grad", "0.05", steps=steps)
    path = Path(folder) / f"fsdp2_config_{os.environ['RANK']}.yaml"
    path.write_text(json.dumps({"sharding_size": "auto", "sub_modules_to_wrap": ["layers.{*}"], **yaml}))
    pretrain(datasets, model, None, forward_step)


def is_offloaded(folder: str) -> bool:
    seen = []

    def model() -> Net:
        net = Net()
        net.register_forward_pre_hook(lambda *_: seen.append(net._get_fsdp_state()._fsdp_param_group))
        return net

    run(folder, OFFLOAD, steps=1, model=model)
    return all(param.offload_to_cpu for param in seen[0].fsdp_params)


def test_offloaded_runs_have_the_same_numbers_and_resume(ranks: RankPool, tmp_path: Path) -> None:
    on_device, offloaded, resumed, back = (str(tmp_path / name) for name in ("device", "host", "resumed", "back"))
    ranks.run(run, on_device, {})
    ranks.run(run, offloaded, OFFLOAD)
    assert_same_run(Path(offloaded), Path(on_device))
    norms = [norm for _, norm, _ in losses(Path(offloaded)).values()]
    assert min(norms) > 0.05, "clipping must have something to do"
    ranks.run(run, resumed, OFFLOAD, steps=5)
    ranks.run(run, resumed, OFFLOAD, "--load", resumed)
    assert_same_run(Path(resumed), Path(on_device))
    # A checkpoint does not know where its tensors lived.
    ranks.run(run, back, OFFLOAD, steps=5)
    ranks.run(run, back, {}, "--load", back)
    assert_same_run(Path(back), Path(on_device))
    assert all(ranks.run(is_offloaded, str(tmp_path / "state")))


def weights_at_start(folder: str, yaml: dict[str, Any], *flags: str) -> dict[str, torch.Tensor]:
    """Return the whole parameters before the first step."""
    from mindspeed_mm.training import pretrain

    seen: dict[str, torch.Tensor] = {}

    def first(iterator: Any, model: torch.nn.Module) -> Any:
        if not seen:
            for name, param in model.named_parameters():
                seen[name] = (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        return forward_step(iterator, model)

    arguments(folder, *flags, steps=1)
    path = Path(folder) / f"fsdp2_config_{os.environ['RANK']}.yaml"
    path.write_text(json.dumps({"sharding_size": "auto", "sub_modules_to_wrap": ["layers.{*}"], **yaml}))
    pretrain(datasets, Net, None, first)
    return seen


@pytest.mark.parametrize("flags", [[], ["--use-cpu-initialization"]], ids=["", "use-cpu-initialization"])
@pytest.mark.parametrize("yaml", [{}, OFFLOAD], ids=["device", "offloaded"])
def test_weights_are_created_on_the_host_for_every_world_size(
    ranks: RankPool, tmp_path: Path, flags: list[str], yaml: dict[str, Any]
) -> None:
    torch.manual_seed(99)
    expected = {name: p.detach() for name, p in Net().named_parameters()}
    for found in ranks.run(weights_at_start, str(tmp_path), yaml, "--seed", "99", *flags):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_weights_created_from_meta_are_the_same_for_every_world_size(
    ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    flags = ["--use-cpu-initialization", "--init-model-with-meta-device"]
    one = ranks1.run(weights_at_start, str(tmp_path), {}, *flags)[0]
    for yaml in ({}, OFFLOAD):
        for two in ranks2.run(weights_at_start, str(tmp_path), yaml, *flags):
            assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("mib", [64, 0])
def test_parts_frozen_by_pattern_keep_their_weights(ranks: RankPool, tmp_path: Path, mib: int) -> None:
    model = tmp_path / "model.json"
    model.write_text(json.dumps({"freeze": ["layers.{0}", "head.bias"]}))
    folder = tmp_path / "run"
    flags = ["--mm-model", str(model), "--seed", "5", "--weight-decay", "0.1"]
    ranks.run(run, str(folder), {"sub_modules_to_wrap": [], "replicate_frozen_mib": mib}, *flags)
    torch.manual_seed(5)
    start, end = {f"model.{n}": p for n, p in Net().named_parameters()}, tensors(folder / f"iter_{STEPS:07d}")
    unchanged = {name for name, value in start.items() if torch.equal(value, end[name])}
    assert unchanged == {"model.layers.0.weight", "model.layers.0.bias", "model.head.bias"}
    with_state = {key.removeprefix("optimizer.state.").rpartition(".")[0] for key in end if key.startswith("optim")}
    assert with_state == {name.removeprefix("model.") for name in start.keys() - unchanged}
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    yaml = {"sub_modules_to_wrap": [], "replicate_frozen_mib": 64 - mib}  # held in the other way from here on
    ranks.run(run, str(resumed), {**yaml, "replicate_frozen_mib": mib}, *flags, steps=5)
    ranks.run(run, str(resumed), yaml, *flags, "--load", str(resumed))
    assert_same_run(resumed, folder)
