"""Frozen parts of a model: naming them by pattern, finding them again, and choosing how FSDP2 holds them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from mindspeed_mm.distributed.patterns import resolve, summarise
from mindspeed_mm.errors import UserError


def freeze(
    model: nn.Module,
    patterns: Iterable[str],
    key: str = "model.json: freeze",
    lent: Mapping[nn.Module, nn.Parameter] | None = None,
) -> None:
    """Set ``requires_grad`` to False for the modules and parameters that the patterns name.

    Call it before sharding and before the optimizer is built. A parameter under two names is frozen with either.

    Args:
        model: where the paths start.
        patterns: module paths as in ``fsdp2_config.yaml``; the last part may also name a parameter.
        key: where the patterns come from, for the message.
        lent: parameters of other modules that a module uses as its own; they are frozen with it.

    Raises:
        UserError: a pattern is malformed, matches nothing, or nothing that has parameters. The message lists the
            nearest paths.
    """
    for pattern in patterns:
        try:
            parts = resolve(model, pattern, parameters=True)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        parameters = [parameter for _, part in parts for parameter in _parameters(part, lent or {})]
        if not parameters:
            raise UserError(f"{key}: '{pattern}' has no parameters that could be frozen; remove it.")
        for parameter in parameters:
            parameter.requires_grad_(False)


def _parameters(part: nn.Module | nn.Parameter, lent: Mapping[nn.Module, nn.Parameter]) -> Iterator[nn.Parameter]:
    if isinstance(part, nn.Parameter):
        yield part
    else:
        yield from part.parameters()
        yield from (lent[module] for module in part.modules() if module in lent)


def frozen_parts(model: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Return ``{path: part}``: the highest modules whose parameters are all frozen, and single frozen parameters.

    A single one belongs to a module that also holds trained parameters.
    """
    found: dict[str, nn.Module | nn.Parameter] = {}

    def visit(module: nn.Module, path: str) -> None:
        parameters = list(module.parameters())
        if not any(parameter.requires_grad for parameter in parameters):
            if parameters:
                found[path] = module
            return
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                found[prefix + name] = parameter
        for name, child in module.named_children():
            visit(child, prefix + name)

    visit(model, "")
    return found


def choose_policies(
    model: nn.Module,
    units: Mapping[str, nn.Module],
    ignored: Collection[nn.Parameter],
    *,
    listed: bool,
    replicate_up_to: int,
    dtype: torch.dtype | None,
) -> tuple[dict[str, nn.Module], list[str]]:
    """Choose how FSDP2 holds each frozen tower: the highest modules whose parameters are all frozen.

    The first line that fits decides:

    1. ``ignored_modules`` names it: replicated.
    2. Listed units are in it, or it is one: per layer.
    3. It is small, and needs no cast to compute: replicated. Nothing of it is ever communicated, and that costs
       only the shards of the others. Small are as many as fit in ``replicate_up_to`` together.
    4. Units that nobody listed (``_no_split_modules``) are in it: per layer.
    5. Root: gathered with what else is left to the root.

    Replicated parameters are plain tensors outside FSDP, so this is right whichever method of the tower is called.
    What is frozen inside a larger unit is held with that unit, and not reported.

    Args:
        model: the module to shard.
        units: what is to be wrapped, by path.
        ignored: the parameters of ``ignored_modules``.
        listed: whether the user listed the units.
        replicate_up_to: how many bytes rule 3 may replicate.
        dtype: what FSDP2 would gather parameters in; None keeps theirs.

    Returns:
        The towers to replicate by rule 3, and one line for each kind of tower.
    """
    replicated: dict[str, nn.Module] = {}
    members: dict[str, dict[str, int]] = {}
    all_units = set(units.values())
    held = {parameter for unit in units.values() for parameter in unit.parameters()}
    for path, tower in frozen_parts(model).items():
        if path == "" or not isinstance(tower, nn.Module):
            continue
        parameters = set(tower.parameters())
        has_units = not all_units.isdisjoint(tower.modules())
        if not has_units and not held.isdisjoint(parameters):
            continue
        size = sum(p.numel() * p.element_size() for p in parameters)
        if parameters.issubset(ignored):
            policy = "replicated, as ignored_modules says"
        elif has_units and listed:
            policy = "per layer, as sub_modules_to_wrap says"
        elif size <= replicate_up_to and all(p.dtype == (dtype or p.dtype) for p in parameters):
            policy = "replicated, it is small"
            replicate_up_to -= size
            replicated[path] = tower
        elif has_units:
            policy = "per layer"
        else:
            policy = "root, gathered with what is left to it"
        members.setdefault(policy, {})[path] = sum(p.numel() for p in parameters)
    lines = [
        f"frozen {pattern} ({sum(sizes[path] for path in paths):,} parameters): {policy}"
        for policy, sizes in members.items()
        for pattern, paths in summarise(sizes).items()
    ]
    return replicated, lines
