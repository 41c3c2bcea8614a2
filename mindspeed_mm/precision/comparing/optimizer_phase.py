"""Whether the candidate's optimizer does what the reference's would do with the same parameters and gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import median

import numpy as np
from torch import Tensor

from mindspeed_mm.precision.comparing.band import SAFETY, Gap, gap
from mindspeed_mm.precision.comparing.continuity import STATES, begun_apart, replaced, start, steps_made
from mindspeed_mm.precision.comparing.pairing import Pair
from mindspeed_mm.precision.finding import Finding
from mindspeed_mm.precision.records.record import Key, StepRecord
from mindspeed_mm.precision.replaying.optimizer_replay import Explanation, differences, explain
from mindspeed_mm.precision.replaying.optimizer_rules import ParameterStep, Setting

_LINEAR = 1e-4
_NORM_GAP = _UPDATE_GAP = 0.02
_LEAST = 1e-6


def settings(step: StepRecord) -> dict[str, Setting]:
    """Return the setting of every parameter that an optimizer with a known rule updates."""
    found: dict[str, Setting] = {}
    for group in step.groups:
        setting = Setting.of_group(str(group.get("class", "AdamW")), group)
        if setting is not None:
            found.update(dict.fromkeys(group["names"], setting))
    return found


def parameter_steps(step: StepRecord) -> dict[str, ParameterStep]:
    """Return the optimizer's step of every parameter whose tensors were kept."""
    found = {}
    for name in settings(step):
        parameter = step.tensor(Key("weights", name, "parameter"))
        gradient = step.tensor(Key("grad_clipped", name, "gradient"))
        update = step.tensor(Key("optimizer", name, "update"))
        if parameter is None or gradient is None or update is None:
            continue
        state, count = _state(step, name, ".before"), step.tensor(Key("optimizer", name, "step.before"))
        made = 0 if count is None else int(count)
        found[name] = ParameterStep(parameter, gradient, parameter + update, _state(step, name), state, made)
    return found


def declared(pair: Pair, command: str) -> list[Finding]:
    """Return what the two runs' parameter groups set differently."""
    found = []
    ours, theirs = settings(pair.reference), settings(pair.candidate)
    for name, (expected, value, parameters) in differences(ours, theirs).items():
        text = f"{name} is {value}, in the reference {expected}, for {len(parameters)} of {len(ours)} parameters"
        found.append(finding(pair, name, parameters, ours, text, command))
    for only, others, who in ((ours, theirs, "the reference"), (theirs, ours, "the candidate")):
        if ours and theirs and (names := sorted(only.keys() - others.keys())):
            text = f"only {who}'s optimizer has {len(names)} parameters: {', '.join(names[:3])}"
            found.append(finding(pair, "parameter groups", names, ours, text, command))
    return found


def judge(
    pair: Pair, reference: StepRecord | None, candidate: StepRecord | None, command: str
) -> tuple[list[Finding], list[str]]:
    """Return findings and notes about the optimizer step of ``pair``.

    Args:
        pair: the step; everything up to the clipped gradients agrees.
        reference: the step before it of the reference, if it was recorded.
        candidate: the same of the candidate.
        command: what to run next.
    """
    found, notes = _made(pair, candidate, command)
    return [*_carried(pair, reference, candidate), *found], notes


def _made(pair: Pair, earlier: StepRecord | None, command: str) -> tuple[list[Finding], list[str]]:
    """Judge what the optimizer made of parameters, gradients and state."""
    expected, theirs = settings(pair.reference), settings(pair.candidate)
    stated = declared(pair, command)
    if not expected or not theirs:
        if _has_update(pair):
            return stated, ["the optimizer's rule, or its parameter groups, are not known: its step was not replayed"]
        return stated, []
    steps = parameter_steps(pair.candidate)
    if steps:
        explanation = explain(steps, expected, theirs)
        if explanation.deviating:
            return [_replayed(pair, explanation, expected, command), *stated], []
        # What is set differently and has no effect yet, a learning rate of 0 say, is still said.
        return stated, []
    if stated:
        return stated, []
    found = _linear(pair, earlier, expected, command) or _updates(pair, expected, command)
    note = "no tensors were kept (tensors=...): the optimizer was judged by digests, which see less than its replay"
    return found, [note] if _has_update(pair) and not found else []


def _carried(pair: Pair, reference: StepRecord | None, candidate: StepRecord | None) -> list[Finding]:
    """Judge the state that the optimizer was given: what the step before has left, or what a checkpoint has."""
    known = settings(pair.reference)
    command = "see what saves, loads or resets the optimizer's state"
    ours, theirs = steps_made(pair.reference), steps_made(pair.candidate)
    if other := [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]:
        text = f"the state of {len(other)} of {len(ours)} parameters has seen {theirs[other[0]]:g} steps, in the "
        text += f"reference {ours[other[0]]:g}: it was lost on the way, or its count was"
        return [finding(pair, "step", sorted(other), known or ours, text, command)]
    off: dict[str, list[str]] = {}
    words = "is not what the step before has left"
    if candidate is not None:
        kept = {} if reference is None else replaced(reference, pair.reference)
        off = {
            what: left
            for what, names in replaced(candidate, pair.candidate).items()
            if (left := [name for name in names if name not in kept.get(what, ())])
        }
    if pair.first and not off:
        words = "is not the reference's"
        off = begun_apart(start(pair.reference, reference), start(pair.candidate, candidate))
    for what, names in off.items():
        text = f"{what} of {len(names)} parameters {words}, before the optimizer makes its step"
        return [finding(pair, what, sorted(names), known or dict.fromkeys(names), text, command)]
    return []


def _replayed(pair: Pair, explanation: Explanation, expected: Mapping[str, Setting], command: str) -> Finding:
    names = sorted(explanation.deviating)
    what = explanation.earliest
    why = "; ".join(map(str, explanation.causes)) or "no setting that is known here explains it"
    if explanation.causes and explanation.unexplained:
        why += f"; {len(explanation.unexplained)} parameters remain unexplained"
    text = f"{what} of {len(names)} of {len(expected)} parameters is not what the reference's setting makes of the "
    return finding(pair, what, names, expected, f"{text}same inputs: {why}", command)


def finding(
    pair: Pair, what: str, names: list[str] | tuple[str, ...], known: Collection[str], text: str, command: str
) -> Finding:
    """Return a finding about some parameters' optimizer step."""
    from mindspeed_mm.precision.comparing.compare import common_site

    site = common_site(names, list(known))
    shapes = {key.site: sketch.shape for key, sketch in pair.reference.of_phase("weights").items()}
    if len(names) > 1 and all(len(shapes.get(name) or (0, 0)) <= 1 for name in names):
        text += " (all of one dimension)"
    return Finding("optimizer", f"{what} of {site}" if site else what, pair.step, text, command, sites=tuple(names))


def _linear(pair: Pair, earlier: StepRecord | None, expected: Mapping[str, Setting], command: str) -> list[Finding]:
    """Check the state's recursion on the candidate's own digests: it is linear in what they add up."""
    if pair.step > 0 and earlier is None:
        return []
    for state in STATES:
        off: dict[str, str] = {}
        for name, setting in expected.items():
            problem = _recursion(pair.candidate, earlier, name, state, setting)
            if problem is not None:
                off[name] = problem
        if off:
            text = f"{state} of {len(off)} of {len(expected)} parameters does not follow from its gradient by the "
            text += f"reference's setting: {next(iter(off.values()))}"
            return [finding(pair, state, list(off), expected, text, command)]
    return []


def _recursion(step: StepRecord, earlier: StepRecord | None, name: str, state: str, setting: Setting) -> str | None:
    new = step.entries.get(Key("optimizer", name, state))
    gradient = step.entries.get(Key("grad_clipped", name, "gradient"))
    parameter = step.entries.get(Key("weights", name, "parameter"))
    old = earlier.entries.get(Key("optimizer", name, state)) if earlier else None
    if new is None or gradient is None or parameter is None or (earlier and old is None):
        return None
    l2 = 0.0 if setting.decoupled and setting.rule == "adam" else setting.weight_decay
    seen = gradient.vector + l2 * parameter.vector
    if state == "exp_avg_sq":
        if l2:
            return None  # the square of a sum is not in the digests
        before = old.total if old else 0.0
        found = new.total
        made = setting.beta2 * before + (1 - setting.beta2) * gradient.square_sum
        if abs(found - made) <= _LINEAR * max(abs(made), abs(found)) or gradient.square_sum == before:
            return None
        beta = (found - gradient.square_sum) / (before - gradient.square_sum)
        return f"beta2 would be {beta:.4g} instead of {setting.beta2:g}"
    start = old.vector if old else np.zeros_like(new.vector)
    keep, take = (setting.beta1, 1 - setting.beta1) if state == "exp_avg" else (setting.momentum if old else 0.0, 1.0)
    rest = new.vector - keep * start - take * seen
    size = max(float(np.linalg.norm(new.vector)), take * float(np.linalg.norm(seen)))
    if float(np.linalg.norm(rest)) <= _LINEAR * size:
        return None
    basis = np.stack([start, gradient.vector, parameter.vector], axis=1)
    parts = np.linalg.lstsq(basis, new.vector, rcond=None)[0]
    return f"it is {parts[0]:.4g} x itself + {parts[1]:.4g} x the gradient + {parts[2]:.3g} x the parameter"


def _updates(pair: Pair, expected: Mapping[str, Setting], command: str) -> list[Finding]:
    """Compare updates themselves, each as closely as the gradient and the state behind it agree."""
    off, ratios = [], []
    for key in pair.keys("optimizer"):
        ours, theirs = pair.reference.entries[key], pair.candidate.entries.get(key)
        if key.what != "update" or theirs is None or not ours.norm > 0:
            continue
        found = gap(ours, theirs)
        spread = pair.band.spreads.get((pair.step, key), Gap()) if pair.band else Gap()
        # Adam makes +lr or -lr of a gradient however small. A share d of noise in it turns the signs of a share d of
        # its elements, whose updates are then 2 lr apart: 2 sqrt(d) of the whole. The norm does not see signs.
        noise = _UPDATE_GAP + 4 * (_noise(pair, key.site) + _LEAST) ** 0.5
        sizes = max(_NORM_GAP, min(0.5, noise)) * ours.norm
        if found.distance > SAFETY * spread.distance + noise * ours.norm or found.norm > SAFETY * spread.norm + sizes:
            off.append(key.site)
            ratios.append(theirs.norm / ours.norm)
    if not off:
        return []
    size = f"; they are about {ratio:.4g} times as large" if abs((ratio := median(ratios)) - 1) > _NORM_GAP else ""
    text = f"the updates of {len(off)} of {len(expected)} parameters are not the reference's, while gradients and "
    text += f"state agree{size}"
    return [finding(pair, "update", off, expected, text, command)]


def _noise(pair: Pair, site: str) -> float:
    """Return how far the gradient of a parameter, and its state after the step, are apart, the largest share."""
    keys = [Key("grad_clipped", site, "gradient"), *(Key("optimizer", site, state) for state in STATES)]
    found = [row.relative for key in keys if (row := pair.measure(key))]
    return max(found, default=1.0)


def _state(step: StepRecord, name: str, when: str = "") -> dict[str, Tensor]:
    kept = {what: step.tensor(Key("optimizer", name, what + when)) for what in STATES}
    return {what: tensor for what, tensor in kept.items() if tensor is not None}


def _has_update(pair: Pair) -> bool:
    return any(key.what == "update" for key in pair.candidate.entries)
