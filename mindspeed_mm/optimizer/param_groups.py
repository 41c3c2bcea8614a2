"""Parameter groups: which parameters decay, and which learn at another rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from mindspeed_mm.errors import UserError, did_you_mean


@dataclass
class ParameterGroup:
    """Parameters that share their multipliers of the scheduled learning rate and weight decay."""

    lr_mult: float
    wd_mult: float
    sharded: bool
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    def to_optimizer_group(self) -> dict[str, Any]:
        """Return the group in the form ``torch.optim`` takes."""
        return {"params": self.parameters, "lr_mult": self.lr_mult, "wd_mult": self.wd_mult}


def build_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay_exclude: Sequence[str] = (),
    lr_scale: Sequence[str] = (),
    lr_mult: float = 1.0,
    decay_all: bool = False,
) -> list[ParameterGroup]:
    """Sort the trainable parameters into groups.

    Biases and other parameters of at most one dimension do not decay (the convention of Megatron and Hugging
    Face), unless ``decay_all``. A keyword matches a parameter when it is part of its name, whatever the case.
    Sharded (DTensor) and plain parameters never share a group: fused and foreach optimizers refuse the mix.

    Args:
        named_parameters: names and parameters of the whole model; frozen ones are left out.
        weight_decay_exclude: keywords of parameters that do not decay.
        lr_scale: keywords of parameters whose learning rate is the scheduled one times ``lr_mult``.
        lr_mult: that factor.
        decay_all: let every parameter decay that no keyword excludes.

    Raises:
        UserError: a keyword matches no trainable parameter, or no parameter is trainable.
    """
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trainable:
        raise UserError("Every parameter of the model is frozen: unfreeze a part of it in model.json ('freeze').")
    for flag, keywords in (("--weight-decay-exclude-modules", weight_decay_exclude), ("--lr-scale-modules", lr_scale)):
        for keyword in keywords:
            if not any(_matches(name, (keyword,)) for name, _ in trainable):
                parts = {part for name, _ in trainable for part in name.split(".")}
                raise UserError(
                    f"{flag}: '{keyword}' is part of no trainable parameter's name.{did_you_mean(keyword, parts)}"
                )
    groups: dict[tuple[float, float, bool], ParameterGroup] = {}
    for name, parameter in trainable:
        decays = (decay_all or parameter.ndim > 1) and not _matches(name, weight_decay_exclude)
        key = (
            lr_mult if _matches(name, lr_scale) else 1.0,
            1.0 if decays else 0.0,
            isinstance(parameter, DTensor),
        )
        group = groups.setdefault(key, ParameterGroup(*key))
        group.names.append(name)
        group.parameters.append(parameter)
    return list(groups.values())


def param_group_table(groups: Sequence[ParameterGroup], lr: float, weight_decay: float) -> list[str]:
    """Return one line for each group: peak learning rate, weight decay, tensors and parameters."""
    return [
        f" parameter group {i}: lr {lr * g.lr_mult:.3E} | weight decay {weight_decay * g.wd_mult:g} | "
        f"{len(g.parameters)} tensors | {sum(p.numel() for p in g.parameters):,} parameters"
        for i, g in enumerate(groups)
    ]


def _matches(name: str, keywords: Sequence[str]) -> bool:
    lowered = name.lower()
    return any(keyword.lower() in lowered for keyword in keywords)
