"""The FSDP2 road: PyTorch sharding, PyTorch optimizers, gradients reduced once for each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from mindspeed_mm import accelerator
from mindspeed_mm.distributed.grad_norm import clip_by_norm, scale_gradients, total_grad_norm
from mindspeed_mm.distributed.gradient_sets import GradientSets
from mindspeed_mm.distributed.phases import phase
from mindspeed_mm.distributed.state import host_group
from mindspeed_mm.engine.base import ForwardStep, Listener, Report, StepResult
from mindspeed_mm.engine.loss_result import LossResult, at_least_one, one_if_finite, read_forward, read_loss
from mindspeed_mm.errors import UserError
from mindspeed_mm.optimizer.skipping import step_if_finite


class FSDP2Engine:
    """Trains a module that :func:`mindspeed_mm.distributed.fsdp2.prepare_model` has sharded.

    The gradient is that of

        mean over ranks of mean over micro-batches of loss

    where the loss of a ``loss_func`` that returns ``(loss_sum, num_tokens, report)`` is ``loss_sum / num_tokens``, 0
    without tokens. Under ``per_token_loss`` it has to return those three, and the gradient is that of

        sum of loss_sum over ranks and micro-batches / sum of num_tokens over ranks and micro-batches.

    ``per_sample_loss`` is the same of ``(loss_sum, num_samples, report)``, so that samples weigh the same however many
    a micro-batch has; where ``loss_func`` returns a mean, it is the mean of means.

    Args:
        module: the sharded module.
        optimizer: over its parameters.
        group: the data-parallel ranks.
        clip_grad: largest gradient norm; 0 leaves the gradients alone.
        per_token_loss: divide by the target tokens of the global batch.
        per_sample_loss: divide by the samples of the global batch.
        replicated: parameters FSDP does not manage; this engine reduces their gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        group: dist.ProcessGroup,
        clip_grad: float,
        per_token_loss: bool = False,
        per_sample_loss: bool = False,
        replicated: Sequence[nn.Parameter] = (),
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.clip_grad = clip_grad
        self.per_token_loss = per_token_loss
        self.divides_globally = per_token_loss or per_sample_loss
        self.replicated = [p for p in replicated if p.requires_grad]
        self.listeners: list[Listener] = []
        self.parameters = [p for _, p in module.named_parameters() if p.requires_grad]
        self.fsdp_roots = _outermost(module)
        # What only the hosts know is agreed between hosts, so that they do not wait for their devices.
        ranks = dist.get_process_group_ranks(group)
        self._host_group = host_group("gradients", ranks) if self.world_size > 1 else None
        outside = {id(p) for p in self.replicated}
        named = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in outside}
        self._gradient_sets = GradientSets(module, named, self._host_group)

    @property
    def parameter_count(self) -> int:
        """The parameters of the whole model."""
        return sum(p.numel() for p in self.module.parameters())

    def seed(self, seed: int) -> None:
        """Start the random streams of training."""
        accelerator.seed_all(seed)

    def forward_backward(
        self,
        forward_step: ForwardStep,
        data_iterator: Iterator[Any] | None,
        num_microbatches: int,
        forward_only: bool = False,
    ) -> list[Report]:
        """Run the micro-batches; after the last one every gradient is reduced over the ranks."""
        reports: list[Report] = []
        counts: list[Tensor] = []
        for index in range(num_microbatches):
            if not forward_only:
                self._reduce_after_this(index == num_microbatches - 1)
            with phase("forward"):
                result = self._forward(forward_step, data_iterator)
            if not forward_only:
                loss = self._to_optimise(result, num_microbatches)
                if self.divides_globally:  # a mean counts as one
                    counts.append(torch.ones_like(loss) if result.num_tokens is None else result.num_tokens.detach())
                for listener in self.listeners:
                    listener.loss(loss, result.num_tokens)
                self._gradient_sets.watch(loss, last=index == num_microbatches - 1)
                with phase("backward"):
                    loss.backward(one_if_finite(loss))
            reports.append(result.report)
        if not forward_only:
            self._reduce_replicated()
            self._check_gradients()
            factor = self._divide_by_all(counts) if self.divides_globally else 1.0
            for listener in self.listeners:
                listener.gradients_reduced(factor)
        return reports

    def optimizer_step(self) -> StepResult:
        """Clip, update the weights unless the gradient is not finite, and clear the gradients."""
        with phase("optimizer"):
            norm = total_grad_norm(self.parameters)
            if self.clip_grad > 0:
                clip_by_norm(self.parameters, norm, self.clip_grad)
            for listener in self.listeners:
                listener.gradients_clipped(norm)
            step_if_finite(self.optimizer, norm)
            for listener in self.listeners:
                listener.updated()
            self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm)

    def _forward(self, forward_step: ForwardStep, data_iterator: Iterator[Any] | None) -> LossResult:
        output, loss_func = read_forward(forward_step(data_iterator, self.module))
        return read_loss(loss_func(output), per_token_loss=self.divides_globally)

    def _to_optimise(self, result: LossResult, num_microbatches: int) -> Tensor:
        """Scale a micro-batch's loss so that the reduced gradient is that of the class's formula."""
        if not result.loss.requires_grad:
            raise UserError(
                "loss_func returned a loss without a gradient: it depends on no trainable parameter. "
                "Return the model's output as it is, not detached, and not computed under torch.no_grad()."
            )
        if result.num_tokens is None and self.per_token_loss:
            raise UserError(
                "--calculate-per-token-loss: loss_func returned a mean. It must return "
                "'(loss_sum, num_tokens, report)', which is divided by the tokens of the global batch."
            )
        if self.divides_globally:
            return result.loss  # divided by the global number once that is known
        return result.mean / (num_microbatches * self.world_size)  # FSDP sums over the ranks

    def _reduce_after_this(self, last: bool) -> None:
        for root in self.fsdp_roots:
            root.set_requires_gradient_sync(last)
            root.set_is_last_backward(last)

    def _reduce_replicated(self) -> None:
        """Sum the gradients FSDP does not manage, as it does its own.

        A parameter that took no part on any rank keeps no gradient; one that took part on some gets zeros on
        the others, so that all ranks make the same update.
        """
        if not self.replicated:
            return
        took_part = torch.tensor([p.grad is not None for p in self.replicated], dtype=torch.int32)
        if self._host_group is not None:
            dist.all_reduce(took_part, group=self._host_group)
        for parameter, count in zip(self.replicated, took_part.tolist(), strict=True):
            if not count:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.group)

    def _check_gradients(self) -> None:
        if not self._gradient_sets.arrived() and not any(p.grad is not None for p in self.replicated):
            raise UserError(
                "the loss has a gradient, but no parameter got one: FSDP2 finds the tensors that a model returns in "
                "tuples, lists, dicts and Hugging Face's outputs. Let forward return one of these."
            )

    def _divide_by_all(self, counts: list[Tensor]) -> Tensor:
        """Return what the gradients were multiplied with."""
        # One dtype on all ranks: a number may be whole on one and a sum of weights on another.
        total = torch.stack(counts).sum().to(torch.promote_types(self.parameters[0].dtype, torch.float32))
        dist.all_reduce(total, group=self.group)
        factor = 1 / at_least_one(total)
        scale_gradients(self.parameters, factor)
        return factor


def _outermost(module: nn.Module) -> list[FSDPModule]:
    """Return the FSDP units with no FSDP unit around them: their settings reach all others."""
    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in _outermost(child)]
