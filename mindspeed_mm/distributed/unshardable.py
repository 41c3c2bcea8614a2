"""Parameters that ``fully_shard`` does not take as they are."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mindspeed_mm.errors import UserError


def scalars(module: nn.Module) -> set[nn.Parameter]:
    """Return the parameters without a dimension to shard, such as CLIP's ``logit_scale``; they stay whole."""
    return {param for param in module.parameters() if param.ndim == 0}


def lay_out_in_order(module: nn.Module) -> None:
    """Give transposed and ``channels_last`` parameters the usual order in memory; their values stay."""
    for param in module.parameters():
        if not param.is_contiguous():
            param.data = param.data.contiguous()


def refuse_mixed_units(module: nn.Module) -> None:
    """Check that the trained parameters of each wrapped unit have one dtype: FSDP2 reduces them as one tensor.

    Raises:
        UserError: a unit has several. FSDP2 would say so in the first forward, and not where.
    """
    found: dict[str, dict[torch.dtype, str]] = {}

    def visit(part: nn.Module, path: str, unit: str) -> None:
        unit = path if isinstance(part, FSDPModule) else unit
        prefix = f"{path}." if path else ""
        for name, param in part.named_parameters(recurse=False):
            if isinstance(param, DTensor) and param.requires_grad:
                found.setdefault(unit, {}).setdefault(param.dtype, prefix + name)
        for name, child in part.named_children():
            visit(child, prefix + name, unit)

    visit(module, "", "")
    for unit, dtypes in found.items():
        if len(dtypes) > 1:
            examples = " and ".join(f"'{name}' is {str(d).removeprefix('torch.')}" for d, name in dtypes.items())
            where = f"'{unit}'" if unit else "the root"
            raise UserError(
                f"fsdp2 config: {examples}, but both are in one unit, {where}, which must have one dtype. Set "
                "param_dtype: bf16, which keeps all of them in fp32 and casts for computing; or list the modules of "
                "one dtype in sub_modules_to_wrap; or build the model in one dtype."
            )
