"""What decides, on this device, whether a run can be repeated bit for bit: one row for each switch and library."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mindspeed_mm.accelerator.backend import default_backend
from mindspeed_mm.accelerator.hardware import device_type
from mindspeed_mm.accelerator.numerics import _VARIABLES


@dataclass(frozen=True)
class Condition:
    """One thing that repeatable numbers depend on.

    Attributes:
        name: of the switch, variable or library.
        value: that is in force.
        repeatable: whether numbers are repeatable with it; None where it only has to be the same in both runs.
        contradicts: whether it stays like that when determinism is asked for, so that the two cannot go together.
        advice: what to do, or what has to stay the same.
    """

    name: str
    value: str
    repeatable: bool | None
    contradicts: bool = False
    advice: str = ""


def conditions(environment: Mapping[str, str] | None = None, backend: str | None = None) -> list[Condition]:
    """Return what is in force in this process.

    Args:
        environment: variables to look at instead of this process's.
        backend: of the collectives, as ``--distributed-backend`` takes it; None for this device's own.
    """
    variables = os.environ if environment is None else environment
    kind = device_type()
    rows = [*_torch(), *_device(kind, variables), *_attention(kind, variables)]
    for name in dict.fromkeys(part.rpartition(":")[2] for part in (backend or default_backend()).split(",")):
        rows += _collectives(name, variables)
    return [*rows, *_python(variables)]


def _torch() -> Iterator[Condition]:
    on, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield Condition(
        "deterministic algorithms of torch",
        ("on, only warns" if warns else "on") if on else "off",
        on and not warns,
        on and warns,
        "" if on and not warns else "--use-deter-comp turns them on",
    )
    precision = torch.get_float32_matmul_precision()
    advice = "" if precision == "highest" else "fp32 products round their inputs: leave --allow-tf32 out to align"
    yield Condition("precision of fp32 matrix products", precision, None, advice=advice)


def _device(kind: str, variables: Mapping[str, str]) -> Iterator[Condition]:
    for name, wanted in _VARIABLES[kind].items():
        found = variables.get(name)
        good = found is not None and found.lower() == wanted.lower()
        also = name == "CUBLAS_WORKSPACE_CONFIG" and found == ":16:8"
        yield Condition(
            name,
            found or "not set",
            good or also,
            found is not None and not (good or also),
            "" if good or also else f"export {name}={wanted}; --use-deter-comp sets it where it is not set",
        )
    if kind == "cuda":
        benchmark, fixed = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
        yield Condition("cuDNN", f"deterministic={fixed}, benchmark={benchmark}", fixed and not benchmark)
        yield Condition("TF32 of cuDNN", str(torch.backends.cudnn.allow_tf32), None)
    if kind == "cpu":
        yield Condition(
            "threads", str(torch.get_num_threads()), None, advice="keep OMP_NUM_THREADS and the kind of CPU"
        )


def _attention(kind: str, variables: Mapping[str, str]) -> Iterator[Condition]:
    if kind != "cuda":
        yield Condition("scaled_dot_product_attention", "math and fused kernels of the device", True)
        return
    fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
    on = torch.are_deterministic_algorithms_enabled()
    yield Condition(
        "scaled_dot_product_attention",
        "fused kernels allowed" if fused else "math only",
        on or not fused,
        advice="" if on or not fused else "its fused backward adds in any order unless algorithms are deterministic",
    )
    for name, wanted, what in (
        ("FLASH_ATTENTION_DETERMINISTIC", "1", "flash_attention_2 and 3"),
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0", "TransformerEngine"),
    ):
        found = variables.get(name)
        advice = "" if found == wanted else f"export {name}={wanted} where {what} is used"
        yield Condition(name, found or "not set", None if found is None else found == wanted,
                        found is not None and found != wanted, advice)  # fmt: skip


def _collectives(name: str, variables: Mapping[str, str]) -> Iterator[Condition]:
    if name == "gloo":
        yield Condition("gloo", "adds in an order that the ranks fix", True, advice="keep the number of ranks")
    elif name == "nccl":
        chosen = variables.get("NCCL_ALGO")
        in_switch = any("nvls" in part.lower() and not part.startswith("^") for part in (chosen or "").split(","))
        advice = "sums follow topology, version and algorithm: export NCCL_ALGO=Ring, or Tree, to fix it"
        if in_switch:
            advice = "NVLS adds in the switch; use Ring or Tree"
        yield Condition("NCCL_ALGO", chosen or "not set", False if in_switch else None, in_switch, advice)
    elif name == "hccl":
        yield Condition("hccl", "HCCL_DETERMINISTIC decides", None, advice="keep the CANN version and the machines")
    else:
        yield Condition(name, "nothing is known about it", None, advice="compare two runs of the same settings")


def _python(variables: Mapping[str, str]) -> Iterator[Condition]:
    seed = variables.get("PYTHONHASHSEED", "random")
    fixed = seed != "random" or not sys.flags.hash_randomization
    yield Condition("PYTHONHASHSEED", seed, fixed, advice="" if fixed else "export PYTHONHASHSEED=0 before the start")
