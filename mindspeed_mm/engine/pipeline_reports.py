"""What all pipeline stages report of a step: what the last one says, and what the experts' routers of each add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm import accelerator
from mindspeed_mm.distributed import parallel
from mindspeed_mm.engine.base import Report


def share_reports(reports: Sequence[Report]) -> list[Report]:
    """Return the reports of the last stage on all stages of this pipeline.

    Names travel between the hosts, values between the devices: no host waits for its device.

    Args:
        reports: of the micro-batches; empty but on the last stage.
    """
    if parallel.sizes().pipeline == 1:
        return list(reports)
    from megatron.core import parallel_state

    group, source = parallel_state.get_pipeline_model_parallel_group(), parallel.last_stage_rank()
    # For each report, its keys and whether the value is a (numerator, denominator) pair.
    form: list[Any] = [[[(key, isinstance(v, (tuple, list))) for key, v in report.items()] for report in reports]]
    dist.broadcast_object_list(form, src=source, group=group, device=torch.device("cpu"))
    if not (size := sum(1 + pair for keys in form[0] for _, pair in keys)):
        return [{} for _ in form[0]]
    dtype = torch.float64 if accelerator.has_float64() else torch.float32
    values = torch.empty(size, dtype=dtype, device=accelerator.device())
    if parallel.is_last_stage():
        values.copy_(torch.stack([_scalar(part, values) for report in reports for part in _parts(report)]))
    dist.broadcast(values, src=source, group=group)
    numbers = iter(values.unbind())
    return [{key: (next(numbers), next(numbers)) if pair else next(numbers) for key, pair in keys} for keys in form[0]]


def add_router_losses(reports: Sequence[Report], routers: Sequence[Any]) -> list[Report]:
    """Return the reports with the routers' loss of each micro-batch: as ``aux_loss``, and as part of ``loss``.

    Both are averaged alike: a ``loss`` that is a pair gives its denominator to the other.

    Args:
        reports: of the micro-batches, the same on all stages.
        routers: ``RouterLosses`` of this stage's chunks.
    """
    values = torch.stack([torch.stack(one.take()) for one in routers]).sum(0)
    if parallel.sizes().pipeline > 1:
        from megatron.core import parallel_state

        dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())
    coefficient = routers[0].coefficient
    found = []
    for report, value in zip(reports, values, strict=True):
        loss, aux = report.get("loss"), {"aux_loss": value}
        if isinstance(loss, (tuple, list)):
            aux = {"loss": (loss[0] + coefficient * value * loss[1], loss[1]), "aux_loss": (value * loss[1], loss[1])}
        elif loss is not None:
            aux["loss"] = loss + coefficient * value
        found.append({**report, **aux})
    return found


def _parts(report: Report) -> list[Any]:
    return [part for v in report.values() for part in (v if isinstance(v, (tuple, list)) else (v,))]


def _scalar(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)
