"""Activation recompute: run a module's forward again in the backward pass instead of keeping its activations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

# A key-value cache that is filled in the forward pass would be filled a second time by the recompute.
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "_grouped_mm")


def recompute(module: nn.Module, keep: str | None = None) -> None:
    """Make ``module`` recompute its activations, in place. Doing it twice changes nothing.

    Args:
        module: what to run again in backward.
        keep: ``"matmul"`` keeps the outputs of matrix products and attention, the costly part, and computes only the
            rest again: memory and time between recomputing all and recomputing nothing. The gradients are the same
            bit for bit in every case.

    Only the instance's ``forward`` is replaced, so class, parameter names and state dict stay what they are, and
    the hooks of ``fully_shard`` run once, outside the recomputed region, whichever of the two is applied first.
    Random numbers (dropout) are drawn again from the same state. Without gradients the module runs as before,
    so evaluation and ``generate()`` keep their caches; with gradients a cache handed to the module is left out.

    The non-reentrant implementation is used always. Its gradients are bit-equal to the reentrant one's where that
    one is right, but the reentrant one yields *no* gradient, without an error, for a module none of whose inputs
    require one: the first layer behind a frozen embedding or a frozen vision tower.
    """
    forward = module.forward
    if recomputes(module):
        return
    if inspect.ismethod(forward):
        # Bound again to the instance, so that a deep copy of the module runs its own weights.
        module.forward = MethodType(_recomputing(forward.__func__, keep), module)
    else:
        module.forward = _recomputing(forward, keep)


def recomputes(module: nn.Module) -> bool:
    """Return whether ``module`` recomputes its activations."""
    return getattr(module.forward, "_recomputes", False)


def _recomputing(forward: Callable[..., Any], keep: str | None) -> Callable[..., Any]:
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products) if keep else noop_context_fn

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        kwargs.update({name: None for name in _CACHES if name in kwargs})
        args = tuple(None if hasattr(value, "get_seq_length") else value for value in args)  # a cache by position
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        names = tuple(kwargs)
        split = len(args)

        def run(*flat: Any) -> Any:
            return forward(*flat[:split], **dict(zip(names, flat[split:], strict=True)))

        # All inputs go in by position: checkpoint() looks only there for the device whose RNG state it must keep.
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, context_fn=contexts)

    wrapper._recomputes = True  # type: ignore[attr-defined]
    return wrapper


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of matrix products, and of attention that draws no random numbers.

    Attention with dropout must run again: left out, everything after it would draw other numbers than in forward.
    """
    name = operator._schema.name.split("::")[-1]
    is_attention = "attention" in name or "attn" in name
    is_kept = name in _PRODUCTS or (is_attention and not _draws(operator, args, kwargs))
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return bool(given)
    return True  # how it says so is not known
