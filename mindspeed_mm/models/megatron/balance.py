"""The load-balancing loss of the experts, computed where their routers are and weighed as their micro-batch is.

Of a micro-batch with T tokens (those that `attention_mask` does not leave out, of all ranks that share its sequences),
of which every one takes k of E experts in each of L layers with experts, layer l has for expert e

    c[l, e] = tokens that take it,    p[l, e] = sum over tokens of softmax(router logits)[e]

and the loss is

    megatron:      a = sum over l of  E / (k T^2) * sum over e of c[l, e] p[l, e]
    hugging face:  a = E / (L T)^2 * sum over e of (sum over l of c[l, e]) (sum over l of p[l, e])

A step optimises `loss + coefficient * a` of each micro-batch, under every kind of loss with the weights that the
micro-batches' losses have there; docs/en/losses.md, "The router loss". megatron-core's own has other weights: it takes
all tokens for targets under a loss per token, and 0.12 divides by the context-parallel size once too often.

No gradient goes through c, so that of p is known as soon as all c are: it is put in at the router on the way back,
and no stage has to know of another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.configs.model import ModelConfig
from mindspeed_mm.errors import UserError

Formula = Literal["megatron", "hugging face"]


class RouterLosses:
    """The router losses of one pipeline chunk.

    Attributes:
        coefficient: what the loss is multiplied with where it is optimised.
    """

    def __init__(self, formula: Formula, coefficient: float, layers: int, top_k: int) -> None:
        """Prepare.

        Args:
            formula: which of the two.
            coefficient: of the loss.
            layers: with experts, of the whole model.
            top_k: experts that a token takes.
        """
        self.formula, self.coefficient, self.layers, self.top_k = formula, coefficient, layers, top_k
        self.scale = 1.0
        self._batches: list[MicroBatch] = []

    def start(self, scale: float) -> None:
        """Begin a step; ``scale`` is what the gradient of a micro-batch's loss is multiplied with at its source."""
        self.scale = scale
        self._batches = []

    def watch(self, layers: Sequence[Any]) -> None:
        """Make the routers of these layers take part; all layers of the chunk, with experts or not."""
        for layer in layers:
            layer.register_forward_pre_hook(_open, with_kwargs=True)
            if hasattr(layer.mlp, "router"):
                _watch(layer.mlp.router, int(layer.layer_number))

    def begin(
        self, weight: Tensor | int, counted: Tensor, tokens: Tensor | int, packed_seq_params: Any = None
    ) -> MicroBatch:
        """Return what goes with a micro-batch through the layers, in the place of ``packed_seq_params``.

        Args:
            weight: of its loss: 1, or the samples or targets that its context-parallel ranks together count.
            counted: (S, B) bool, which of the positions that are here count.
            tokens: how many count, those elsewhere included.
            packed_seq_params: what the layers' attention gets under this name.
        """
        self._batches.append(MicroBatch(self, weight, counted.flatten()[:, None], tokens, packed_seq_params))
        return self._batches[-1]

    def optimised(self) -> list[Tensor]:
        """Return what a step optimises of each micro-batch for the layers here, the same on all ranks that share it."""
        return [batch.value() * (self.coefficient * self.scale * batch.weight) for batch in self._batches]

    def take(self) -> list[Tensor]:
        """Return, and forget, the loss of each micro-batch of the step: that of the layers here, a scalar each."""
        batches, self._batches = self._batches, []
        return [batch.value() for batch in batches]


@dataclass
class MicroBatch:
    """What the routers of a chunk have seen of a micro-batch."""

    losses: RouterLosses
    weight: Tensor | int
    counted: Tensor
    tokens: Tensor | int
    packed_seq_params: Any
    seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of each layer: c and p, both (E,) fp32

    def attach(self, layer: int, logits: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        """Take note of a layer, the second time too if it is recomputed; return ``probs`` with the loss behind it.

        Args:
            layer: its number.
            logits: (T', E) of the router, or (S, B, E).
            probs: what the router returns.
            routing_map: (T', E) bool, who takes what.
        """
        scores = torch.softmax(logits.flatten(0, -2), dim=-1, dtype=torch.float32)
        sums = (scores * self.counted).sum(0)
        both = torch.stack([(routing_map & self.counted).sum(0).to(sums.dtype), sums.detach()])
        group = _sharing_ranks()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(both, group=group)
        self.seen[layer] = (both[0], both[1])
        attached: Tensor = _Attach.apply(probs, sums, self, layer)
        return attached

    def gradient(self, layer: int) -> Tensor:
        """Return the gradient with respect to ``p`` of a layer, (E,)."""
        losses = self.losses
        if losses.formula == "megatron":
            share = self.seen[layer][0] / (losses.top_k * self.tokens**2)
        else:
            share = sum(c for c, _ in self.seen.values()) / (losses.layers * self.tokens) ** 2
        scaled: Tensor = share * (len(share) * losses.coefficient * losses.scale * self.weight)
        return scaled

    def value(self) -> Tensor:
        """Return the loss of the layers here."""
        losses = self.losses
        if not self.seen:
            return self.counted.new_zeros((), dtype=torch.float32)
        c, p = (torch.stack(part) for part in zip(*self.seen.values(), strict=True))
        if losses.formula == "megatron":
            return (c * p).sum() * (c.shape[1] / (losses.top_k * self.tokens**2))
        return (c.sum(0) * p.sum(0)).sum() * (c.shape[1] / (losses.layers * self.tokens) ** 2)


class _Attach(torch.autograd.Function):
    """``probs`` unchanged; on the way back the loss is one more source of gradient for the sums of scores."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, sums: Tensor, batch: MicroBatch, layer: int) -> Tensor:
        ctx.batch, ctx.layer, ctx.dtype = batch, layer, sums.dtype
        return probs.view_as(probs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return gradient, ctx.batch.gradient(ctx.layer).to(ctx.dtype), None, None


def _sharing_ranks() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_and_context_parallel_group()


def _open(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take the micro-batch out of what the layer is called with, in each pass: a recomputed layer gets its own."""
    batch = kwargs.get("packed_seq_params")
    batch = batch if isinstance(batch, MicroBatch) else None
    if hasattr(layer.mlp, "router"):
        layer.mlp.router.micro_batch = batch
    return args, kwargs if batch is None else {**kwargs, "packed_seq_params": batch.packed_seq_params}


def _watch(router: Any, layer: int) -> None:
    route = router.routing

    def routing(logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routing_map = route(logits, *args, **kwargs)
        batch = router.micro_batch
        return (probs if batch is None else batch.attach(layer, logits, probs, routing_map)), routing_map

    router.micro_batch, router.routing = None, routing


def router_losses(config: ModelConfig, chosen: dict[str, Any], transformer: Any) -> RouterLosses | None:
    """Return what model.json asks for, None if it asks for no router loss.

    Args:
        config: model.json.
        chosen: fields of ``TransformerConfig`` that it writes.
        transformer: the ``TransformerConfig``.

    Raises:
        UserError: it cannot be computed in this layout, or is none that is known.
    """
    if chosen.get("moe_z_loss_coeff") and (
        config.loss_cfg.loss_type != "default" or transformer.context_parallel_size > 1
    ):
        raise UserError(
            "model.json: megatron.moe_z_loss_coeff is weighed wrongly by megatron-core under context parallelism and "
            "under losses per token or per sample; remove the key."
        )
    kind, coefficient = chosen.get("moe_router_load_balancing_type") or "none", chosen.get("moe_aux_loss_coeff") or 0
    theirs = config.loss_cfg.router_aux_loss_coef
    if kind not in ("none", "aux_loss"):
        raise UserError(
            f"model.json: moe_router_load_balancing_type is '{kind}', which pretrain_vlm.py does not compute; use "
            "'aux_loss' or 'none'."
        )
    ours = kind == "aux_loss" and coefficient > 0
    if not ours and theirs <= 0:
        return None
    if ours and theirs > 0:
        raise UserError(
            "model.json: loss_cfg.router_aux_loss_coef is Hugging Face's load-balancing loss and moe_aux_loss_coeff "
            "megatron-core's; remove one of them."
        )
    key = "moe_aux_loss_coeff" if ours else "loss_cfg.router_aux_loss_coef"
    if transformer.num_moe_experts is None:
        raise UserError(f"model.json: {key}: the model has no experts, and so no router loss; remove the key.")
    if transformer.pipeline_model_parallel_size > 1:
        if not ours:
            raise UserError(
                "model.json: loss_cfg.router_aux_loss_coef, Hugging Face's load-balancing loss, needs what all layers "
                "have seen: it cannot be computed with --pipeline-model-parallel-size "
                f"{transformer.pipeline_model_parallel_size}. Set text_decoder.moe_router_load_balancing_type to "
                "'aux_loss' and text_decoder.moe_aux_loss_coeff for megatron-core's, which adds up the layers' own."
            )
        if "moe" in (getattr(transformer, "recompute_modules", None) or ()) or getattr(
            transformer, "moe_layer_recompute", False
        ):
            raise UserError(
                f"model.json: {key} cannot be computed where pipeline stages recompute the experts alone; take 'moe' "
                "out of recompute_modules, or use --recompute-granularity full."
            )
    return RouterLosses(
        "megatron" if ours else "hugging face",
        float(coefficient if ours else theirs),
        sum(transformer.moe_layer_freq) if isinstance(transformer.moe_layer_freq, list) else transformer.num_layers,
        transformer.moe_router_topk,
    )
