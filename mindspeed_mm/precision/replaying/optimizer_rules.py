"""One optimizer step as a formula, with the variations that implementations differ in, and as torch makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

ADAM_STATE = ("exp_avg", "exp_avg_sq")
SGD_STATE = ("momentum_buffer",)


@dataclass(frozen=True)
class Setting:
    """What decides one parameter's update, beside its gradient and state.

    Attributes:
        rule: ``adam`` or ``sgd``.
        lr, beta1, beta2, eps, weight_decay, momentum: as everywhere; ``beta1`` and ``beta2`` of Adam.
        decoupled: the decay shrinks the parameter (AdamW) instead of joining the gradient (L2).
        bias_correction: Adam's averages are divided by ``1 - beta**t``.
        eps_form: ``after`` the square root of the corrected average (torch), ``inside`` that root, or ``before`` the
            correction (TensorFlow's "epsilon hat", and Transformers' own old AdamW).
        nesterov: of SGD.
        gradient_scale: what the gradient is multiplied with first: clipping, and losses of another scale.
        extra_steps: added to the number of steps made so far.
        parameter_dtype: what parameters are rounded to after the update, where no copy in fp32 is kept.
    """

    rule: str = "adam"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    decoupled: bool = True
    bias_correction: bool = True
    eps_form: str = "after"
    nesterov: bool = False
    gradient_scale: float = 1.0
    extra_steps: int = 0
    parameter_dtype: str = "float32"

    @classmethod
    def of_group(cls, optimizer: str, group: Mapping[str, Any]) -> Setting | None:
        """Read a torch parameter group of an optimizer of this class name; None for a rule that is not known here."""
        name = optimizer.lower()
        lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
        if "rms" in group or ("muon" in name and "betas" not in group):
            return None
        if "betas" in group:
            decoupled = group.get("decoupled_weight_decay", group.get("adam_w_mode", name != "adam"))
            beta1, beta2 = map(float, group["betas"])
            return cls(
                lr=lr,
                weight_decay=decay,
                beta1=beta1,
                beta2=beta2,
                eps=float(group["eps"]),
                decoupled=bool(decoupled),
                bias_correction=bool(group.get("bias_correction", True)),
            )
        if "sgd" in name:
            momentum, nesterov = float(group["momentum"]), bool(group.get("nesterov"))
            return cls("sgd", lr=lr, weight_decay=decay, momentum=momentum, nesterov=nesterov)
        return None


@dataclass(frozen=True)
class ParameterStep:
    """One parameter's optimizer step as a run made it; tensors of any one shape.

    Attributes:
        parameter, gradient, state: what went in; no state before the first step.
        step: how many steps the state has seen.
        new_parameter, new_state: what came out.
    """

    parameter: Tensor
    gradient: Tensor
    new_parameter: Tensor
    new_state: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0


def predict(setting: Setting, given: ParameterStep) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the new parameter and the new state by the formula, in float64.

    Adam as in Kingma and Ba (2015), decoupled decay as in Loshchilov and Hutter (2019); SGD as torch writes it.
    """
    parameter = given.parameter.double()
    gradient = given.gradient.double() * setting.gradient_scale
    if setting.weight_decay and not (setting.decoupled and setting.rule == "adam"):
        gradient = gradient + setting.weight_decay * parameter
    old = {name: value.double() for name, value in given.state.items()}
    if setting.rule == "sgd":
        new, state = _sgd(setting, parameter, gradient, old)
    else:
        new, state = _adam(setting, parameter, gradient, old, given.step + 1 + setting.extra_steps)
    if setting.parameter_dtype != "float32":
        new = new.to(getattr(torch, setting.parameter_dtype)).double()
    return new, state


def _adam(
    setting: Setting, parameter: Tensor, gradient: Tensor, old: dict[str, Tensor], step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    first, second = (old.get(name, torch.zeros_like(parameter)) for name in ADAM_STATE)
    first = setting.beta1 * first + (1 - setting.beta1) * gradient
    second = setting.beta2 * second + (1 - setting.beta2) * gradient.square()
    corrected = 1 - setting.beta1**step if setting.bias_correction else 1.0
    corrected_sq = 1 - setting.beta2**step if setting.bias_correction else 1.0
    if setting.eps_form == "inside":
        denominator = (second / corrected_sq + setting.eps).sqrt()
    elif setting.eps_form == "before":
        denominator = (second.sqrt() + setting.eps) / corrected_sq**0.5
    else:
        denominator = (second / corrected_sq).sqrt() + setting.eps
    direction = torch.nan_to_num(first / corrected / denominator, nan=0.0)  # 0 / 0 without eps
    shrunk = parameter * (1 - setting.lr * setting.weight_decay) if setting.decoupled else parameter
    return shrunk - setting.lr * direction, dict(zip(ADAM_STATE, (first, second), strict=True))


def _sgd(
    setting: Setting, parameter: Tensor, gradient: Tensor, old: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    if not setting.momentum:
        return parameter - setting.lr * gradient, {}
    buffer = old.get(SGD_STATE[0])
    buffer = gradient if buffer is None else setting.momentum * buffer + gradient
    direction = gradient + setting.momentum * buffer if setting.nesterov else buffer
    return parameter - setting.lr * direction, {SGD_STATE[0]: buffer}


def torch_step(
    optimizer: str, groups: Sequence[Mapping[str, Any]], given: Mapping[str, ParameterStep]
) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Let torch's optimizer of this class name make the step: bit for bit what a plain training script does.

    Args:
        optimizer: a class of ``torch.optim``; a class of ours that inherits from AdamW counts as AdamW.
        groups: torch's parameter groups with ``names`` instead of ``params``.
        given: the parameters by name; names without an entry are left out.

    Returns:
        The new parameter and the new state of each, in the dtypes that torch has.

    Raises:
        LookupError: torch has no optimizer of that name.
    """
    name = {"EMAAdamW": "AdamW", "FusedAdam": "AdamW"}.get(optimizer, optimizer)
    kind = getattr(torch.optim, name, None)
    if kind is None:
        raise LookupError(f"torch.optim has no {optimizer}")
    parameters = {n: torch.nn.Parameter(step.parameter.clone()) for n, step in given.items()}
    known = set(kind([torch.nn.Parameter(torch.zeros(1))], **({"lr": 0.1} if name == "SGD" else {})).param_groups[0])
    torch_groups = []
    for group in groups:
        options = {key: value for key, value in group.items() if key in known and key not in ("params", "initial_lr")}
        if members := [parameters[n] for n in group["names"] if n in parameters]:
            torch_groups.append({**options, "params": members})
    made = kind(torch_groups, **({"lr": 0.1} if name == "SGD" else {}))
    for n, parameter in parameters.items():
        parameter.grad = given[n].gradient.clone()
        if given[n].state:
            state = {key: value.clone() for key, value in given[n].state.items()}
            made.state[parameter] = {"step": torch.tensor(float(given[n].step)), **state}
    made.step()
    wanted = (*ADAM_STATE, *SGD_STATE)
    return {
        n: (p.detach(), {k: v for k, v in made.state[p].items() if k in wanted and v is not None})
        for n, p in parameters.items()
    }


def with_value(setting: Setting, name: str, value: Any) -> Setting:
    """Return the setting with one field changed."""
    return replace(setting, **{name: value})
