"""``precision replay``: the optimizer's step, a module, or the loss, from what the reference has recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.comparing import optimizer_phase
from mindspeed_mm.precision.comparing.continuity import before
from mindspeed_mm.precision.comparing.pairing import Pair
from mindspeed_mm.precision.finding import Finding, Measurement, Verdict
from mindspeed_mm.precision.records.record import Key, Record, StepRecord
from mindspeed_mm.precision.replaying.loss_replay import MicroBatch, explain_loss
from mindspeed_mm.precision.replaying.module_replay import replay_module
from mindspeed_mm.precision.replaying.optimizer_replay import explain, show
from mindspeed_mm.precision.replaying.optimizer_rules import torch_step

_TENSORS = "record the run again with tensors: --precision-capture steps={step},tensors={pattern}"
_CALLS = 2


def replay_optimizer(reference: Record, candidate: Record, step: int) -> Verdict:
    """Replay the optimizer both ways.

    The candidate's setting makes the step from the reference's parameters, gradients and state; and the reference's
    setting is asked to explain what the candidate's optimizer made of its own.
    """
    verdict = Verdict("replay optimizer")
    pair = Pair(reference.step(step), candidate.step(step), None)
    command = "give the candidate's optimizer the reference's setting"
    expected, declared = optimizer_phase.settings(pair.reference), optimizer_phase.settings(pair.candidate)
    steps = optimizer_phase.parameter_steps(pair.reference)
    if not steps:
        verdict.undecided = f"{reference.folder}: no tensors of step {step}; " + _TENSORS.format(step=step, pattern="*")
        verdict.findings = optimizer_phase.declared(pair, command)
        return verdict
    own = explain(steps, expected)
    if own.deviating:
        verdict.notes.append(
            f"the reference's own step is not what its parameter groups say for {len(own.deviating)} parameters: "
            f"{'; '.join(map(str, own.causes)) or 'no known setting explains it'}"
        )
    answer = explain(steps, {name: setting for name, setting in declared.items() if name in steps}, expected)
    if answer.deviating and set(answer.deviating) - set(own.deviating):
        causes = "; ".join(f"{c.name} is {show(c.expected)}, in the reference {show(c.found)}" for c in answer.causes)
        text = (
            f"the candidate's setting makes another {answer.earliest} of the reference's inputs for "
            f"{len(answer.deviating)} of {len(steps)} parameters: {causes or 'no single setting explains it'}"
        )
        verdict.findings.append(
            optimizer_phase.finding(pair, answer.earliest, sorted(answer.deviating), declared, text, command)
        )
    verdict.notes += _bitwise(pair.reference, steps)
    found, notes = optimizer_phase.judge(pair, before(reference, step), before(candidate, step), command)
    verdict.findings += found
    verdict.notes += notes
    return verdict


def replay_modules(
    model: nn.Module, reference: StepRecord, sites: list[str], weights_of_reference: bool = True
) -> Verdict:
    """Run the candidate's modules on what the reference's were given.

    Args:
        model: the candidate's, in the names of the record, not sharded.
        reference: a step with kept calls.
        sites: which modules.
        weights_of_reference: use the reference's parameters where they were kept.
    """
    verdict = Verdict("replay module")
    done = 0
    for site in sites:
        calls = reference.calls(site)[:_CALLS]
        if not calls:
            continue
        try:
            module = model.get_submodule(site)
        except AttributeError:
            text = "the candidate's model has no such module"
            verdict.findings.append(Finding("forward", site, reference.step, text, "compare the model's configuration"))
            continue
        done += 1
        parameters = _parameters(reference, module, site) if weights_of_reference else {}
        for call in calls:
            opinions = replay_module(module, call, parameters)
            for opinion in opinions:
                phase = "backward" if opinion.what.startswith("grad") else "forward"
                allowed = 3 * opinion.noise + opinion.floor
                verdict.table.append(
                    Measurement(reference.step, phase, site, opinion.what, opinion.apart, allowed, opinion.note)
                )
            # A gradient follows from the output: where that differs it says nothing more.
            worst = next((opinion for opinion in opinions if opinion.differs), None)
            if worst is not None:
                phase = "backward" if worst.what.startswith("grad") else "forward"
                kind = reference.tree.get(site, type(module).__name__)
                command = f"compare the code and the configuration of {kind}"
                verdict.findings.append(Finding(phase, site, reference.step, f"{kind}: {worst}", command))
                break
    if not done and not verdict.findings:
        verdict.undecided = f"no calls of {', '.join(sites) or 'any module'} were kept; " + _TENSORS.format(
            step=reference.step, pattern=sites[0] if sites else "*"
        )
    verdict.findings = _innermost(verdict.findings)
    return verdict


def replay_loss(reference: StepRecord, candidate: StepRecord, batches: list[MicroBatch]) -> Verdict:
    """Name the rules by which either run's loss follows from the reference's logits and labels."""
    verdict = Verdict("replay loss")
    ours, theirs = reference.scalars.get("loss"), candidate.scalars.get("loss")
    if not batches or ours is None or theirs is None:
        verdict.undecided = "no logits with their labels were kept; " + _TENSORS.format(
            step=reference.step, pattern="*"
        )
        return verdict
    mine, other = explain_loss(batches, ours), explain_loss(batches, theirs)
    common = [rule for rule in mine if any(str(rule) == str(o) for o in other)]
    if common:
        verdict.notes.append(f"both losses are the {common[0]}")
        return verdict
    words = [f"the {rules[0]}" if rules else "no rule that is known here" for rules in (mine, other)]
    text = f"the candidate's loss {theirs:.9g} is {words[1]} of the reference's logits; the reference's {ours:.9g} is "
    command = "set loss_cfg.loss_type in model.json, or --calculate-per-token-loss, to the reference's rule"
    verdict.findings.append(Finding("loss", "loss", reference.step, text + words[0], command))
    return verdict


def kept_sites(step: StepRecord, pattern: str) -> list[str]:
    """Return the modules whose calls were kept and that a pattern names, in the order in which they finished."""
    from fnmatch import fnmatchcase

    executed = [key.site for key in step.entries if key.phase == "forward" and key.what.startswith("output")]
    return [site for site in dict.fromkeys(executed) if fnmatchcase(site, pattern) and step.calls(site)]


def kept_logits(step: StepRecord) -> list[MicroBatch]:
    """Return logits and labels of all micro-batches, where both were kept."""
    heads = [key.site for key in step.entries if key.phase == "loss" and key.what == "logits"]
    found = []
    for head in heads[:1]:
        for call in step.calls(head):
            key = Key("data", "batch", f"labels@{call.micro_batch}.{call.rank}")
            logits, labels = call.tensors.get("output.0"), step.tensor(key)
            if logits is not None and labels is not None:
                found.append(MicroBatch(logits, labels, call.rank, call.micro_batch))
    return found


def candidate_model(record: Record) -> nn.Module:
    """Build the model that a run of ours trained, from what its record says of its configuration; in one process.

    Raises:
        UserError: the record does not say, or its model is not one of model.json.
    """
    from mindspeed_mm.models.plugins import load_plugin
    from mindspeed_mm.models.transformers_model import TransformersModel
    from mindspeed_mm.precision.recording.sites import innermost

    start: Mapping[str, Any] = record.manifest
    config = start.get("configs", {}).get("model") or start.get("model")
    if not isinstance(config, Mapping) or not config.get("init_from_hf_path"):
        raise UserError(
            f"{record.folder}: does not say which model.json the run had; a model of a script of your own is replayed "
            "by mindspeed_mm.precision.comparing.replays.replay_modules(model, ...)."
        )
    command = start.get("command") or [""]
    for plugin in start.get("arguments", {}).get("plugin") or []:
        path = Path(plugin)
        load_plugin(str(path if path.exists() else Path(str(command[0])).parent / path))
    return innermost(TransformersModel(dict(config)))


def _parameters(step: StepRecord, module: nn.Module, site: str) -> dict[str, Tensor]:
    prefix = f"{site}." if site else ""
    kept = {name: step.tensor(Key("weights", prefix + name, "parameter")) for name, _ in module.named_parameters()}
    return {name: tensor for name, tensor in kept.items() if tensor is not None}


def _bitwise(step: StepRecord, steps: Mapping[str, Any]) -> list[str]:
    """Say whether torch's own optimizer makes the reference's step bit for bit."""
    kind = str(step.groups[0].get("class", "")) if step.groups else ""
    try:
        made = torch_step(kind, step.groups, steps)
    except LookupError as error:
        return [f"{error}: the step was judged by its formula"]
    same = sum(bool((made[name][0] == given.new_parameter).all()) for name, given in steps.items())
    return [f"torch.optim.{kind} makes {same} of {len(steps)} of the reference's parameters, bit for bit"]


def _innermost(findings: list[Finding]) -> list[Finding]:
    """Put a module before those around it: what differs in a leaf differs in all that hold it."""
    return sorted(findings, key=lambda f: sum(o.site != f.site and o.site.startswith(f.site) for o in findings))
