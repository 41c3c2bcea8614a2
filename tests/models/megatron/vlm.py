"""A ``VLMModel`` with the weights of a tiny Hugging Face model, and that model as the oracle of everything it returns.

All functions but :func:`oracle` run on the ranks of a pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.checkpoint.hf_boxes import load_hf_boxes
from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.distributed import parallel, state
from mindspeed_mm.distributed.parallel import ParallelSizes
from mindspeed_mm.models.megatron.layout import boxes, pieces
from mindspeed_mm.models.vlm_model import VLMModel
from tests.models import tiny

TRAINED: dict[str, Any] = {"vision_encoder": {"freeze": False}, "vision_projector": {"freeze": False}}


def start(**sizes: int) -> None:
    """Create the groups of a layout, and seed as a run does."""
    info = state.RankInfo.from_environment()
    state.initialize(None, info, backend="gloo", timeout=None, sizes=ParallelSizes(**sizes))
    from mindspeed_mm import accelerator

    accelerator.prepare_megatron_layers()
    parallel.seed_stages(1)


def build(folder: str | Path, vp_stage: int | None = None, **model_json: Any) -> VLMModel:
    """Return this rank's chunk with the weights of an HF folder; everything is trained unless model.json freezes it."""
    config = ModelConfig.model_validate({"init_from_hf_path": str(folder), "image_encoder": TRAINED, **model_json})
    first, last = parallel.chunk_is_first(vp_stage), parallel.chunk_is_last(vp_stage)
    model = VLMModel(config, first, last, vp_stage)
    load_hf_boxes(model.blueprint.model, folder, boxes(model))
    return model


def gradients(model: VLMModel) -> list[tuple[str, tuple[slice, ...], Tensor | None]]:
    """Return the gradients of this rank's boxes under HF names; None where nothing arrived."""
    parameters = dict(model.named_parameters())
    return [
        (piece.hf_name, piece.block, None if (grad := parameters[name].grad) is None else piece.view(grad))
        for name, parts in pieces(model).items()
        for piece in parts
    ]


def worst(found: list[tuple[str, tuple[slice, ...], Tensor | None]], right: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest deviation of gradients, relative to each whole tensor's maximum, and where it is."""
    # What is zero but for rounding, such as the bias of keys, has no digits to compare.
    floor = 1e-4 * max(g.abs().max() for g in right.values())
    largest = (0.0, "nothing")
    for name, block, grad in found:
        whole = right[name]
        mine = torch.zeros_like(whole[block]) if grad is None else grad
        off = (mine - whole[block]).abs().max() / max(whole.abs().max(), floor)
        largest = max(largest, (float(off), f"{name} {block}"))
    return largest


def oracle(family: str, batch: dict[str, Tensor], tie: bool = False) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Return the HF model's loss, logits and gradients, zeros where it has none."""
    model = tiny.tiny_model(family, tie)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return float(loss), logits.detach(), grads
