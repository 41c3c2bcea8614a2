"""Which device we run on: the only package that names cuda, npu or cpu.

Everything else asks here: the device and its collective library, its memory, its random state, what it can
profile, which kernels of other libraries run on it, and how megatron-core is imported.
"""

from mindspeed_mm.accelerator.attention import attend, attend_block, attend_each, block_gradients
from mindspeed_mm.accelerator.backend import default_backend, resolve_backend
from mindspeed_mm.accelerator.determinism import Condition, conditions
from mindspeed_mm.accelerator.hardware import (
    device,
    device_count,
    device_name,
    device_type,
    empty_cache,
    has_float64,
    has_fused_optimizers,
    is_cpu,
    memory_stats,
    peak_flops,
    set_device,
    synchronize,
    wants_pinned_memory,
)
from mindspeed_mm.accelerator.host_read import HostRead
from mindspeed_mm.accelerator.kernels import fused_linear_cross_entropy
from mindspeed_mm.accelerator.megatron_core import has_transformer_engine, load_megatron_core, prepare_megatron_layers
from mindspeed_mm.accelerator.numerics import allow_tf32, determinism_limits, full_float32, use_deterministic_algorithms
from mindspeed_mm.accelerator.profiling import memory_history, memory_snapshot, profiler_activities
from mindspeed_mm.accelerator.rng import rng_state, seed_all, set_rng_state

__all__ = [
    "Condition",
    "HostRead",
    "allow_tf32",
    "attend",
    "attend_block",
    "attend_each",
    "block_gradients",
    "conditions",
    "default_backend",
    "determinism_limits",
    "device",
    "device_count",
    "device_name",
    "device_type",
    "empty_cache",
    "full_float32",
    "fused_linear_cross_entropy",
    "has_float64",
    "has_fused_optimizers",
    "has_transformer_engine",
    "is_cpu",
    "load_megatron_core",
    "memory_history",
    "memory_snapshot",
    "memory_stats",
    "peak_flops",
    "prepare_megatron_layers",
    "profiler_activities",
    "resolve_backend",
    "rng_state",
    "seed_all",
    "set_device",
    "set_rng_state",
    "synchronize",
    "use_deterministic_algorithms",
    "wants_pinned_memory",
]
