"""fsdp2_config.yaml: how a model is sharded, recomputed and offloaded.

Module lists hold paths from the first level of the model. ``{*}`` stands for all children of a container, ``{0-23}``
for a range and ``{1,3,5}`` for a list: ``text_decoder.decoder.layers.{*}``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mindspeed_mm.configs.base import Config, Count, Positive, load_config

DtypeName = Literal["bf16", "fp16", "fp32"]


class Fsdp2Config(Config):
    """fsdp2_config.yaml; the defaults are the documented ones."""

    # What is sharded, and over how many ranks.
    sharding_size: Positive | Literal["auto"] | None = None  # ranks that share one copy; auto: all; null: 1
    sub_modules_to_wrap: list[str] | None = None  # gathered one by one; null: the model's own choice; root is last
    ignored_modules: list[str] | None = None  # left whole on every rank
    replicate_frozen_mib: Count = 64  # frozen towers are left whole too, unless listed, while they fit in this
    reshard_after_forward: bool | Positive = True  # true: ZeRO-3; false: ZeRO-2; int: reshard to so many ranks

    # Number formats; null leaves the model's.
    param_dtype: DtypeName | None = None  # parameters while they compute
    reduce_dtype: DtypeName | None = None  # gradients while they are reduced
    output_dtype: DtypeName | None = None  # what forward returns
    cast_forward_inputs: bool = True  # inputs of forward are cast to param_dtype

    # Memory.
    recompute_modules: list[str] | None = None  # activations are computed again in backward
    recompute_keep: Literal["matmul"] | None = None  # what they keep all the same; matmul: products and attention
    use_reentrant: bool = True  # which of torch's two checkpoint implementations recomputes
    offload_to_cpu: bool = False  # parameters, gradients and optimizer state live in host memory
    pin_memory: bool = False  # with offload_to_cpu: page-locked, for faster copies

    # Overlap of communication with computation.
    num_to_forward_prefetch: Count = 0  # wrapped modules gathered ahead of the one that runs forward
    num_to_backward_prefetch: Count = 1  # ... backward

    # Mixture of experts.
    expert_parallel_size: Literal[1] = 1  # ranks that share the experts of a layer; more is not supported yet
    moe_modules: list[str] | None = None  # the modules that hold experts
    reshard_local_experts: bool | Positive = True  # like reshard_after_forward, for the experts of a rank
    align_fsdp_param_groups: bool = False  # norms and gates of all layers form one group (Qwen3-VL)


def load_fsdp2_config(path: str | Path | None) -> Fsdp2Config:
    """Load ``--fsdp2-config-path``; without a path, the defaults.

    Raises:
        UserError: the file cannot be read or has a key or value that is not documented.
    """
    return load_config(Fsdp2Config, path) if path else Fsdp2Config()
