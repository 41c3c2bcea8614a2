"""One step of a tiny vision language model on the Megatron road, to be compared with a gradient under HF names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.distributed import chunks, parallel
from mindspeed_mm.distributed.main_parameters import MainParameters
from mindspeed_mm.engine.megatron import MegatronEngine
from tests.distributed.test_megatron_parity import _boxes, forward_step
from tests.models.megatron import vlm

LIMIT = 1e-5


@dataclass(frozen=True)
class Layout:
    """``sizes`` of ``ParallelSizes``, ``config`` fields of ``TransformerConfig``."""

    ranks: int = 2
    sizes: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False
    quick: bool = False


def run(
    folder: str,
    layout: Layout,
    batches: list[dict[str, Tensor]],
    loss_type: str,
    means: bool = False,
    **model_json: Any,
) -> dict[str, Any]:
    """Run one step on the ranks of a pool.

    Args:
        folder: of the Hugging Face model.
        layout: of this step.
        batches: of all data-parallel ranks, dealt out in turn.
        loss_type: of ``loss_cfg``.
        means: let ``loss_func`` return the mean of a micro-batch under any loss.
        **model_json: other keys.

    Returns:
        ``reports``, each number over all ranks; ``norm``; ``gradients``, this rank's boxes, NaN where another's are.
    """
    vlm.start(**layout.sizes)
    config = {**layout.config, **model_json.pop("megatron", {})}
    loss_cfg = {"loss_type": loss_type, **model_json.pop("loss_cfg", {})}
    built = vlm.build(folder, megatron=config, loss_cfg=loss_cfg, **model_json)
    wrapped = chunks.reduce_gradients(built, sharded=layout.sharded)
    mains = MainParameters(wrapped, sharded=layout.sharded)
    engine = MegatronEngine(
        wrapped,
        mains,
        torch.optim.SGD(mains.values),
        clip_grad=0.0,
        sequence_length=1,
        micro_batch_size=2,
        per_token_loss=loss_type == "per_token_loss",
        per_sample_loss=loss_type == "per_sample_loss",
    )
    readers = parallel.loader_group()
    mine = batches[dist.get_rank(readers) :: dist.get_world_size(readers)]
    reports = engine.forward_backward(_counting(means), iter(mine), len(mine))
    found = {
        "norm": float(mains.gradient_norm()),
        "gradients": list(_boxes(engine, gradients=True)),
        "reports": _merged(reports),
    }
    silent = engine.forward_backward(_counting(means), iter(mine), len(mine), forward_only=True)
    found["evaluated"] = _merged(silent)
    return found


def _counting(means: bool) -> Any:
    """Return a ``forward_step`` that returns what that of ``pretrain_vlm.py`` does."""

    def step(iterator: Iterator[Any], model: Any) -> tuple[Any, Any]:
        def loss_func(output: Any) -> Any:
            losses = output["loss_dict"]
            loss, count = losses["loss"], losses.get("token_nums")
            if "sample_nums" in losses:
                count = losses["sample_nums"]
                loss = loss * count
            if means and count is not None:
                return loss / count, {"loss": (loss / count).detach()}
            if count is None:
                return loss, {"loss": loss.detach().clone()}
            return loss, count, {"loss": (loss.detach(), count)}

        return forward_step(iterator, model)[0], loss_func

    return step


def _merged(reports: list[dict[str, Any]]) -> dict[str, float]:
    merged = {}
    for key in reports[0]:
        values = [report[key] if isinstance(report[key], tuple) else (report[key], 1) for report in reports]
        total = torch.tensor([[float(a), float(b)] for a, b in values]).double().sum(0)
        dist.all_reduce(total, group=parallel.replica_group())
        merged[key] = float(total[0] / total[1])
    return merged


def check(answers: list[dict[str, Any]], reports: dict[str, float], right: dict[str, Tensor]) -> None:
    """Compare every rank's step with what is right, and see that all of the gradient was there."""
    norm = float(torch.nn.utils.get_total_norm(list(right.values())))
    covered = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in right.items()}
    # What is zero but for rounding has no digits to compare.
    floor = 1e-4 * max(float(value.abs().max()) for value in right.values())
    for rank, answer in enumerate(answers):
        assert abs(answer["norm"] - norm) <= LIMIT * norm, (rank, answer["norm"], norm)
        for found in (answer["reports"], answer["evaluated"]):
            assert found.keys() == reports.keys()
            for key, value in reports.items():
                assert abs(found[key] - value) <= LIMIT * value, (rank, key, found[key], value)
        for name, block, found in answer["gradients"]:
            whole, known = right[name], ~found.isnan()
            off = (found - whole[block]).abs().nan_to_num().max() / max(float(whole.abs().max()), floor)
            assert off <= LIMIT, (rank, name, float(off))
            covered[name][block] |= known
    assert all(part.all() for part in covered.values())
