"""The names of modules and parameters in a record: those of the Hugging Face model, whatever has been put around it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FSDPModule

from mindspeed_mm.checkpoint.tensors import adapted_layers, base_name, clean_name
from mindspeed_mm.models.transformers.families import family_of, has_vision
from mindspeed_mm.models.transformers_model import TransformersModel

_WRAPPED = ("module", "_orig_mod", "_checkpoint_wrapped_module")  # what wraps a whole model keeps it there


def innermost(model: nn.Module) -> nn.Module:
    """Return the model that names start at: inside of ours, of DDP, ``torch.compile`` and peft."""
    while True:
        inner = model.model if isinstance(model, TransformersModel) else None
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        for attribute in _WRAPPED:
            child = model._modules.get(attribute)
            if len(model._modules) == 1 and child is not None and not hasattr(model, "config"):
                inner = child
        if inner is None or inner is model:
            return model
        model = inner


@dataclass(frozen=True)
class Site:
    """A module of the model.

    Attributes:
        path: its path in the model as it is.
        name: its path in the model without wrappers, empty for the model itself.
        module: the module.
        vision: it belongs to a vision tower or its projector.
        arguments: names of what its ``forward`` takes by position.
    """

    path: str
    name: str
    module: nn.Module
    vision: bool
    arguments: tuple[str, ...]


def sites(root: nn.Module) -> Iterator[Site]:
    """Yield the modules of ``root`` (see :func:`innermost`) that have a forward of their own; no wrappers."""
    config = getattr(root, "config", None)
    family = family_of(config) if config is not None and hasattr(config, "model_type") else None
    for path, module in root.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
            continue
        if any(name in module._modules for name in _WRAPPED[1:]):
            continue
        name = clean_name(f"{path}.").removesuffix(".")
        component = family.component_of(name) if family and has_vision(config) else None
        yield Site(path, name, module, component in ("vision_encoder", "vision_projector"), _arguments(module))


def parameter_names(root: nn.Module) -> dict[str, str]:
    """Return the name in a record for each name that ``root`` has for a parameter or buffer.

    All names of a tied parameter have its first; a weight under an adapter has the name it has without.
    """
    adapted = adapted_layers(root).keys()
    first: dict[int, str] = {}
    names = {}
    for values in (root.named_parameters, root.named_buffers):
        for name, value in values(remove_duplicate=False):
            names[name] = first.setdefault(id(value), clean_name(base_name(name, adapted) or name))
    return names


def class_name(module: nn.Module) -> str:
    """Return the class that the user or Hugging Face wrote; ``fully_shard`` puts one of its own before it."""
    return next(kind.__name__ for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _arguments(module: nn.Module) -> tuple[str, ...]:
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
