"""Parameter groups: which parameters decay, which learn at another rate, and by which rule."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
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
    muon: bool = False
    names: list[str] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)

    def to_optimizer_group(self, lr: float, weight_decay: float) -> dict[str, Any]:
        """Return the group in the form ``torch.optim`` takes; the multipliers are for the schedule."""
        return {
            "params": self.parameters,
            "lr": lr * self.lr_mult,
            "weight_decay": weight_decay * self.wd_mult,
            "lr_mult": self.lr_mult,
            "wd_mult": self.wd_mult,
        }

    def describe(self, lr: float, weight_decay: float) -> dict[str, Any]:
        """Return what the group is as plain values: its peak learning rate, its first weight decay and its size."""
        return {
            "lr": lr * self.lr_mult,
            "weight_decay": weight_decay * self.wd_mult,
            "muon": self.muon,
            "tensors": len(self.parameters),
            "parameters": sum(p.numel() for p in self.parameters),
            "names": self.names,
        }


def build_param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay_exclude: Sequence[str] = (),
    lr_scale: Sequence[str] = (),
    lr_mult: float = 1.0,
    decay_all: bool = False,
    muon_matrices: Collection[nn.Parameter] = (),
) -> list[ParameterGroup]:
    """Sort the trainable parameters into groups.

    Biases and other parameters of at most one dimension do not decay (the convention of Megatron and Hugging
    Face), unless ``decay_all``. A keyword matches a parameter when it is part of its name, whatever the case.
    Sharded (DTensor) and plain parameters never share a group: fused and foreach optimizers refuse the mix.

    Args:
        named_parameters: names and parameters of the whole model; frozen ones are left out. A tied parameter may come
            under each of its names: keywords look at all of them, the table shows the first.
        weight_decay_exclude: keywords of parameters that do not decay.
        lr_scale: ``keyword=scale`` or ``keyword``: parameters whose learning rate is the scheduled one times that
            scale, or times ``lr_mult``. Where several match a parameter the last of them counts.
        lr_mult: the scale of the keywords that name none.
        decay_all: let every parameter decay that no keyword excludes.
        muon_matrices: the parameters that Muon updates.

    Raises:
        UserError: a keyword matches no trainable parameter, a scale is no number, or no parameter is trainable.
    """
    trainable: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            trainable.setdefault(parameter, []).append(name)
    if not trainable:
        raise UserError("Every parameter of the model is frozen: unfreeze a part of it in model.json ('freeze').")
    scales = [_read_scale(word, lr_mult) for word in lr_scale]
    _check_matches("--weight-decay-exclude-modules", weight_decay_exclude, trainable.values())
    _check_matches("--lr-scale-modules", [keyword for keyword, _ in scales], trainable.values())
    muon = {id(p) for p in muon_matrices}
    groups: dict[tuple[float, float, bool, bool], ParameterGroup] = {}
    for parameter, names in trainable.items():
        decays = decay_all or not (parameter.ndim <= 1 or names[0].endswith("bias"))
        excluded = any(_matches(names, keyword) for keyword in weight_decay_exclude)
        key = (
            next((scale for keyword, scale in reversed(scales) if _matches(names, keyword)), 1.0),
            1.0 if decays and not excluded else 0.0,
            isinstance(parameter, DTensor),
            id(parameter) in muon,
        )
        group = groups.setdefault(key, ParameterGroup(*key))
        group.names.append(names[0])
        group.parameters.append(parameter)
    return list(groups.values())


def param_group_table(groups: Sequence[ParameterGroup], lr: float, weight_decay: float) -> list[str]:
    """Return one line for each group: peak learning rate, weight decay, tensors and parameters."""
    rows = [group.describe(lr, weight_decay) for group in groups]
    return [
        f" parameter group {i}: lr {row['lr']:.3E} | weight decay {row['weight_decay']:g} | "
        f"{row['tensors']} tensors | {row['parameters']:,} parameters{' | Muon' if row['muon'] else ''}"
        for i, row in enumerate(rows)
    ]


def _read_scale(word: str, default: float) -> tuple[str, float]:
    keyword, separator, text = word.partition("=")
    if not separator:
        return keyword, default
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not (keyword and 0 <= scale < math.inf):
        raise UserError(
            f"--lr-scale-modules: '{word}' is not keyword=scale; write a part of a parameter's name and a number that "
            "is not negative, for example visual=0.1"
        )
    return keyword, scale


def _check_matches(flag: str, keywords: Sequence[str], trainable: Iterable[list[str]]) -> None:
    every = [name for names in trainable for name in names]
    for keyword in keywords:
        if not keyword:
            raise UserError(f"{flag}: an empty keyword is part of every name; remove it, or write a part of a name.")
        if not _matches(every, keyword):
            parts = {part for name in every for part in name.split(".")}
            raise UserError(
                f"{flag}: '{keyword}' is part of no trainable parameter's name.{did_you_mean(keyword, parts)}"
            )


def _matches(names: Iterable[str], keyword: str) -> bool:
    return any(keyword.lower() in name.lower() for name in names)
