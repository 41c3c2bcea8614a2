"""Ranks whose micro-batches differ in kind, text, images, video, against Hugging Face's own loop in one process.

The reference has nothing of ours: an unmodified HF model, its own loss, torch's AdamW. It runs the micro-batches of
all ranks one after the other. What defines a step without any image is written there in one line: a parameter of the
tower that got no gradient gets a zero one.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.distributed.fsdp2 import prepare_model
from mindspeed_mm.engine.fsdp2 import FSDP2Engine
from mindspeed_mm.models.transformers_model import TransformersModel
from tests.models.tiny import save_tiny, tiny_batch, tiny_model
from tests.ranks import RankPool

# Images and videos of a sample.
TEXT, IMAGE, TWO_IMAGES, VIDEO, BOTH = (0, 0), (1, 0), (2, 0), (0, 1), (1, 1)
SECONDS = 60  # for all steps of a case; they take about one
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
TOWERS = {
    "qwen3_vl": ("model.visual", "model.visual.blocks.{*}"),
    "qwen2_5_vl": ("model.visual", "model.visual.blocks.{*}"),
    "internvl": ("model.vision_tower", "model.vision_tower.encoder.layer.{*}"),
}


@dataclass(frozen=True)
class Case:
    family: str
    frozen: bool
    policy: str  # how FSDP2 holds the tower
    seed: int = 0
    only: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = ()

    @property
    def steps(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """What each of the two samples of a step holds, one for each rank if there are two."""
        if self.only:
            return list(self.only)
        kinds = [TEXT, IMAGE, TWO_IMAGES] + [VIDEO, BOTH] * (self.family != "internvl")
        draw = random.Random(self.seed)
        always = [(IMAGE, TEXT), (TEXT, TEXT), (TEXT, kinds[-1])]
        return always + [(draw.choice(kinds), draw.choice(kinds)) for _ in range(5)]

    def batch(self, step: int, index: int) -> dict[str, Tensor]:
        images, videos = self.steps[step][index]
        return tiny_batch(self.family, images=[images], videos=[videos], seed=2 * step + index)

    @property
    def yaml(self) -> dict[str, Any]:
        units = ["model.language_model.layers.{*}"] + [TOWERS[self.family][1]] * (self.policy == "per layer")
        small = 64 if self.policy == "replicated" else 0
        return {"sharding_size": "auto", "sub_modules_to_wrap": units, "replicate_frozen_mib": small}


CASES = [
    *(Case("qwen3_vl", frozen, policy) for frozen in (True, False) for policy in ("per layer", "root")),
    Case("qwen3_vl", True, "replicated"),
    *(Case("qwen2_5_vl", frozen, "per layer", seed=1) for frozen in (True, False)),
    Case("internvl", False, "per layer", seed=2),
    Case("internvl", True, "root", seed=2),
]


def in_one_process(case: Case) -> dict[str, Any]:
    model = tiny_model(case.family)
    model.get_submodule(TOWERS[case.family][0]).requires_grad_(not case.frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), **ADAM)
    losses, norms = [], []
    for step in range(len(case.steps)):
        loss = sum(model(**case.batch(step, index), use_cache=False).loss / 2 for index in range(2))
        loss.backward()
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return collect(model, optimizer, losses, norms)


def collect(model: nn.Module, optimizer: Any, losses: list[float], norms: list[float]) -> dict[str, Any]:
    def full(tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()

    named = dict(model.named_parameters())
    state = {f"{n}.{k}": full(v) for n, p in named.items() for k, v in optimizer.state.get(p, {}).items()}
    return {"losses": losses, "norms": norms, "parameters": {n: full(p) for n, p in named.items()}, "state": state}


def on_ranks(case: Case, folder: str) -> dict[str, Any]:
    path = Path(folder) / f"rank{dist.get_rank()}.yaml"
    path.write_text(json.dumps(case.yaml))
    model = TransformersModel({"init_from_hf_path": folder})
    model.model.get_submodule(TOWERS[case.family][0]).requires_grad_(not case.frozen)
    plan = prepare_model(model, dist.group.WORLD, str(path))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAM)
    engine = FSDP2Engine(model, optimizer, group=dist.group.WORLD, clip_grad=1.0)

    def forward_step(batches: Any, module: nn.Module) -> Any:
        return module(**next(batches))["loss"], lambda loss: loss

    losses, norms = [], []
    for step in range(len(case.steps)):
        mine = [case.batch(step, index) for index in range(dist.get_rank(), 2, dist.get_world_size())]
        reports = engine.forward_backward(forward_step, iter(mine), len(mine))
        norms.append(float(engine.optimizer_step().grad_norm))
        loss = torch.stack([report["loss"] for report in reports]).sum()
        dist.all_reduce(loss)
        losses.append(float(loss) / 2)
    return collect(model.model, optimizer, losses, norms) | {"plan": "\n".join(plan.lines())}


def ready() -> None:
    """Ranks that have just been started import everything first, which no limit of ours is about."""


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{'frozen' if c.frozen else 'trained'}-{c.policy}")
def test_pain_17_batches_of_different_kinds_keep_ranks_in_step(ranks2: RankPool, tmp_path: Path, case: Case) -> None:
    save_tiny(case.family, tmp_path)
    expected = in_one_process(case)
    ranks2.run(ready)
    for found in ranks2.run(on_ranks, case, str(tmp_path), timeout=SECONDS):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        difference = torch.cat([(found["parameters"][n] - p).flatten() for n, p in expected["parameters"].items()])
        assert difference.norm() <= 1e-6 * torch.cat([p.flatten() for p in expected["parameters"].values()]).norm()
        assert not case.frozen or f": {case.policy}" in found["plan"]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_without_images_has_zero_gradients_for_the_tower(
    request: pytest.FixtureRequest, tmp_path: Path, world_size: int
) -> None:
    """AdamW's moments decay, its step counts and weights decay, for any number of ranks, as if fed zeros."""
    pool: RankPool = request.getfixturevalue(f"ranks{world_size}")
    case = Case("qwen3_vl", False, "per layer", only=((IMAGE, TEXT), (TEXT, TEXT), (TEXT, TEXT)))
    save_tiny(case.family, tmp_path)
    after_first, after_all = in_one_process(replace(case, only=case.only[:1])), in_one_process(case)
    pool.run(ready)
    tower = [n for n in after_all["state"] if n.startswith("model.visual.")]
    for name in (n for n in tower if n.endswith("exp_avg")):
        torch.testing.assert_close(after_all["state"][name], after_first["state"][name] * 0.9**2)
        assert after_all["state"][f"{name.removesuffix('exp_avg')}step"] == 3
    for found in pool.run(on_ranks, case, str(tmp_path), timeout=SECONDS):
        assert found["state"].keys() == after_all["state"].keys()
        for name in tower:
            scale = float(after_all["state"][name].abs().max())
            torch.testing.assert_close(found["state"][name], after_all["state"][name], rtol=1e-6, atol=1e-6 * scale)
        for name in (n for n in after_all["parameters"] if n.startswith("model.visual.")):
            torch.testing.assert_close(found["parameters"][name], after_all["parameters"][name], rtol=1e-6, atol=1e-7)
