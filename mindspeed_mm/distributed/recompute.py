"""Activation recompute: run a module's forward again in the backward pass instead of keeping its activations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# A key-value cache that is filled in the forward pass would be filled a second time by the recompute.
_CACHES = ("past_key_values", "past_key_value", "layer_past")


def recompute(module: nn.Module) -> None:
    """Make ``module`` recompute its activations, in place. Doing it twice changes nothing.

    Only the instance's ``forward`` is replaced, so class, parameter names and state dict stay what they are, and
    the hooks of ``fully_shard`` run once, outside the recomputed region, whichever of the two is applied first.
    Random numbers (dropout) are drawn again from the same state. Without gradients the module runs as before,
    so evaluation and ``generate()`` keep their caches; with gradients a cache handed to the module is left out.

    The non-reentrant implementation is used always. Its gradients are bit-equal to the reentrant one's where that
    one is right, but the reentrant one yields *no* gradient, without an error, for a module none of whose inputs
    require one: the first layer behind a frozen embedding or a frozen vision tower.
    """
    forward = module.forward
    if getattr(forward, "_recomputes", False):
        return
    if inspect.ismethod(forward):
        # Bound again to the instance, so that a deep copy of the module runs its own weights.
        module.forward = MethodType(_recomputing(forward.__func__), module)
    else:
        module.forward = _recomputing(forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        kwargs.update({name: None for name in _CACHES if name in kwargs})
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        names = tuple(kwargs)
        split = len(args)

        def run(*flat: Any) -> Any:
            return forward(*flat[:split], **dict(zip(names, flat[split:], strict=True)))

        # All inputs go in by position: checkpoint() looks only there for the device whose RNG state it must keep.
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False)

    wrapper._recomputes = True  # type: ignore[attr-defined]
    return wrapper
