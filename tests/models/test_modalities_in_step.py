"""Ranks whose micro-batches differ in kind, text, images, video, against Hugging Face's own loop in one process.

The reference has nothing of ours: an unmodified HF model, its own loss, torch's AdamW. It runs the micro-batches of
all ranks one after the other. What defines a step without any image is written there in one line: a parameter of the
tower that got no gradient gets a zero one.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
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

    @property
    def steps(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """What the sample of each of two ranks holds, step by step."""
        kinds = [TEXT, IMAGE, TWO_IMAGES] + [VIDEO, BOTH] * (self.family != "internvl")
        draw = random.Random(self.seed)
        always = [(IMAGE, TEXT), (TEXT, TEXT), (TEXT, kinds[-1])]
        return always + [(draw.choice(kinds), draw.choice(kinds)) for _ in range(5)]

    def batch(self, step: int, rank: int) -> dict[str, Tensor]:
        images, videos = self.steps[step][rank]
        return tiny_batch(self.family, images=[images], videos=[videos], seed=2 * step + rank)

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
        loss = sum(model(**case.batch(step, rank), use_cache=False).loss / 2 for rank in range(2))
        loss.backward()
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "parameters": {n: p.detach() for n, p in model.named_parameters()}}


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
        reports = engine.forward_backward(forward_step, iter([case.batch(step, dist.get_rank())]), 1)
        norms.append(float(engine.optimizer_step().grad_norm))
        loss = reports[0]["loss"].clone()
        dist.all_reduce(loss)
        losses.append(float(loss) / 2)
    full = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.model.named_parameters()}
    return {"losses": losses, "norms": norms, "parameters": full, "plan": "\n".join(plan.lines())}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{'frozen' if c.frozen else 'trained'}-{c.policy}")
def test_pain_17_batches_of_different_kinds_keep_ranks_in_step(ranks2: RankPool, tmp_path: Path, case: Case) -> None:
    save_tiny(case.family, tmp_path)
    expected = in_one_process(case)
    for found in ranks2.run(on_ranks, case, str(tmp_path), timeout=SECONDS):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        difference = torch.cat([(found["parameters"][n] - p).flatten() for n, p in expected["parameters"].items()])
        assert difference.norm() <= 1e-6 * torch.cat([p.flatten() for p in expected["parameters"].values()]).norm()
        assert not case.frozen or f": {case.policy}" in found["plan"]
