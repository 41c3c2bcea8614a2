"""Freezing components of a Hugging Face model as model.json asks."""

from __future__ import annotations

from typing import Any

from torch import nn

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.lookup import lookup
from mindspeed_mm.models.transformers.families import Family

# Component to its key in model.json.
FREEZE_KEYS = {
    "vision_encoder": "image_encoder.vision_encoder.freeze",
    "vision_projector": "image_encoder.vision_projector.freeze",
    "audio_encoder": "audio_encoder.audio_encoder.freeze",
    "text_decoder": "text_decoder.freeze",
}


def freeze_components(model: nn.Module, family: Family, config: Any) -> None:
    """Set ``requires_grad`` to False for the parameters of every component that model.json freezes.

    A tied embedding is one parameter under two names and is frozen with either.

    Args:
        model: the HF model, not yet sharded.
        family: where its components are.
        config: model.json.

    Raises:
        UserError: model.json freezes a component that this model does not have or that is not known.
    """
    owners = {name: family.component_of(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for component, key in FREEZE_KEYS.items():
        if not lookup(config, key, False):
            continue
        names = [name for name, owner in owners.items() if owner == component]
        if not names:
            raise UserError(_not_found(model, family, component, key))
        for name in names:
            model.get_parameter(name).requires_grad = False


def frozen_line(model: nn.Module) -> str | None:
    """Return one line with the modules that are frozen and their sizes, or None when everything is trained.

    Raises:
        UserError: nothing is left to train.
    """
    frozen: dict[str, int] = {}
    trained: set[str] = set()
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trained.update(_parents(name))
        else:
            frozen[name] = parameter.numel()
    if not frozen:
        return None
    if not trained:
        raise UserError(
            f"model.json: every parameter is frozen, nothing is left to train. "
            f"Set one of these to false: {', '.join(FREEZE_KEYS.values())}."
        )
    # The highest modules that hold frozen parameters only.
    tops = dict.fromkeys(next(m for m in [*_parents(name), name] if m not in trained) for name in frozen)
    return f"frozen: {sum(frozen.values()):,} of {total:,} parameters, in {', '.join(tops)}"


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _not_found(model: nn.Module, family: Family, component: str, key: str) -> str:
    name = type(model).__name__
    if component not in family.components:
        return f"model.json: {key}: {name} has no {component.replace('_', ' ')}. Remove the key."
    modules = [path for path, _ in model.named_modules() if path and path.count(".") < 2]
    return (
        f"model.json: {key}: it is not known where {name} has its {component.replace('_', ' ')}: there is none of "
        f"{', '.join(family.components[component])}. Give the class a method freeze(config) that sets "
        f"requires_grad and register it with --plugin, or remove the key. Its modules: {', '.join(modules)}."
    )
