"""What a model and its optimizer are really set to, read from the objects that train, not from what asked for it."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mindspeed_mm.checkpoint.tensors import clean_name
from mindspeed_mm.models.common.lookup import lookup
from mindspeed_mm.precision.recording.sites import innermost

_EPS = ("eps", "variance_epsilon", "epsilon")
_VARIABLES = ("NCCL_", "HCCL_", "LCCL_", "CUBLAS", "CUDA_", "ASCEND_", "NPU_", "ATB_", "CLOSE_MATMUL", "NVTE_", "OMP_")
_MORE_VARIABLES = ("PYTORCH_", "TORCH_", "MKL_", "PYTHONHASHSEED", "TASK_QUEUE_ENABLE", "COMBINED_ENABLE")


def effective_values(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Return what is in force, as plain values. The host reads a few small tensors of the device.

    Returns:
        ``settings``, one value each under the names of the tables in ``precision/settings/keys``, those that the whole
        model has in common; ``norm_eps``, ``dropout``, ``rope_base`` and ``activation`` by module; ``dtypes`` and
        ``frozen`` of parameters; ``groups`` of the optimizer; ``mixed_precision`` and ``mesh`` of FSDP; ``numerics`` of
        torch; ``environment``, the variables that libraries read; ``config`` of a Hugging Face model.
    """
    model = innermost(model)
    modules = {clean_name(f"{path}.").removesuffix("."): module for path, module in model.named_modules()}
    parameters = [(clean_name(name), parameter) for name, parameter in model.named_parameters()]
    found: dict[str, Any] = {
        "class": type(model).__name__,
        **of_modules(list(modules.items())),
        "dtypes": dict(Counter(str(parameter.dtype).removeprefix("torch.") for _, parameter in parameters)),
        "parameters": sum(parameter.numel() for _, parameter in parameters),
        "frozen": [name for name, parameter in parameters if not parameter.requires_grad],
        "mixed_precision": _mixed_precision(model),
        "mesh": _mesh(model),
    }
    config: Any = next((module.config for module in modules.values() if hasattr(module, "config")), None)
    if hasattr(config, "to_dict"):
        found["config"] = config.to_dict()
        found["attention"] = getattr(config, "_attn_implementation", None)
    names = {id(parameter): name for name, parameter in parameters}
    groups = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups] if optimizer else []
    return complete(found, optimizer, groups)


def of_modules(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, dict[str, Any]]:
    """Return what modules are set to: tables by module, for each setting."""
    return {
        "norm_eps": {path: eps for path, module in modules if (eps := _eps(module)) is not None},
        "dropout": {path: p for path, module in modules if (p := _dropout(module)) is not None},
        "rope_base": {path: base for path, module in modules if (base := _rope_base(module)) is not None},
        "activation": {path: type(m).__name__ for path, m in modules if path.endswith(("act_fn", ".act"))},
    }


def complete(found: dict[str, Any], optimizer: Optimizer | None, groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Add what does not depend on how the model is laid out.

    Args:
        found: tables by module, and what is known of the parameters.
        optimizer: None without.
        groups: names of the parameters in each of its groups.
    """
    found |= {"numerics": _numerics(), "environment": dict(_environment())}
    if optimizer is not None:
        found["optimizer"] = type(optimizer).__name__
        found["groups"] = [
            group_settings(group) | {"parameters": list(names)}
            for group, names in zip(optimizer.param_groups, groups, strict=True)
        ]
    found["settings"] = dict(_settings(found))
    return found


def _settings(found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what holds for the whole model, under the names by which settings of other systems are known."""
    for name, table in (("norm_eps", "norm_eps"), ("rope_base", "rope_base")):
        text = [value for path, value in found[table].items() if not _is_vision(path)]
        if len(set(text)) == 1:
            yield name, text[0]
    if len(eps := {value for path, value in found["norm_eps"].items() if _is_vision(path)}) == 1:
        yield "vision_norm_eps", eps.pop()
    for group in found.get("groups", [])[:1]:
        if "betas" in group:
            yield from zip(("beta1", "beta2"), group["betas"], strict=True)
        if "eps" in group:
            yield "eps", group["eps"]
    yield "tf32", found["numerics"]["float32_matmul_precision"] != "highest"
    yield "deterministic", found["numerics"]["deterministic_algorithms"]
    if len(found["dtypes"]) == 1:
        yield "parameter_dtype", next(iter(found["dtypes"]))
    if (policy := found["mixed_precision"]) and policy["reduce_dtype"]:
        yield "grad_reduce_dtype", policy["reduce_dtype"]
    if policy and policy["param_dtype"]:
        yield "compute_dtype", policy["param_dtype"]


def _is_vision(path: str) -> bool:
    return any(part in path for part in ("visual", "vision", "image_encoder"))


def _eps(module: nn.Module) -> float | None:
    if "norm" not in type(module).__name__.lower():
        return None
    return next((value for name in _EPS if isinstance(value := getattr(module, name, None), float)), None)


def _dropout(module: nn.Module) -> float | None:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p or None
    values = (getattr(module, name, None) for name in ("attention_dropout", "dropout"))
    return next((value for value in values if isinstance(value, float) and value), None)


def _rope_base(module: nn.Module) -> float | None:
    """Return the base of a rotary embedding: its frequencies are ``base ** (-2 i / d)``, scaled ones apart."""
    frequencies = getattr(module, "inv_freq", None)
    if not isinstance(frequencies, Tensor) or frequencies.is_meta or frequencies.numel() < 2:
        return None
    configured = lookup(getattr(module, "config", None) or {}, "rope_parameters.rope_theta", None)
    first, second = frequencies.detach().reshape(-1)[:2].double().tolist()
    if first <= 0 or second <= 0:
        return None
    base = math.exp(math.log(first / second) * frequencies.numel())
    # What it was set to, where that is what its float32 frequencies say.
    return float(configured) if configured and abs(base / configured - 1) < 1e-4 else float(f"{base:.6g}")


def _mixed_precision(model: nn.Module) -> dict[str, Any]:
    """Return the policy of the outermost FSDP unit; empty without."""
    unit: Any = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    policy = getattr(unit._get_fsdp_state(), "_mp_policy", None) if unit is not None else None
    if policy is None:
        return {}
    names = ("param_dtype", "reduce_dtype", "output_dtype")
    dtypes = {name: getattr(policy, name) for name in names}
    return {name: None if dtype is None else str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}


def _mesh(model: nn.Module) -> dict[str, int]:
    parameter = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if parameter is None:
        return {}
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or [str(dimension) for dimension in range(mesh.ndim)]
    return {name: mesh.size(dimension) for dimension, name in enumerate(names)}


def _numerics() -> dict[str, Any]:
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in sorted(os.environ.items()):
        if name.startswith((*_VARIABLES, *_MORE_VARIABLES)):
            yield name, value


def group_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an optimizer's group says beside its parameters, as plain values."""
    return {key: _plain(value) for key, value in group.items() if key != "params"}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
