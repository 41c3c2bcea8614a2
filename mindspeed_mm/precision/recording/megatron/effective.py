"""What a model of megatron-core layers and its optimizer are really set to, by the Hugging Face model's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from mindspeed_mm.checkpoint.coordination import gather
from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.main_parameters import MainParameters, unwrap
from mindspeed_mm.models.megatron.layout import pieces
from mindspeed_mm.precision.recording.effective import complete, of_modules
from mindspeed_mm.precision.recording.megatron.names import gather_names
from mindspeed_mm.precision.recording.megatron.sites import chunk_sites


def effective_values(
    chunks: Sequence[nn.Module], mains: MainParameters, optimizer: Optimizer, group_names: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Return what is in force on all ranks.

    In the form of :func:`mindspeed_mm.precision.recording.effective.effective_values`.

    A collective.

    Args:
        chunks: of this rank, in megatron-core's DDP.
        mains: what the optimizer is over.
        optimizer: of torch.
        group_names: see :class:`~mindspeed_mm.engine.megatron.MegatronEngine`.
    """
    inner: list[Any] = [unwrap(chunk) for chunk in chunks]
    layouts = [pieces(chunk) for chunk in inner]
    blueprint = getattr(inner[0], "blueprint", None)
    names = gather_names(inner, layouts, blueprint and blueprint.model)
    tables = gather(of_modules([named for chunk in inner for named in _modules(chunk)]))
    frozen = [parameter for chunk in inner for parameter in chunk.parameters() if not parameter.requires_grad]
    config = inner[0].config
    found: dict[str, Any] = {
        "class": type(blueprint.model if blueprint else inner[0]).__name__,
        **{what: {path: value for table in tables for path, value in table[what].items()} for what in tables[0]},
        "dtypes": dict(Counter(_name(value.dtype) for value in [*mains.values, *frozen])),
        "frozen": names.frozen,
        "mixed_precision": {
            "param_dtype": None if config.params_dtype.itemsize == 4 else _name(config.params_dtype),
            "reduce_dtype": _name(mains.all[0].gradient.dtype) if mains.all else None,
            "output_dtype": None,
        },
        "mesh": {**vars(parallel.sizes()), "data": dist.get_world_size(parallel.loader_group())},
    }
    if blueprint is not None:
        found["parameters"] = sum(parameter.numel() for parameter in blueprint.model.parameters())
        found["config"] = blueprint.config.to_dict()
    return complete(found, optimizer, names.of_groups(group_names))


def _modules(chunk: Any) -> list[tuple[str, nn.Module]]:
    """Return the modules of a chunk by the path of what they stand for, or of what is around that."""
    if not hasattr(chunk, "blueprint"):
        return list(chunk.named_modules())
    sites = {site.path: (*site.outputs, *site.inputs)[0].site for site in chunk_sites(chunk, pieces(chunk))}
    found = []
    for path, module in chunk.named_modules():
        if path.startswith("image_encoder."):
            found.append((chunk.image_encoder.hf_name(path.removeprefix("image_encoder.")), module))
            continue
        own = path
        while own.count(".") > 1 and own not in sites:
            own = own.rpartition(".")[0]
        if own in sites and (own == path or not list(module.children())):
            found.append((sites[own], module))
    return found


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
