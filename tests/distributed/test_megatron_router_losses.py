"""The load-balancing loss of the experts in every kind of layout.

The oracle is Hugging Face's model: its own loss for `router_aux_loss_coef`, and for `moe_aux_loss_coeff` Megatron-LM's
formula on the logits of its routers. Rows are padded, micro-batches have different lengths and numbers of targets.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.vlm_model import VLMModel
from tests.distributed.megatron_step import Layout, check, run
from tests.distributed.test_megatron_parity import ALL_GATHER, EXPERTS, RECOMPUTE, RING, SEQUENCE, STAGES, ULYSSES
from tests.models import tiny
from tests.models.megatron import vlm
from tests.ranks import RankPool

COEFFICIENT = 0.5
LAYERS = 4
MEGATRON = {"text_decoder": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": COEFFICIENT}}
HUGGING_FACE = {"loss_cfg": {"router_aux_loss_coef": COEFFICIENT}}
PP, VPP = {"pipeline": 2}, {"pipeline": 2, "virtual": 2}
CASES: dict[str, tuple[dict[str, Any], str, Layout]] = {
    "1": (MEGATRON, "per_sample_loss", Layout(1)),
    "1-hf-recompute": (HUGGING_FACE, "per_token_loss", Layout(1, config=RECOMPUTE)),
    "dp2-sharded": (MEGATRON, "default", Layout(sharded=True)),
    "dp2-hf": (HUGGING_FACE, "per_sample_loss", Layout()),
    "cp2-ring": (MEGATRON, "per_token_loss", Layout(sizes={"context": 2}, config=RING)),
    "cp2-recompute": (MEGATRON, "default", Layout(sizes={"context": 2}, config={**ULYSSES, **RECOMPUTE}, quick=True)),
    "cp2-hf": (HUGGING_FACE, "per_token_loss", Layout(sizes={"context": 2}, config=ULYSSES, sharded=True)),
    "cp2-samples": (MEGATRON, "per_sample_loss", Layout(sizes={"context": 2}, config=RING, quick=True)),
    "tp2-sp-ep2": (
        MEGATRON,
        "per_sample_loss",
        Layout(sizes={"tensor": 2, "expert": 2, "expert_tensor": 1}, config=SEQUENCE),
    ),
    "tp2-sp-ep2-hf": (
        HUGGING_FACE,
        "default",
        Layout(sizes={"tensor": 2, "expert": 2, "expert_tensor": 1}, config={**SEQUENCE, **ALL_GATHER}, quick=True),
    ),
    "pp2-recompute": (MEGATRON, "per_token_loss", Layout(sizes=PP, config={**STAGES, **RECOMPUTE}, quick=True)),
    "vpp": (MEGATRON, "default", Layout(sizes=VPP, config=STAGES)),
    "cp2-pp2": (MEGATRON, "per_sample_loss", Layout(4, {"context": 2, **PP}, {**RING, **STAGES})),
    "cp2-dp2-sharded": (MEGATRON, "default", Layout(4, {"context": 2}, RING, sharded=True)),
}


@cache
def micro_batches() -> list[dict[str, Tensor]]:
    found = []
    for index in range(4):
        batch = tiny.tiny_batch(EXPERTS, [1, index % 2], length=12 + index, seed=index)
        batch["labels"][:, : 4 + index] = -100
        for key, fill in (("attention_mask", 0), ("input_ids", 0), ("labels", -100)):
            batch[key][1, -3:] = fill
        found.append(batch)
    return found


@cache
def oracle(formula: str, loss_type: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the loss of the step, the router's part of it without coefficient, and the gradient."""
    model = tiny.tiny_model(EXPERTS, layers=LAYERS)
    shares = {"default": lambda t: 1, "per_sample_loss": len, "per_token_loss": lambda t: int((t >= 0).sum())}
    weights = [shares[loss_type](batch["labels"][:, 1:]) for batch in micro_batches()]
    reports = {"loss": 0.0, "aux_loss": 0.0}
    for batch, weight in zip(micro_batches(), weights, strict=True):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        output = model(**inputs, use_cache=False, output_router_logits=True)
        targets = batch["labels"][:, 1:]
        losses = F.cross_entropy(output.logits[:, :-1].mT, targets, reduction="none")
        if loss_type == "per_sample_loss":
            loss = (losses.sum(1) / (targets >= 0).sum(1)).mean()
        else:
            loss = losses.sum() / (targets >= 0).sum()
        real = batch["attention_mask"].flatten().bool()
        aux = output.aux_loss if formula == "hf" else sum(balance(logits[real]) for logits in output.router_logits)
        share = weight / sum(weights)
        (share * (loss + COEFFICIENT * aux)).backward()
        reports["loss"] += share * float((loss + COEFFICIENT * aux).detach())
        reports["aux_loss"] += share * float(aux.detach())
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return reports, gradients


def balance(logits: Tensor) -> Tensor:
    """Megatron-LM's formula: experts times the sum of an expert's share of the choices and its mean probability."""
    probabilities = torch.softmax(logits, -1)
    chosen = F.one_hot(probabilities.topk(2).indices, logits.shape[1]).sum(1).float()
    return logits.shape[1] * (chosen.mean(0) / 2 * probabilities.mean(0)).sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(EXPERTS, tmp_path_factory.mktemp("hf"), layers=LAYERS)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name", [name if row[2].quick else pytest.param(name, marks=pytest.mark.slow) for name, row in CASES.items()]
)
def test_loss_and_gradient(folder: Path, request: pytest.FixtureRequest, name: str) -> None:
    model_json, loss_type, layout = CASES[name]
    pool: RankPool = request.getfixturevalue(f"ranks{layout.ranks}")
    answers = pool.run(run, str(folder), layout, micro_batches(), loss_type, **model_json)
    check(answers, *oracle("hf" if model_json is HUGGING_FACE else "megatron", loss_type))


def refused(folder: str, sizes: dict[str, int], model_json: dict[str, Any]) -> str:
    vlm.start(**sizes)
    config = ModelConfig.model_validate({"init_from_hf_path": folder, **model_json})
    try:
        VLMModel(config, True, True)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("sizes", "model_json", "shown"),
    [
        (PP, HUGGING_FACE, ["loss_cfg.router_aux_loss_coef", "--pipeline-model-parallel-size 2", "moe_aux_loss_coeff"]),
        ({}, {**HUGGING_FACE, **MEGATRON}, ["router_aux_loss_coef", "moe_aux_loss_coeff", "remove one"]),
        ({}, {"text_decoder": {"moe_router_load_balancing_type": "sinkhorn"}}, ["'sinkhorn'", "'aux_loss' or 'none'"]),
        (
            PP,
            {**MEGATRON, "megatron": {"recompute_granularity": "selective", "moe_layer_recompute": True}},
            ["moe_aux_loss_coeff", "recompute the experts alone"],
        ),
        (
            {"context": 2},
            {"megatron": {"moe_z_loss_coeff": 0.1, **ULYSSES}},
            ["moe_z_loss_coeff", "context parallelism"],
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(
    folder: Path, ranks2: RankPool, sizes: dict[str, int], model_json: dict[str, Any], shown: list[str]
) -> None:
    for told in ranks2.run(refused, str(folder), sizes, model_json):
        assert all(part in told for part in shown), told
