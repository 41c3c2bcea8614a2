"""One module of the candidate, run from the reference's inputs: is it this module that computes something else?

Three opinions are compared: what the reference has recorded, what the candidate's module makes of the same inputs, and
what the same module makes of them in float64 on the CPU. How far two correct runs of the module may be apart is
measured, by replaying it with its inputs and the outputs of the modules inside moved by half a unit in the last place.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mindspeed_mm.precision.recording.perturb import Perturbation
from mindspeed_mm.precision.recording.values import named_inputs, named_outputs
from mindspeed_mm.precision.records.record import Call

_REPLAYS = 4
_SAFETY = 3.0
# Of a tensor's norm; rounding of the last operation alone is about a third of the dtype's eps.
_FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


@dataclass(frozen=True)
class Opinion:
    """One tensor of a module's replay; distances are relative to the norm of the reference's.

    Attributes:
        what: ``output.0``, ``grad_input.0``, or ``gradient <parameter>``.
        apart: candidate and reference.
        noise: the candidate and its perturbed self.
        candidate_error, reference_error: each from what the module gives in float64.
        bias: how much longer the reference is than the candidate, as a part of it; rounding cancels in it.
        bias_noise: the same of the perturbed candidate.
        note: a difference that is no number.
    """

    what: str
    apart: float
    noise: float
    candidate_error: float
    reference_error: float
    bias: float
    bias_noise: float
    floor: float
    note: str = ""

    @property
    def differs(self) -> bool:
        """Whether candidate and reference are apart by more than the module's own rounding explains."""
        if self.note:
            return True
        if self.apart > _SAFETY * self.noise + self.floor and self.apart > 1.5 * self.candidate_error:
            return True
        return abs(self.bias) > 2 * _SAFETY * self.bias_noise + 0.1 * self.floor and self.apart > 0.1 * self.floor

    def __str__(self) -> str:
        if self.note:
            return f"{self.what}: {self.note}"
        nearer = "the candidate" if self.candidate_error < self.reference_error else "the reference"
        return (
            f"{self.what}: {self.apart:.2g} apart, rounding explains {self.noise:.2g}; from this module in float64 the "
            f"candidate is {self.candidate_error:.2g} away and the reference {self.reference_error:.2g}: {nearer} is "
            "nearer"
        )


def replay_module(module: nn.Module, call: Call, parameters: Mapping[str, Tensor] | None = None) -> list[Opinion]:
    """Run a module forward and backward as the reference's was run, and say how far the results are apart.

    Args:
        module: the candidate's; left as it is. Its forward is called, its own hooks are not.
        call: what the reference's module was given, what it made of it, and the gradient that came back.
        parameters: the reference's, by name inside the module; others are the module's own.

    Returns:
        One opinion for each output, each gradient of an input, and each that cannot be compared.
    """
    module = copy.deepcopy(module)
    _drop_hooks(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameters and name in parameters:
                parameter.copy_(parameters[name].reshape(parameter.shape))
    expected = {
        n: t for n, t in call.tensors.items() if n.startswith(("output", "grad_input")) and t.is_floating_point()
    }
    _cast_parameters(module, _compute_dtype(call))
    mine = _run(module, call, None)
    truth = _run(copy.deepcopy(module).double(), call, None, torch.float64)
    moved = [_run(module, call, Perturbation(seed)) for seed in range(1, _REPLAYS + 1)]
    opinions = []
    for name, reference in expected.items():
        if name not in mine:
            continue
        opinions.append(_opinion(name, reference, mine[name], truth.get(name), [m[name] for m in moved if name in m]))
    return opinions


def _opinion(what: str, reference: Tensor, mine: Tensor, truth: Tensor | None, moved: Sequence[Tensor]) -> Opinion:
    note = ""
    if mine.shape != reference.shape:
        note = f"shape {tuple(mine.shape)}, in the reference {tuple(reference.shape)}"
    elif mine.dtype != reference.dtype:
        note = f"computed in {_word(mine.dtype)}, in the reference in {_word(reference.dtype)}"
    if mine.shape != reference.shape:
        return Opinion(what, math.inf, 0.0, math.inf, math.inf, math.inf, 0.0, 0.0, note)
    norm = max(float(reference.double().norm()), 1e-30)

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm()) / norm

    def longer(a: Tensor) -> float:
        return float(a.double().norm() - mine.double().norm()) / norm

    return Opinion(
        what,
        apart=relative(mine, reference),
        noise=max((relative(m, mine) for m in moved), default=0.0),
        candidate_error=math.nan if truth is None else relative(mine, truth),
        reference_error=math.nan if truth is None else relative(reference, truth),
        bias=longer(reference),
        bias_noise=max((abs(longer(m)) for m in moved), default=0.0),
        floor=_FLOOR.get(reference.dtype, 2e-6),
        note=note,
    )


def _run(
    module: nn.Module, call: Call, noise: Perturbation | None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the outputs and the gradients of the inputs, under the names of keys."""

    def prepared(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if value.is_floating_point():
            value = value.to(dtype or value.dtype)
            if noise is not None:
                value = noise(value)
            value.requires_grad_(True)
        return value

    args, kwargs = tree_map(prepared, (call.args, call.kwargs))
    if noise is not None:
        noise.attach(module)
    try:
        output = module.forward(*args, **kwargs)
    finally:
        if noise is not None:
            noise.detach()
    if noise is not None and next(module.children(), None) is None:
        output = noise(output)  # its hook does not fire where forward is called
    found = {f"output.{name}": tensor for name, tensor in named_outputs(output)}
    inputs = {f"grad_input.{name}": t for name, t in _inputs(module, args, kwargs).items() if t.requires_grad}
    heads = {f"grad_output.{n.removeprefix('output.')}": t for n, t in found.items() if t.requires_grad}
    known = {name: tensor for name, tensor in heads.items() if name in call.tensors}
    if known and inputs:
        seeds = [call.tensors[name].to(tensor.dtype).reshape(tensor.shape) for name, tensor in known.items()]
        gradients = torch.autograd.grad(list(known.values()), list(inputs.values()), seeds, allow_unused=True)
        found.update({name: g for name, g in zip(inputs, gradients, strict=True) if g is not None})
    return {name: tensor.detach() for name, tensor in found.items()}


def _inputs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors a module was called with, under the numbers they have in keys."""
    parameters = inspect.signature(module.forward).parameters.values()
    arguments = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return {name: tensor for name, _, tensor in named_inputs(arguments, args, kwargs)}


def _compute_dtype(call: Call) -> torch.dtype | None:
    """Return the 16-bit dtype that the module computed in, going by its outputs; None for its parameters' own."""
    outputs = {t.dtype for n, t in call.tensors.items() if n.startswith("output") and t.is_floating_point()}
    return outputs.pop() if len(outputs) == 1 and next(iter(outputs)).itemsize == 2 else None


def _cast_parameters(module: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)


def _drop_hooks(module: nn.Module) -> None:
    for inner in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(inner, name).clear()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
