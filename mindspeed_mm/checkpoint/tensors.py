"""The tensors of a model by name: what a checkpoint holds of it and what a rank keeps of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mindspeed_mm.checkpoint.boxes import Box, BoxedTensor

# Wrapper modules that show up in parameter names but must not show up in a checkpoint: a run may turn
# recompute or compilation on or off between two saves.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def clean_name(name: str) -> str:
    """Return a parameter name without the parts that recompute and compile wrappers add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_tensors(
    model: nn.Module, part: Literal["all", "base", "adapters"] = "all"
) -> dict[tuple[str, ...], torch.Tensor]:
    """Map all names of each parameter and persistent buffer to the live tensor, shared tensors once.

    The first name of a tuple is the one a checkpoint uses; the others are the names of tied parameters. The
    tensors are detached views of the model's storage (DTensors where the model is sharded), so writing into
    them changes the model. A weight under an adapter has the name it has without the adapter.

    Args:
        model: plain or sharded.
        part: ``base`` leaves out the weights of adapters, ``adapters`` all others.
    """
    adapted = adapted_layers(model).keys()

    def name_of(key: str) -> str:
        return clean_name(base_name(key, adapted) or key)

    # state_dict() also makes FSDP modules go back to their sharded parameters.
    state = {
        name_of(key): tensor
        for key, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
        and (part == "all" or (part == "adapters") == (base_name(key, adapted) is None))
    }
    owners: dict[str, int] = {
        name_of(name): id(tensor)
        for name, tensor in chain(
            model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        )
    }
    names: dict[object, list[str]] = {}
    for name in state:
        names.setdefault(owners.get(name, name), []).append(name)
    return {tuple(shared): state[shared[0]] for shared in names.values()}


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that peft has put around others, ``base_layer``, by path; empty without LoRA."""
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


def base_name(name: str, adapted: Collection[str]) -> str | None:
    """Return what a tensor is called in the model without adapters, None for a tensor of an adapter."""
    kept, path = [], ""
    for part in name.split("."):
        if path not in adapted:
            kept.append(part)
        elif part != "base_layer":
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def local_block(tensor: torch.Tensor) -> tuple[slice, ...]:
    """Return where this rank's part of ``tensor`` lies in the full tensor: one slice for each dimension."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def local_blocks(tensor: torch.Tensor) -> list[Box]:
    """Return this rank's parts of ``tensor``: views of where they live."""
    if isinstance(tensor, BoxedTensor):
        return tensor.boxes
    return [Box(tuple(part.start for part in local_block(tensor)), local_part(tensor))]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's storage of ``tensor``, without copying."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Return the first ``limit`` names, one on a line, and how many more there are."""
    names = list(names)
    lines = [f"  {name}" for name in names[:limit]]
    if len(names) > limit:
        lines.append(f"  ... and {len(names) - limit} more")
    return "\n".join(lines)
