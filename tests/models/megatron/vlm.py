"""A ``VLMModel`` with the weights of a tiny Hugging Face model, and that model as the oracle of everything it returns.

All functions but :func:`oracle` run on the ranks of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindspeed_mm.checkpoint.hf_boxes import load_hf_boxes
from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.distributed import chunks, parallel, state
from mindspeed_mm.distributed.main_parameters import MainParameters
from mindspeed_mm.distributed.parallel import ParallelSizes
from mindspeed_mm.engine.megatron import MegatronEngine
from mindspeed_mm.models.megatron.layout import Piece, boxes, pieces
from mindspeed_mm.models.vlm_model import VLMModel
from mindspeed_mm.training.megatron_setup import freeze_parts
from tests.models import tiny

__all__ = ["Piece", "pieces"]

TRAINED: dict[str, Any] = {"vision_encoder": {"freeze": False}, "vision_projector": {"freeze": False}}


def start(**sizes: int) -> None:
    """Create the groups of a layout, and seed as a run does."""
    info = state.RankInfo.from_environment()
    state.initialize(None, info, backend="gloo", timeout=None, sizes=ParallelSizes(**sizes))
    from mindspeed_mm import accelerator

    accelerator.prepare_megatron_layers()
    parallel.seed_stages(1)


def build(folder: str | Path, **model_json: Any) -> list[Any]:
    """Return this rank's chunks with the weights of an HF folder; all is trained unless model.json freezes it."""
    config = ModelConfig.model_validate({"init_from_hf_path": str(folder), "image_encoder": TRAINED, **model_json})
    built: list[Any] = chunks.build_chunks(lambda first, last, index: VLMModel(config, first, last, index))
    load_hf_boxes(built[0].blueprint.model, folder, boxes(*built))
    return built


def train_step(
    folder: str, batches: list[dict[str, Tensor]], sizes: dict[str, int], freeze: Sequence[str] = (), **model_json: Any
) -> dict[str, Any]:
    """Run forward and backward of one step in a layout, with the product's engine; ``freeze`` is that of model.json.

    Returns:
        ``loss``, the mean over micro-batches; ``norm`` of the gradient; ``gradients``, see :func:`gradients`.
    """
    start(**sizes)
    built = build(folder, **model_json)
    freeze_parts(built, freeze)
    wrapped = chunks.reduce_gradients(built, sharded=False)
    mains = MainParameters(wrapped, sharded=False)
    length = batches[0]["input_ids"].shape[1]
    optimizer = torch.optim.SGD([{"params": mains.values}])  # a stage may have none
    engine = MegatronEngine(wrapped, mains, optimizer, clip_grad=0.0, sequence_length=length, micro_batch_size=2)

    def forward_step(iterator: Any, model: Any) -> tuple[Any, Any]:
        return model(**next(iterator)), lambda output: (
            output["loss_dict"]["loss"],
            {"loss": output["loss_dict"]["loss"].detach().clone()},
        )

    reports = engine.forward_backward(forward_step, iter(batches), len(batches))
    for parameter in (p for chunk in built for p in chunk.parameters() if p.requires_grad):
        parameter.grad = parameter.main_grad
    found = [box for chunk in built for box in gradients(chunk)]
    return {
        "loss": float(sum(report["loss"] for report in reports)) / len(batches),
        "norm": float(mains.gradient_norm()),
        "gradients": found,
    }


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


def oracle(
    family: str, batch: dict[str, Tensor], tie: bool = False, **text: Any
) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Return the HF model's loss, logits and gradients, zeros where it has none; ``text`` as for ``tiny_model``."""
    model = tiny.tiny_model(family, tie, **text)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return float(loss.detach()), logits.detach(), grads
