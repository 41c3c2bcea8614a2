"""Freezing components of a Hugging Face model as model.json asks."""

from __future__ import annotations

from typing import Any

from torch import nn

from mindspeed_mm.distributed.frozen import frozen_parts
from mindspeed_mm.distributed.patterns import summarise
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
    parameters = list(model.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    if not frozen:
        return None
    parts = summarise(frozen_parts(model))
    if "" in parts:
        raise UserError(
            "model.json: every parameter is frozen, nothing is left to train. Shorten the list 'freeze', "
            f"or set one of these to false: {', '.join(FREEZE_KEYS.values())}."
        )
    names = ", ".join([*parts][:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
    return f"frozen: {frozen:,} of {sum(p.numel() for p in parameters):,} parameters, in {names}"


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
