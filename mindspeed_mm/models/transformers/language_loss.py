"""The training loss of a Hugging Face language model, as ``loss_cfg`` of model.json describes it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm import accelerator
from mindspeed_mm.distributed.state import print_rank_0
from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.losses import (
    IGNORE,
    REDUCTIONS,
    chunked,
    cross_entropy_sums,
    head_returns_loss_sums,
    linear_cross_entropy,
    logits_bytes,
    shift_labels,
    spread_over_samples,
    sum_by_sample,
)
from mindspeed_mm.models.common.lookup import lookup

_COMPUTE_MODES = ("auto", "default", "chunk")


class LanguageModelLoss:
    """Runs a model on a micro-batch and returns the loss of it.

    ``compute_mode`` decides whether the logits of the micro-batch are held whole (``default``), or never
    (``chunk``). ``auto`` chooses by the shape of each micro-batch: chunks where its logits would take more than
    :data:`~mindspeed_mm.losses.chunked.LARGE_LOGITS` in fp32. That concerns one rank alone, because either way
    the ranks run the same collectives.
    """

    def __init__(self, config: Any) -> None:
        """Read ``loss_cfg``.

        Raises:
            UserError: a key has a value that is not known.
        """
        self._type = _choice(config, "loss_cfg.loss_type", "default", REDUCTIONS)
        self._mode = _choice(config, "loss_cfg.compute_mode", "auto", _COMPUTE_MODES)
        self._chunk_size = int(lookup(config, "loss_cfg.chunk_size", 1024))
        self._aux_coefficient = float(lookup(config, "loss_cfg.router_aux_loss_coef", 0.0))
        self._fused = accelerator.fused_linear_cross_entropy()
        if self._type == "per_sample_loss":  # a library's kernel divides no token by a number of its own
            self._fused = None
        self._kernel = self._fused or partial(linear_cross_entropy, chunk_size=self._chunk_size)
        self._obstacle: str | None = None
        self._vocabulary = 0
        self._told = False

    def attach(self, model: Any) -> None:
        """Find out, before the model is sharded, whether chunks are possible.

        Raises:
            UserError: ``compute_mode`` is ``chunk`` and they are not.
        """
        head = model.get_output_embeddings()
        self._vocabulary = 0 if head is None else len(next(head.parameters()))
        self._obstacle = None if self._mode == "default" else _what_needs_logits(model)
        if self._obstacle and self._mode == "chunk":
            raise UserError(_cannot_chunk(self._obstacle))

    def __call__(
        self, model: Any, inputs: dict[str, Any], labels: Tensor, cu_seqlens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the loss of one micro-batch.

        Args:
            model: the Hugging Face model.
            inputs: what it is called with.
            labels: (B, S), the token ids that are targets and negative elsewhere.
            cu_seqlens: (N + 1,), where the N samples of a packed row lie; None: each row is one.

        Returns:
            What :meth:`mindspeed_mm.models.transformers_model.TransformersModel.forward` describes.
        """
        if self._aux_coefficient > 0:
            inputs = {**inputs, "output_router_logits": True}
        targets = shift_labels(labels)
        mask = targets != IGNORE
        counts = sum_by_sample(mask, cu_seqlens)
        outputs, loss = self._run(model, inputs, targets, counts, cu_seqlens)
        result = {"loss": loss, "loss_mask": mask}
        if self._type == "per_token_loss":
            result["token_nums"] = counts.sum()
        if self._type == "per_sample_loss":
            result["sample_nums"] = counts.new_full((), len(counts))
        if self._aux_coefficient > 0:
            self._add_router_loss(model, result, getattr(outputs, "aux_loss", None))
        return result

    def _run(
        self, model: Any, inputs: dict[str, Any], targets: Tensor, counts: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Any, Tensor]:
        """Return the model's outputs and the reduced cross entropy."""
        reduce = REDUCTIONS[self._type]
        if not self._in_chunks(model, targets):
            outputs = model(**inputs, use_cache=False)
            return outputs, reduce(cross_entropy_sums(outputs.logits, targets, cu_seqlens), counts)
        divisors = None
        if self._type == "per_sample_loss":
            divisors = spread_over_samples(counts.clamp(min=1), targets.shape[1], cu_seqlens)
        lm_head = model.get_output_embeddings()
        with head_returns_loss_sums(lm_head, targets, self._chunk_size, self._kernel, divisors) as head:
            outputs = model(**inputs, use_cache=False)
        if outputs.logits is not head.sums:
            raise UserError(_cannot_chunk(f"{type(model).__name__} or output_dtype of the fsdp2 yaml changes it"))
        sums: Tensor = outputs.logits
        return outputs, reduce(sums, counts) if divisors is None else sums.sum() / len(counts)

    def _in_chunks(self, model: Any, targets: Tensor) -> bool:
        if self._mode != "auto":
            return self._mode == "chunk"
        size = logits_bytes(targets.numel(), self._vocabulary)
        if size <= chunked.LARGE_LOGITS:
            return False
        if not self._told:
            self._told = True
            how = "by a fused kernel" if self._fused else f"{self._chunk_size} tokens at a time"
            print_rank_0(
                f"loss: the logits of a micro-batch, {targets.numel()} tokens x {self._vocabulary} words, would take "
                f"{size / 2**30:.1f} GiB in fp32. "
                + (f"They are held whole: {self._obstacle}." if self._obstacle else f"They are computed {how}.")
                + " (model.json: loss_cfg.compute_mode: auto)"
            )
        return self._obstacle is None

    def _add_router_loss(self, model: nn.Module, result: dict[str, Tensor], aux_loss: Tensor | None) -> None:
        if aux_loss is None:
            raise UserError(
                f"model.json: loss_cfg.router_aux_loss_coef: {type(model).__name__} has no router loss. "
                f"Remove the key or set it to 0."
            )
        if torch.is_grad_enabled() and not aux_loss.requires_grad and result["loss"].requires_grad:
            raise UserError(
                "loss_cfg.router_aux_loss_coef has no effect: the router loss has no gradient. Either the routers and "
                "everything before them are frozen, then set it to 0; or the model recomputes its layers in the "
                "reentrant way, then use recompute_modules of the fsdp2 yaml instead."
            )
        # A summed loss is divided by the number of tokens later: then this becomes their weighted mean.
        weight = result.get("token_nums", 1)
        result["loss"] = result["loss"] + self._aux_coefficient * weight * aux_loss
        result["aux_loss"] = aux_loss.detach()


def _choice(config: Any, key: str, default: str, choices: Any) -> str:
    value = lookup(config, key, default)
    if value not in choices:
        raise UserError(
            f"model.json: {key}: '{value}' is not known.{did_you_mean(str(value), choices)} Use {', '.join(choices)}."
        )
    return str(value)


def _cannot_chunk(why: str) -> str:
    return (
        f"model.json: loss_cfg.compute_mode: chunks need a model that returns what its output head returns, but {why}. "
        f"Use 'default'. (If output_dtype is set in the fsdp2 yaml, leaving it out may be enough.)"
    )


class _AnyOutput(tuple[Any, ...]):
    """What a backbone might return: hidden states first, and nothing under every name."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def _what_needs_logits(model: Any) -> str | None:
    """Say what the model does with its logits besides returning them; None if nothing.

    Only the last part of the model's own forward runs, on a backbone and a head that do nothing: no weights are
    read, no collectives run and no random numbers are drawn, so this works on the meta device too.
    """
    name = type(model).__name__
    head, backbone = model.get_output_embeddings(), model.base_model
    if head is None or backbone is model:
        return f"{name} has no output head of its own"
    weight = next(head.parameters())
    hidden = weight.new_zeros(1, 2, weight.shape[-1])
    logits = torch.zeros(1, 2, 1)
    with _replaced(backbone, lambda *_, **__: _AnyOutput((hidden,))), _replaced(head, lambda *_, **__: logits):
        try:
            outputs = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=weight.device), use_cache=False)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"what {name} does with it cannot be told ({type(error).__name__}: {error})"
    unchanged = outputs.logits is logits and logits._version == 0  # nor in place
    return None if unchanged else f"{name} changes it"


class _replaced:
    """Replaces ``module.forward`` for a while."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self._module, self._forward, self._before = module, forward, vars(module).get("forward")

    def __enter__(self) -> None:
        self._module.forward = self._forward

    def __exit__(self, *_: Any) -> None:
        del self._module.forward
        if self._before is not None:
            self._module.forward = self._before
