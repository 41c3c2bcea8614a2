"""Stand-in for the typed ``fsdp2_config.yaml``."""

from __future__ import annotations

from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

DType = Literal["bf16", "fp16", "fp32"]


class Fsdp2Config(BaseModel):
    """The documented keys of ``fsdp2_config.yaml``."""

    model_config = ConfigDict(extra="forbid")

    sharding_size: int | Literal["auto"] | None = None
    sub_modules_to_wrap: list[str] | None = None
    reshard_after_forward: bool | int = True
    param_dtype: DType | None = None
    reduce_dtype: DType | None = None
    output_dtype: DType | None = None
    cast_forward_inputs: bool = True
    offload_to_cpu: bool = False
    pin_memory: bool = False
    num_to_forward_prefetch: int = 0
    num_to_backward_prefetch: int = 1
    ignored_modules: list[str] | None = None
    recompute_modules: list[str] | None = None
    use_reentrant: bool = True
    align_fsdp_param_groups: bool = False
    expert_parallel_size: Literal[1] = 1
    reshard_local_experts: bool | int = True
    moe_modules: list[str] | None = None


def load_fsdp2_config(path: str | None) -> Fsdp2Config:
    """Read ``path``, or return the defaults when there is none."""
    if not path:
        return Fsdp2Config()
    with open(path, encoding="utf-8") as f:
        return Fsdp2Config(**(yaml.safe_load(f) or {}))
