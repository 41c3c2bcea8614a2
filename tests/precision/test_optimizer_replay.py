"""The optimizer replay against plain torch optimizers: bit-equal on the right setting, the cause of a wrong one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mindspeed_mm.precision.replaying.optimizer_replay import differences, explain
from mindspeed_mm.precision.replaying.optimizer_rules import ParameterStep, Setting, torch_step

SHAPES = {"a.weight": (24, 16), "a.bias": (24,), "b.weight": (16, 24), "b.norm.weight": (16,), "c.bias": (7,)}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]
VECTORS = [name for name in SHAPES if name not in MATRICES]
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}


def groups(decay: float = 0.1, decay_of_vectors: float = 0.0, **options: Any) -> list[dict[str, Any]]:
    return [
        {"names": MATRICES, "weight_decay": decay, **ADAM, **options},
        {"names": VECTORS, "weight_decay": decay_of_vectors, **ADAM, **options},
    ]


def plain_steps(
    kind: type[torch.optim.Optimizer],
    described: list[dict[str, Any]],
    steps: int,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    gradient_size: float = 1e-3,
    **options: Any,
) -> tuple[dict[str, ParameterStep], dict[str, tuple[Tensor, dict[str, Tensor]]]]:
    """Train with a plain torch optimizer and return its last step; the zero-gradient bias gets rounding noise."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for name, shape in SHAPES.items()
    }
    optimizer = kind(
        [
            {**{k: v for k, v in group.items() if k != "names"}, "params": [parameters[n] for n in group["names"]]}
            for group in described
        ],
        **options,
    )
    for index in range(steps):
        seen = {}
        for name, parameter in parameters.items():
            size = 1e-11 if name == "c.bias" else gradient_size
            gradient = torch.randn(parameter.shape, generator=generator) * size
            parameter.grad = (gradient * scale).to(dtype)
            state = {
                key: value.clone()
                for key, value in optimizer.state.get(parameter, {}).items()
                if torch.is_tensor(value)
            }
            count = int(state.pop("step", torch.tensor(index)))
            seen[name] = (parameter.detach().clone(), gradient, state, count)
        optimizer.step()
    made, results = {}, {}
    for name, parameter in parameters.items():
        new_state = {k: v.clone() for k, v in optimizer.state[parameter].items() if torch.is_tensor(v) and k != "step"}
        before, gradient, state, count = seen[name]
        results[name] = (parameter.detach().clone(), new_state)
        made[name] = ParameterStep(before, gradient, parameter.detach().clone(), new_state, state, count)
    return made, results


def settings(described: list[dict[str, Any]], optimizer: str = "AdamW") -> dict[str, Setting]:
    found = {}
    for group in described:
        setting = Setting.of_group(optimizer, group)
        assert setting is not None
        found.update(dict.fromkeys(group["names"], setting))
    return found


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD"])
def test_torch_step_is_bit_equal(optimizer: str, how: dict[str, Any], steps: int) -> None:
    described = groups()
    if optimizer == "SGD":
        described = [{"names": g["names"], "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1} for g in described]
    described = [{**group, **how} for group in described]
    made, results = plain_steps(getattr(torch.optim, optimizer), described, steps)
    for name, (parameter, state) in torch_step(optimizer, described, made).items():
        assert torch.equal(parameter, results[name][0]), name
        assert state.keys() == results[name][1].keys()
        assert all(torch.equal(value, results[name][1][key]) for key, value in state.items()), name


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("how", [{}, {"fused": True}])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_the_right_setting_explains_every_step(kind: Any, how: dict[str, Any], steps: int) -> None:
    made, _ = plain_steps(kind, [{**group, **how} for group in groups()], steps)
    assert not explain(made, settings(groups(), kind.__name__)).deviating


def test_the_right_setting_of_sgd() -> None:
    described = [{"names": list(SHAPES), "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}]
    made, _ = plain_steps(torch.optim.SGD, described, 3)
    assert not explain(made, settings(described, "SGD")).deviating
    wrong = [{**described[0], "momentum": 0.8}]
    (cause,) = explain(made, settings(wrong, "SGD")).causes
    assert (cause.name, pytest.approx(cause.found)) == ("momentum", 0.9)


CAUSES = {
    "lr": (groups(lr=1.01e-3), {}, 1.01e-3),
    "beta1": (groups(betas=(0.88, 0.95)), {}, 0.88),
    "beta2": (groups(betas=(0.9, 0.999)), {}, 0.999),
    "eps": (groups(eps=1e-6), {}, 1e-6),
    "weight_decay": (groups(decay=0.05), {}, 0.05),
    "gradient_scale": (groups(), {"scale": 0.37}, 0.37),
}


@pytest.mark.parametrize("declares", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", CAUSES)
def test_a_number_is_found(name: str, steps: int, declares: bool) -> None:
    described, options, value = CAUSES[name]
    made, _ = plain_steps(torch.optim.AdamW, described, steps, **options)
    found = explain(made, settings(groups()), settings(described) if declares else None)
    assert [cause.name for cause in found.causes] == [name] and not found.unexplained
    assert found.causes[0].found == pytest.approx(value, rel=2e-2)
    assert found.causes[0].declared == (declares and name != "gradient_scale")
    if name.startswith("beta"):
        assert found.earliest == {"beta1": "exp_avg", "beta2": "exp_avg_sq"}[name]


@pytest.mark.parametrize("steps", [1, 3])
def test_decay_of_biases_and_norms_is_a_matter_of_groups(steps: int) -> None:
    made, _ = plain_steps(torch.optim.AdamW, groups(decay_of_vectors=0.1), steps)
    (cause,) = explain(made, settings(groups())).causes
    assert cause.name == "weight_decay" and cause.limited and set(cause.parameters) <= set(VECTORS)
    assert {"a.bias", "b.norm.weight"} <= set(cause.parameters)


@pytest.mark.parametrize("steps", [1, 3])
def test_l2_decay_instead_of_decoupled(steps: int) -> None:
    made, _ = plain_steps(torch.optim.Adam, groups(), steps)
    (cause,) = explain(made, settings(groups())).causes
    assert (cause.name, cause.found) == ("decoupled", False)


class Variant(torch.optim.Optimizer):
    """Adam written out, with what some implementations do differently."""

    def __init__(self, params: Any, *, correct: bool = True, inside: bool = False, **defaults: Any) -> None:
        self.correct, self.inside = correct, inside
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=torch.tensor(0.0))
                state["step"] += 1
                count = float(state["step"])
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                first = state["exp_avg"] / (1 - beta1**count if self.correct else 1.0)
                second = state["exp_avg_sq"] / (1 - beta2**count if self.correct else 1.0)
                eps = group["eps"]
                root = (second + eps).sqrt() if self.inside else second.sqrt() + eps
                p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, root, value=-group["lr"])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("options", "name", "value"),
    [({"correct": False}, "bias_correction", False), ({"inside": True}, "eps_form", "inside")],
)
def test_switches_are_found(options: dict[str, Any], name: str, value: Any, steps: int) -> None:
    made, _ = plain_steps(Variant, groups(), steps, **options)
    (cause,) = explain(made, settings(groups())).causes
    assert (cause.name, cause.found) == (name, value)


def test_parameters_without_a_copy_in_fp32() -> None:
    made, _ = plain_steps(torch.optim.AdamW, groups(), 1)
    rounded = {name: replace(step, new_parameter=step.new_parameter.bfloat16().float()) for name, step in made.items()}
    (cause,) = explain(rounded, settings(groups())).causes
    assert (cause.name, cause.found) == ("parameter_dtype", "bfloat16")


def test_two_causes_at_once() -> None:
    described = groups(lr=2e-3, betas=(0.9, 0.999))
    made, _ = plain_steps(torch.optim.AdamW, described, 3)
    found = explain(made, settings(groups()))
    assert {cause.name for cause in found.causes} == {"lr", "beta2"} and not found.unexplained


def test_nothing_known_explains_random_updates() -> None:
    made, _ = plain_steps(torch.optim.AdamW, groups(), 2)
    random = {
        name: ParameterStep(
            s.parameter, s.gradient, s.parameter + torch.randn_like(s.parameter), s.new_state, s.state, 1
        )
        for name, s in made.items()
    }
    found = explain(random, settings(groups()))
    assert set(found.unexplained) == set(SHAPES) and not found.causes


def test_differences_of_declared_groups() -> None:
    found = differences(settings(groups()), settings(groups(decay_of_vectors=0.1, eps=1e-6)))
    assert found["eps"] == (1e-8, 1e-6, tuple(sorted(SHAPES)))
    assert found["weight_decay"] == (0.0, 0.1, tuple(sorted(VECTORS)))
    assert not differences(settings(groups(lr=1e-4)), settings(groups(lr=0.0001)))
