"""Calling a model with a batch that has more keys than its forward takes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from mindspeed_mm.errors import UserError

# What loaders and losses add for the models that want it; a model that does not computes as without it.
_OPTIONAL = {
    "attention_mask",
    "mm_token_type_ids",
    "position_ids",
    "second_per_grid_ts",
    "use_cache",
    "vision_metadata",
}


def takes(module: nn.Module, key: str) -> bool:
    """Return whether ``module(key=...)`` is possible."""
    parameters = inspect.signature(module.forward).parameters
    return key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def leave_out_what_it_does_not_take(module: nn.Module) -> None:
    """Let ``module`` be called with optional keys that its forward does not name; others stay a mistake.

    Its forward is looked at here, once. One with ``**kwargs`` is left alone.
    """
    if takes(module, ""):
        return
    taken = set(inspect.signature(module.forward).parameters)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if strange := sorted(kwargs.keys() - taken - _OPTIONAL):
            raise UserError(
                f"{type(module).__name__}.forward takes no {', '.join(strange)}, which the batch has: name them in its "
                "signature, or add **kwargs if it needs none of them."
            )
        return args, {key: value for key, value in kwargs.items() if key in taken}

    module.register_forward_pre_hook(hook, with_kwargs=True)
