"""Finding where a value that is not finite comes from, by running the step's batches again under hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from mindspeed_mm.engine import Engine
from mindspeed_mm.engine.base import ForwardStep
from mindspeed_mm.engine.loss_result import read_loss
from mindspeed_mm.training.step_feed import TakenBatch, replay


@dataclass
class Finding:
    """What one rank saw.

    Attributes:
        micro_batch: index of its first micro-batch whose loss is not finite; None when all were finite.
        loss: of that micro-batch.
        module: the first module, in the order in which they end, whose output is not finite, and what about it; of
            that micro-batch, or of any when all losses are finite.
        keys: of that micro-batch that hold values that are not finite.
        gradient: index and name of the last parameter, the nearest to the loss, whose gradient is not finite.
        largest: absolute value in the gradients, where all are finite.
    """

    micro_batch: int | None = None
    loss: float | None = None
    module: str | None = None
    keys: tuple[str, ...] = ()
    gradient: tuple[int, str] | None = None
    largest: float = 0.0


def diagnose(
    engine: Engine, forward_step: ForwardStep, taken: list[TakenBatch], num_microbatches: int, group: dist.ProcessGroup
) -> list[Finding]:
    """Run the step again, forward and backward, with the random numbers it had; return every rank's finding.

    A collective. The weights must be those the step began with. Gradients are cleared before and after.
    """
    engine.optimizer.zero_grad(set_to_none=True)
    finding, index, suspect = Finding(), -1, None

    def watched(iterator: Iterator[Any] | None, model: nn.Module) -> tuple[Any, Callable[[Any], Any]]:
        nonlocal index, suspect
        index += 1
        if finding.micro_batch is None:
            suspect, finding.module = suspect or finding.module, None
        output, loss_func = forward_step(iterator, model)

        def read(value: Any) -> Any:
            result = loss_func(value)
            loss = float(read_loss(result, per_token_loss=False).loss.detach())
            if finding.micro_batch is None and not math.isfinite(loss):
                finding.micro_batch, finding.loss = index, loss
                finding.keys = _keys_not_finite(taken[index].batch) if index < len(taken) else ()
            return result

        return output, read

    listeners, engine.listeners = engine.listeners, []  # this is no step of the run
    try:
        with _name_first_output(engine.module, finding):
            engine.forward_backward(watched, replay(taken), num_microbatches)
    finally:
        engine.listeners = listeners
    if finding.micro_batch is None:
        finding.module = suspect or finding.module
        for index, (name, parameter) in enumerate(engine.module.named_parameters()):
            gradient = getattr(parameter, "main_grad", parameter.grad)  # where megatron-core reduces them
            if gradient is not None and not _all_finite(gradient):
                finding.gradient = (index, name)
            elif gradient is not None and (local := _local(gradient)).numel():
                finding.largest = max(finding.largest, float(local.abs().max()))
    engine.optimizer.zero_grad(set_to_none=True)
    findings: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(findings, finding, group=group)
    return findings


@contextmanager
def _name_first_output(root: nn.Module, finding: Finding) -> Iterator[None]:
    """Write the first module whose output is not finite into ``finding``. The host waits for each module."""

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if finding.module is not None or _all_finite(output):
                return
            parameters = module.named_parameters(recurse=False)
            broken = next((key for key, parameter in parameters if not _all_finite(parameter)), None)
            if broken is not None:
                why = f"its parameter '{broken}' is not finite"
            else:
                why = "its input is finite" if _all_finite((args, kwargs)) else "its input is not finite already"
            finding.module = f"{name or 'the model'} ({_class_of(module)}; {why})"

        return look

    hooks = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in root.named_modules(remove_duplicate=True)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _class_of(module: nn.Module) -> str:
    """Return the name of the user's class; ``fully_shard`` has put one of its own before it."""
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _all_finite(values: Any) -> bool:
    """Return whether all floating tensors in nested ``values`` hold finite numbers only."""
    for leaf in tree_leaves(dict(values) if isinstance(values, Mapping) else values):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(_local(leaf)).all():
            return False
    return True


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _keys_not_finite(batch: Any) -> tuple[str, ...]:
    if not isinstance(batch, Mapping):
        return () if _all_finite(batch) else ("batch",)
    return tuple(str(key) for key, value in batch.items() if not _all_finite(value))
