"""Which setting of the optimizer explains the step that a run has made.

The question is put to the run's own inputs: with its parameters, gradients and state before the step, does the
reference's setting give its parameters and state after it? Rounding noise in a gradient, which Adam blows up to the
size of the learning rate where the true gradient is zero, is then in what goes in and not in what is judged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.precision.replaying.optimizer_rules import (
    ADAM_STATE,
    SGD_STATE,
    ParameterStep,
    Setting,
    predict,
    with_value,
)

# What fused and looped steps of the same setting differ by: some compute 1 - beta2 in fp32.
_OF_UPDATE, _OF_STATE = 3e-5, 3e-5
_SAMPLES = 1024

_SWITCHES: dict[str, dict[str, tuple[Any, ...]]] = {
    "adam": {
        "decoupled": (True, False),
        "bias_correction": (True, False),
        "eps_form": ("after", "inside", "before"),
        "parameter_dtype": ("float32", "bfloat16", "float16"),
        "extra_steps": (0, 1, -1),
    },
    "sgd": {"nesterov": (False, True), "parameter_dtype": ("float32", "bfloat16", "float16")},
}
# Numbers, and the result that each is read from.
_NUMBERS: dict[str, dict[str, tuple[str, ...]]] = {
    "adam": {
        "weight_decay": ("update",),
        "lr": ("update",),
        "beta1": ("exp_avg",),
        "beta2": ("exp_avg_sq",),
        "eps": ("update",),
        "gradient_scale": ADAM_STATE,
    },
    "sgd": {
        "weight_decay": ("update",),
        "lr": ("update",),
        "momentum": SGD_STATE,
        "gradient_scale": (*SGD_STATE, "update"),
    },
}
_WORDS = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "decoupled": "form of the decay (decoupled, or L2 in the gradient)",
    "bias_correction": "bias correction",
    "eps_form": "place of eps",
    "parameter_dtype": "dtype in which parameters are kept (no copy in fp32)",
    "extra_steps": "step count of the bias correction",
    "gradient_scale": "factor on the gradient (clipping)",
}


@dataclass(frozen=True)
class Cause:
    """A setting that explains a difference.

    Attributes:
        name: a field of :class:`Setting`.
        expected, found: the reference's value, and the one that explains the candidate's step.
        parameters: those it explains.
        declared: the candidate's own parameter groups say so too.
        limited: it is the membership of parameter groups that differs: others have this value in the reference too, or
            others keep the reference's.
    """

    name: str
    expected: Any
    found: Any
    parameters: tuple[str, ...]
    declared: bool
    limited: bool

    def __str__(self) -> str:
        what = f"{_WORDS.get(self.name, self.name)}: {show(self.found)} instead of {show(self.expected)}"
        where = f" in the parameter groups of {len(self.parameters)} parameters" if self.limited else ""
        return what + where + (", as its parameter groups say" if self.declared else ", found by replay")


@dataclass(frozen=True)
class Explanation:
    """What a replay found.

    Attributes:
        deviating: parameters whose step is not the reference setting's, with what deviates most of it (``update`` or
            a state's name) and by how many tolerances.
        causes: what explains them, all together; empty where nothing known does.
        unexplained: the deviating parameters that remain.
    """

    deviating: dict[str, tuple[str, float]]
    causes: tuple[Cause, ...]
    unexplained: tuple[str, ...]

    @property
    def earliest(self) -> str:
        """What deviates first: the state, from which the update follows, if any state does."""
        found = {what for what, _ in self.deviating.values()}
        return next((name for name in (*ADAM_STATE, "momentum_buffer") if name in found), "update")


def explain(
    steps: Mapping[str, ParameterStep], expected: Mapping[str, Setting], declared: Mapping[str, Setting] | None = None
) -> Explanation:
    """Compare a run's steps with what the expected settings make of the same inputs, and name what differs.

    Args:
        steps: the candidate's, by parameter.
        expected: the reference's settings, by parameter; parameters without one are left out.
        declared: what the candidate's own parameter groups say.
    """
    steps = {name: step for name, step in steps.items() if name in expected}
    deviating = {}
    for name, step in steps.items():
        sizes = _deviation(step, expected[name])
        if max(sizes.values()) > 1:
            # A state that is off moves the update with it.
            states = {what: size for what, size in sizes.items() if what != "update" and size > 1}
            worst = max(states or sizes, key=lambda what: (states or sizes)[what])
            deviating[name] = (worst, sizes[worst])
    causes: list[Cause] = []
    current = dict(expected)
    left = list(deviating)
    while left and len(causes) < 4:
        cause, current = _best_cause(steps, left, current, declared or {})
        if cause is None:
            break
        causes.append(cause)
        left = [name for name in left if not _fits(steps[name], current[name])]
    # Several changes that do not lead all the way explain nothing.
    if left and len(left) == len(deviating):
        causes = []
    return Explanation(deviating, tuple(causes), tuple(left))


def differences(
    expected: Mapping[str, Setting], declared: Mapping[str, Setting]
) -> dict[str, tuple[Any, Any, tuple[str, ...]]]:
    """Return which fields two runs' parameter groups set differently: expected, declared and the parameters.

    Where several pairs of values occur for a field, the most frequent one is returned.
    """
    found: dict[str, dict[tuple[Any, Any], list[str]]] = {}
    for name in expected.keys() & declared.keys():
        for entry in fields(Setting):
            pair = (getattr(expected[name], entry.name), getattr(declared[name], entry.name))
            if not _same(*pair):
                found.setdefault(entry.name, {}).setdefault(pair, []).append(name)
    chosen = {field: max(pairs.items(), key=lambda item: len(item[1])) for field, pairs in found.items()}
    return {field: (*pair, tuple(sorted(names))) for field, (pair, names) in chosen.items()}


def _best_cause(
    steps: Mapping[str, ParameterStep],
    left: Sequence[str],
    current: Mapping[str, Setting],
    declared: Mapping[str, Setting],
) -> tuple[Cause | None, dict[str, Setting]]:
    """Return the change of one field that explains most of what is ``left``, and the settings with it."""
    best: tuple[tuple[float, ...], Cause, dict[str, Setting]] | None = None
    before = {name: _badness(steps[name], current[name]) for name in left}
    for rank, (name, values, is_declared) in enumerate(_hypotheses(steps, left, current, declared)):
        changed = {n: with_value(current[n], name, values[n]) for n in left}
        gains = {n: before[n] - _badness(steps[n], changed[n]) for n in left}
        explained = tuple(n for n in left if gains[n] == before[n])
        better = explained or tuple(n for n in left if gains[n] > 1)
        if not better:
            continue
        quality = (len(explained), -rank if explained else sum(gains[n] for n in better))
        if best is None or quality > best[0]:
            settings = {**current, **{n: changed[n] for n in better}}
            example = better[0]
            limited = name in ("weight_decay", "lr") and _is_limited(steps, set(better), current, name, values[example])
            expected_value, found = getattr(current[example], name), values[example]
            cause = Cause(name, expected_value, found, tuple(better), is_declared, limited)
            best = (quality, cause, settings)
        if len(explained) == len(left):
            break  # what comes later is less simple
    return (None, dict(current)) if best is None else (best[1], best[2])


def _hypotheses(
    steps: Mapping[str, ParameterStep],
    left: Sequence[str],
    current: Mapping[str, Setting],
    declared: Mapping[str, Setting],
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield changes of one field, the simplest first: what is declared, then switches, then numbers fitted.

    Each is the field, its value for every parameter, and whether it is declared.
    """
    example = current[left[0]]
    names = [entry.name for entry in fields(Setting) if entry.name != "rule"]
    for name in names:
        values = {n: getattr(declared.get(n, current[n]), name) for n in left}
        if any(not _same(value, getattr(current[n], name)) for n, value in values.items()):
            yield name, values, True
    for name, choices in _SWITCHES[example.rule].items():
        yield from ((name, dict.fromkeys(left, c), False) for c in choices if c != getattr(example, name))
    bundles = _bundles({n: steps[n] for n in left}, current)
    for name, results in _NUMBERS[example.rule].items():
        value = _fit(bundles, name, results)
        if value is not None:
            yield name, dict.fromkeys(left, value), False


@dataclass(frozen=True)
class _Bundle:
    """Elements of parameters that share a setting, as if they were one, with what each error counts."""

    setting: Setting
    step: ParameterStep
    weights: dict[str, Tensor]


def _bundles(steps: Mapping[str, ParameterStep], current: Mapping[str, Setting]) -> list[_Bundle]:
    groups: dict[tuple[Any, ...], list[ParameterStep]] = {}
    for name, step in steps.items():
        key = (current[name], step.step, tuple(sorted(step.state)), tuple(sorted(step.new_state)))
        groups.setdefault(key, []).append(step)
    found = []
    for (setting, count, olds, news), members in groups.items():
        parts = [_sample(member) for member in members]

        def joined(values: Iterable[Tensor]) -> Tensor:
            return torch.cat([value.double() for value in values])

        step = ParameterStep(
            joined(p.parameter for p in parts),
            joined(p.gradient for p in parts),
            joined(p.new_parameter for p in parts),
            {name: joined(p.new_state[name] for p in parts) for name in news},
            {name: joined(p.state[name] for p in parts) for name in olds},
            count,
        )
        weights: dict[str, list[Tensor]] = {"update": [], **{name: [] for name in news}}
        for member, part in zip(members, parts, strict=True):
            for what, of_all in weights.items():
                tolerance = _update_tolerance(member) if what == "update" else _state_tolerance(member, what)
                size = part.parameter.numel()
                of_all.append(torch.full((size,), 1 / tolerance / max(size, 1) ** 0.5, dtype=torch.float64))
        found.append(_Bundle(setting, step, {what: torch.cat(of_all) for what, of_all in weights.items()}))
    return found


def _fit(bundles: Sequence[_Bundle], name: str, results: Collection[str]) -> float | None:
    """Return the value of a number that explains these results of all steps best, by Gauss-Newton in one dimension."""
    example = getattr(bundles[0].setting, name)
    starts = [example]
    if name == "eps":  # spans decades, and is flat where it is too small to matter
        starts = [10.0**power for power in (-14, -10, -8, -6, -4, -2)]
    best: tuple[float, float] | None = None

    def residual(x: float) -> Tensor:
        parts = [_residual(bundle, with_value(bundle.setting, name, x), results) for bundle in bundles]
        return torch.cat([part for some in parts for part in some] or [torch.zeros(1, dtype=torch.float64)])

    for start in starts:
        x = start
        for _ in range(12):
            r = residual(x)
            h = 1e-4 * max(abs(x), 1e-2 if name == "weight_decay" else 1e-12)
            slope = (residual(x + h) - r) / h
            if not (square := float(slope @ slope)):
                break
            moved = x - float(slope @ r) / square
            moved = _into_range(name, moved, x)
            if abs(moved - x) <= 1e-10 * max(abs(x), 1e-12):
                x = moved
                break
            x = moved
        x = 0.0 if abs(x) < 1e-9 * abs(example) else x  # nothing at all was done
        size = float(residual(x).square().mean())
        if math.isfinite(size) and (best is None or size < best[0]):
            best = (size, x)
    return None if best is None or _same(best[1], example) else best[1]


def _into_range(name: str, value: float, old: float) -> float:
    if name in ("beta1", "beta2", "momentum"):
        return min(max(value, 0.0), (1 + old) / 2)
    if name == "eps":
        return min(max(value, old / 10), old * 10)
    return value


def _is_limited(
    steps: Mapping[str, ParameterStep],
    explained: Collection[str],
    current: Mapping[str, Setting],
    name: str,
    value: Any,
) -> bool:
    """Whether parameters moved to another group: others have that value already, or kept the old one."""
    old = getattr(current[next(iter(explained))], name)
    for other in steps.keys() - set(explained):
        own = getattr(current[other], name)
        if _same(own, old) and not _fits(steps[other], with_value(current[other], name, value)):
            return True
        if math.isclose(own, value, rel_tol=1e-2) and not _same(own, old) and _fits(steps[other], current[other]):
            return True
    return False


def _deviation(step: ParameterStep, setting: Setting) -> dict[str, float]:
    """Return the root mean square error of each result in units of its tolerance."""
    new, state = predict(setting, step)
    sizes = {"update": _rms(step.new_parameter.double() - new) / _update_tolerance(step)}
    for name, value in state.items():
        if name in step.new_state:
            actual = step.new_state[name].double()
            sizes[name] = _rms(actual - value) / _state_tolerance(step, name)
    return sizes


def _residual(bundle: _Bundle, setting: Setting, results: Collection[str]) -> list[Tensor]:
    new, state = predict(setting, bundle.step)
    made, actual = {"update": new, **state}, {"update": bundle.step.new_parameter, **bundle.step.new_state}
    return [(actual[what] - made[what]) * bundle.weights[what] for what in results if what in made and what in actual]


def _badness(step: ParameterStep, setting: Setting) -> float:
    """Return how far all results together are outside of their tolerances, 0 for a step that fits."""
    return sum(math.log(max(size, 1.0)) for size in _deviation(step, setting).values())


def _fits(step: ParameterStep, setting: Setting) -> bool:
    return max(_deviation(step, setting).values()) <= 1


def _update_tolerance(step: ParameterStep) -> float:
    dtype = step.new_parameter.dtype
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    update = _rms(step.new_parameter.double() - step.parameter.double())
    return rounding * _rms(step.new_parameter.double()) + _OF_UPDATE * update + 1e-30


def _state_tolerance(step: ParameterStep, name: str) -> float:
    actual = step.new_state[name]
    return max(_OF_STATE, 2 * torch.finfo(actual.dtype).eps) * _rms(actual.double()) + 1e-37


def _sample(step: ParameterStep) -> ParameterStep:
    """Return at most ``_SAMPLES`` elements of everything, evenly spread."""
    stride = max(1, step.parameter.numel() // _SAMPLES)

    def take(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)[::stride]

    return ParameterStep(
        take(step.parameter),
        take(step.gradient),
        take(step.new_parameter),
        {name: take(value) for name, value in step.new_state.items()},
        {name: take(value) for name, value in step.state.items()},
        step.step,
    )


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-30)
    return bool(a == b)


def show(value: Any) -> str:
    """Return a setting's value as it is written in a sentence."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
