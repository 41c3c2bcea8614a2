"""The Megatron road: megatron-core's pipeline schedules and gradient reduction, our loss, optimizer and clipping."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mindspeed_mm import accelerator
from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.grad_norm import clip_by_norm, scale_gradients
from mindspeed_mm.distributed.main_parameters import MainParameters, unwrap
from mindspeed_mm.distributed.phases import phase
from mindspeed_mm.distributed.pipeline_messages import exchange_in_turn
from mindspeed_mm.engine.base import ForwardStep, Listener, Report, StepResult
from mindspeed_mm.engine.loss_result import LossResult, at_least_one, one_if_finite, read_forward, read_loss
from mindspeed_mm.engine.pipeline_reports import add_router_losses, share_reports
from mindspeed_mm.errors import UserError
from mindspeed_mm.optimizer.skipping import step_if_finite


class MegatronEngine:
    """Trains pipeline chunks that megatron-core's DDP wraps.

    The gradient is that of the same formulas as :class:`~mindspeed_mm.engine.fsdp2.FSDP2Engine`'s, with the data- and
    context-parallel ranks for its ranks. Under context parallelism a rank's loss is that of its part of the
    sequences: a ``loss_sum`` and a ``num_tokens`` are added up over the ranks that share them; a mean has to be scaled
    by the model so that the mean over these ranks is the mean over the sequence.

    Args:
        chunks: of this stage, in order.
        mains: their main parameters, which ``optimizer`` is over.
        optimizer: of torch.
        group_names: of the parameters of each of its groups, those of other stages included; for checkpoints.
        parameter_count: of the whole model; default this rank's.
        clip_grad: largest gradient norm; 0 leaves the gradients alone.
        sequence_length: of the hidden states, where they all have one length.
        micro_batch_size: samples of a micro-batch.
        per_token_loss: divide by the target tokens of the global batch.
        per_sample_loss: divide by the samples of the global batch. Under either of them, the chunks must have been
            built with ``calculate_per_token_loss`` in their configuration: megatron-core then only adds gradients up.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        mains: MainParameters,
        optimizer: Optimizer,
        *,
        group_names: Sequence[Sequence[str]] = (),
        parameter_count: int | None = None,
        clip_grad: float,
        sequence_length: int,
        micro_batch_size: int,
        per_token_loss: bool = False,
        per_sample_loss: bool = False,
    ) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.module = nn.ModuleList(chunks)
        self.mains = mains
        self.optimizer = optimizer
        self.listeners: list[Listener] = []
        self.group_names = group_names or [[main.name for main in mains.all]]
        own = sum(p.numel() for p in self.module.parameters())
        self.parameter_count = own if parameter_count is None else parameter_count
        self.clip_grad = clip_grad
        self.sequence_length = sequence_length
        self.micro_batch_size = micro_batch_size
        self.per_token_loss = per_token_loss
        self.divides_globally = per_token_loss or per_sample_loss
        self.gathers_late = bool(chunks[0].ddp_config.overlap_param_gather)
        self._schedule = get_forward_backward_func()
        self._context = parallel.sizes().context
        self._replicas = dist.get_world_size(parallel.replica_group())
        self._connect()

    def seed(self, seed: int) -> None:
        """Start the random streams of training; ranks that split a layer draw alike outside of what they split."""
        parallel.seed_stages(seed)

    def forward_backward(
        self,
        forward_step: ForwardStep,
        data_iterator: Iterator[Any] | None,
        num_microbatches: int,
        forward_only: bool = False,
    ) -> list[Report]:
        """Run the micro-batches through the pipeline, then reduce the gradient. All stages return the reports."""
        chunks: list[Any] = list(self.module)
        counts: list[Tensor] = []
        if not forward_only:
            for chunk in chunks:
                chunk.zero_grad_buffer()

        def step(iterator: Iterator[Any] | None, model: nn.Module) -> tuple[Any, Callable[[Any], Any]]:
            output, loss_func = read_forward(forward_step(iterator, model))

            def read(value: Any) -> tuple[Tensor, Report]:
                result = read_loss(loss_func(value), per_token_loss=self.divides_globally)
                if forward_only:
                    return result.loss.detach().clone(), result.report
                loss = self._to_optimise(result, num_microbatches, counts)
                for listener in self.listeners:  # with what the schedule does to it
                    listener.loss(loss.detach() * (self._context / num_microbatches), result.num_tokens)
                return loss, result.report

            return output, read

        routers = [one for chunk in chunks if (one := getattr(unwrap(chunk), "router_losses", None)) is not None]
        for losses in routers:  # their gradient passes by the schedule's factors, see `_to_optimise`
            losses.start(1.0 if self.divides_globally else self._context / num_microbatches)
        with phase("forward and backward"):
            reports = self._schedule(
                forward_step_func=step,
                data_iterator=_for_each(len(chunks), data_iterator),
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=num_microbatches,
                seq_length=self.sequence_length,
                micro_batch_size=self.micro_batch_size,
                forward_only=forward_only,
            )
        if not forward_only:
            self.mains.take_gradients()
            for listener in self.listeners:
                for share in (value for losses in routers for value in losses.optimised()):
                    listener.loss(share / self._context, None)
            # DDP has divided by the ranks, or nothing has been divided yet.
            factor = self._divide_by_all(counts) if self.divides_globally else 1.0 / self._replicas
            for listener in self.listeners:
                listener.gradients_reduced(factor)
        reports = share_reports(reports)
        return add_router_losses(reports, routers) if routers else reports

    def optimizer_step(self) -> StepResult:
        """Clip, update the weights unless the gradient is not finite, and clear the gradients."""
        with phase("optimizer"):
            norm = self.mains.gradient_norm()
            if self.clip_grad > 0:
                clip_by_norm(self.mains.values, norm, self.clip_grad)
            for listener in self.listeners:
                listener.gradients_clipped(norm)
            step_if_finite(self.optimizer, norm)
            for listener in self.listeners:
                listener.updated()
            self.mains.publish(wait=not self.gathers_late)
            self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm)

    def _connect(self) -> None:
        """Tell megatron-core's schedule how the gradients of these chunks are reduced."""
        from megatron.core.distributed import finalize_model_grads

        def finalize(chunks: Any, num_tokens: Tensor | None = None, **groups: Any) -> None:
            finalize_model_grads(chunks, None, **groups)  # the division by tokens is ours

        chunks: list[Any] = list(self.module)
        if len(chunks) > 1:
            exchange_in_turn()
        for chunk in chunks:
            config = chunk.config
            config.finalize_model_grads_func = finalize
            config.grad_scale_func = None
            if config.calculate_per_token_loss != self.divides_globally:
                raise UserError(
                    f"model_provider: calculate_per_token_loss of the TransformerConfig is "
                    f"{config.calculate_per_token_loss}; it has to be {self.divides_globally} here, which is whether "
                    f"--calculate-per-token-loss or --calculate-per-sample-loss is set."
                )
            if chunk.ddp_config.overlap_grad_reduce:
                no_sync = [one.no_sync for one in chunks]
                config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
            if config.overlap_p2p_comm:
                # Sends that are still running read the memory that this would free.
                config.deallocate_pipeline_outputs = False

    def _to_optimise(self, result: LossResult, num_microbatches: int, counts: list[Tensor]) -> Tensor:
        """Scale a micro-batch's loss so that the reduced gradient is that of the class's formula.

        The schedule multiplies by the context-parallel size and divides by the number of micro-batches. DDP divides
        by data-parallel times context-parallel ranks, except where the gradient is divided by what `counts` collects.
        """
        loss, tokens = result.loss, result.num_tokens
        if not loss.requires_grad:
            raise UserError(
                "loss_func returned a loss without a gradient: it depends on no trainable parameter. "
                "Return the model's output as it is, not detached, and not computed under torch.no_grad()."
            )
        loss = loss * one_if_finite(loss)
        if self.divides_globally:
            if tokens is None and self.per_token_loss:
                raise UserError(
                    "--calculate-per-token-loss: loss_func returned a mean. It must return "
                    "'(loss_sum, num_tokens, report)', which is divided by the tokens of the global batch."
                )
            counts.append(torch.ones_like(loss.detach()) if tokens is None else tokens)  # then the mean of means
            return loss * (num_microbatches / self._context)
        if tokens is None:
            return loss / self._context
        if self._context > 1:
            from megatron.core import parallel_state

            tokens = tokens.clone()
            dist.all_reduce(tokens, group=parallel_state.get_context_parallel_group())
        return loss / at_least_one(tokens)

    def _divide_by_all(self, counts: list[Tensor]) -> Tensor:
        """Return what the gradients were multiplied with."""
        total = torch.zeros((), dtype=torch.float32, device=accelerator.device())
        if counts:
            total += torch.stack(counts).sum()
        dist.all_reduce(total, group=parallel.replica_group())
        parallel.broadcast_from_last_stage(total)
        factor = 1 / at_least_one(total)
        scale_gradients(self.mains.values, factor)
        return factor


def _for_each(count: int, iterator: Iterator[Any] | None) -> Any:
    """Let every chunk of this stage see every micro-batch, each in a copy of its own."""
    if count == 1 or iterator is None:
        return iterator if count == 1 else [None] * count
    return [map(_own, one) for one in itertools.tee(iterator, count)]


def _own(batch: Any) -> Any:
    return copy(batch) if isinstance(batch, Mapping) else batch
