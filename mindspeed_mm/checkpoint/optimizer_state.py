"""Optimizer state as named tensors, read from and written to ``optimizer.state`` directly.

torch's ``get_optimizer_state_dict`` takes a fake step on an optimizer that has not stepped yet, which leaves
``step`` at 1 and shifts every later Adam step; and it fails when only some parameters have state. Here a
parameter that was never stepped simply has no entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from mindspeed_mm.checkpoint.tensors import clean_name, listing
from mindspeed_mm.errors import UserError

PREFIX = "optimizer.state."
# How this process runs the step, not what it computes: stays as the run at hand chose it.
IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
# A hyperparameter that only this rule has.
_RULES = {"betas": "AdamW", "dampening": "SGD", "ns_steps": "Muon"}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return the state tensors under ``optimizer.state.<parameter name>.<state name>``."""
    return {
        f"{PREFIX}{name}.{key}": value
        for name, param in _named_parameters(model, optimizer).items()
        for key, value in sorted(optimizer.state.get(param, {}).items())
        if isinstance(value, torch.Tensor)
    }


def optimizer_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return, for each parameter group, its hyperparameters, parameter names and non-tensor state as plain values."""
    names = {id(param): name for name, param in _named_parameters(model, optimizer).items()}
    return [
        {
            "hyperparameters": {k: _plain(v) for k, v in group.items() if k not in IMPLEMENTATION},
            "params": [names[id(param)] for param in group["params"]],
            "scalars": {
                names[id(param)]: scalars
                for param in group["params"]
                if (scalars := {k: v for k, v in optimizer.state.get(param, {}).items() if type(v) in (int, float)})
            },
        }
        for group in optimizer.param_groups
    ]


def check_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Check that the optimizer's parameter groups are the saved ones.

    Raises:
        UserError: they are updated by another rule, or hold other parameters than the saved ones, which are listed.
    """
    rule, saved_rule = _rule(groups), _rule(saved)
    if rule != saved_rule:
        raise UserError(
            f"optimizer state: it was saved by {saved_rule}, and this run has {rule}. Pass the --optimizer of the run "
            "that saved it, or start from its weights alone with --finetune or --no-load-optim."
        )
    ours = [group["params"] for group in groups]
    theirs = [group["params"] for group in saved]
    if [sorted(names) for names in ours] == [sorted(names) for names in theirs]:
        return
    if len(ours) != len(theirs):
        detail = f"{len(theirs)} parameter groups were saved, the optimizer has {len(ours)}"
    else:
        moved = [name for a, b in zip(theirs, ours, strict=True) for name in sorted(set(a) ^ set(b))]
        detail = f"the groups differ in\n{listing(dict.fromkeys(moved))}"
    raise UserError(
        f"optimizer state: {detail}\nFreeze and group the parameters as in the run that saved it, or start from its "
        "weights alone with --finetune or --no-load-optim."
    )


def _rule(groups: list[dict[str, Any]]) -> str:
    found = {rule for key, rule in _RULES.items() if any(key in group["hyperparameters"] for group in groups)}
    return " and ".join(sorted(found)) or "another optimizer"


def changed_settings(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[str]:
    """Return a line for each hyperparameter whose saved value takes the place of this run's.

    Learning rate and weight decay are the schedule's.
    """
    lines = [
        f"optimizer: {key} stays {value} as it was saved; {now}, which the command line says, does not count"
        for group, record in zip(groups, saved, strict=True)
        for key, value in record["hyperparameters"].items()
        if key not in ("lr", "weight_decay") and (now := group["hyperparameters"].get(key, value)) != value
    ]
    return list(dict.fromkeys(lines))


def allocate_state(model: nn.Module, optimizer: Optimizer, metadata: Metadata) -> dict[str, torch.Tensor]:
    """Replace the optimizer's state by empty tensors for what a checkpoint holds, and return these by key.

    State of a parameter's shape is placed like the parameter (a DTensor with its mesh and placements); ``step``
    lies on the CPU unless the fused or capturable implementation wants it beside the parameter.
    """
    optimizer.state.clear()
    params = _named_parameters(model, optimizer)
    beside = {
        id(param)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for param in group["params"]
    }
    tensors: dict[str, torch.Tensor] = {}
    for key, entry in metadata.state_dict_metadata.items():
        name, _, state_name = key.removeprefix(PREFIX).rpartition(".")
        if not key.startswith(PREFIX) or name not in params or not isinstance(entry, TensorStorageMetadata):
            continue
        param, dtype = params[name], entry.properties.dtype
        if state_name == "step":
            tensor = torch.empty(entry.size, dtype=dtype, device=param.device if id(param) in beside else "cpu")
        elif entry.size == param.shape:
            tensor = torch.empty_like(param, dtype=dtype, requires_grad=False)
        else:
            tensor = torch.empty(entry.size, dtype=dtype, device=param.device)
        optimizer.state[param][state_name] = tensors[key] = tensor
    return tensors


def restore_groups(model: nn.Module, optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
    """Set the saved hyperparameters and non-tensor state; the groups must have passed `check_groups`."""
    params = _named_parameters(model, optimizer)
    for group, record in zip(optimizer.param_groups, saved, strict=True):
        for key, value in record["hyperparameters"].items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
        for name, scalars in record["scalars"].items():
            optimizer.state[params[name]].update(scalars)


def _named_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Return the optimizer's parameters by their names in the model, shared parameters once."""
    names = {id(param): clean_name(name) for name, param in model.named_parameters()}
    return {names[id(param)]: param for group in optimizer.param_groups for param in group["params"]}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
