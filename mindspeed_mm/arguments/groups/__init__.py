"""Every flag of the command line, by group, in the order of ``--help``."""

from __future__ import annotations

from mindspeed_mm.arguments.flag import Flag
from mindspeed_mm.arguments.groups.checkpoint import CHECKPOINT
from mindspeed_mm.arguments.groups.finetuning import AUTOMATIC_PARALLELISM, LORA, PREFERENCE
from mindspeed_mm.arguments.groups.logging import LOGGING
from mindspeed_mm.arguments.groups.model import KERNELS, MODEL, MOE
from mindspeed_mm.arguments.groups.multimodal import BALANCE, MULTIMODAL
from mindspeed_mm.arguments.groups.optimizer import LEARNING_RATE, OPTIMIZER
from mindspeed_mm.arguments.groups.parallel import DISTRIBUTED, FSDP2, PARALLEL, RECOMPUTE
from mindspeed_mm.arguments.groups.precision import PRECISION
from mindspeed_mm.arguments.groups.training import EVALUATION, STOPPING, TRAINING

GROUPS = (
    MULTIMODAL,
    TRAINING,
    LEARNING_RATE,
    OPTIMIZER,
    FSDP2,
    DISTRIBUTED,
    CHECKPOINT,
    LOGGING,
    PRECISION,
    EVALUATION,
    STOPPING,
    BALANCE,
    LORA,
    PREFERENCE,
    MODEL,
    KERNELS,
    MOE,
    PARALLEL,
    RECOMPUTE,
    AUTOMATIC_PARALLELISM,
)

FLAGS: dict[str, Flag] = {flag.name: flag for group in GROUPS for flag in group.flags}
"""Every declared flag by its documented name."""
