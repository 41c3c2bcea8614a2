"""Which module made the first tensor that is out of the band, given the order in which modules ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_mm.precision.comparing.pairing import Pair, is_around
from mindspeed_mm.precision.finding import Measurement
from mindspeed_mm.precision.records.record import Key

# What a module is given and what it makes of it, forward and backward.
_INPUT = {"forward": "input.", "backward": "grad_output."}
_OUTPUT = {"forward": "output.", "backward": "grad_input."}


@dataclass(frozen=True)
class Blame:
    """The module whose inputs agree and whose output does not.

    Attributes:
        site: its path; None where even what the outermost module is given differs.
        evidence: which tensors say so.
        measured: the tensor that gave it away.
    """

    site: str | None
    evidence: str
    measured: Measurement


def blame(pair: Pair, phase: str) -> Blame | None:
    """Return where ``forward`` or ``backward`` leaves the reference first; None where it does not.

    The first output out of the band, in the reference's order, decides; children finish before their parents, so it is
    a leaf's where a leaf is at fault. If what that module is given is off too, although everything computed before
    agrees, the code that called it is at fault: the nearest module around it that was itself given the right inputs.
    Inputs alone decide nothing: a mask may be written in many ways.
    """
    keys = pair.keys(phase)
    outputs = [key for key in keys if key.what.startswith(_OUTPUT[phase])]
    first = next((key for key in outputs if pair.bad(key)), None)
    if first is None and phase == "backward":
        # A module without a gradient of its input, an embedding say, has nothing else to show, nor has one that makes
        # nothing of it, a matrix of zeros say, while its parameters' gradients are off.
        given = [key for key in keys if key.what.startswith(_INPUT[phase])]
        ends = {key.site for key in given} - {key.site for key in outputs}
        first = next((key for key in given if (pair.gradients_apart or key.site in ends) and pair.bad(key)), None)
    if first is None:
        return None
    measured = pair.measure(first)
    assert measured is not None
    executed = list(dict.fromkeys(key.site for key in keys))
    site, wrong = first.site, _bad_inputs(pair, phase, first)
    if not wrong:
        return Blame(site, _own(pair, phase, first, measured, executed), measured)
    while True:
        child = site
        around = parent(site, executed)
        if around is None:
            return Blame(None, f"{_names(wrong)} of {child or 'the model'} {_size(measured_of(pair, wrong))}", measured)
        site = around
        if not (above := _inputs_off(pair, phase, site, keys)):
            break
        wrong = above
    culprit = _unpaired_child(pair, site)
    tensors = f"{_names(wrong)} of {child} {_size(measured_of(pair, wrong))}"
    if culprit:
        return Blame(culprit, f"only one of the two runs calls it; {tensors}", measured)
    what = "before" if phase == "forward" else "behind"
    evidence = f"its own code {what} {_last(child, site)}: {tensors}, while all that was computed before agrees"
    return Blame(site, evidence, measured)


def parent(site: str, executed: Sequence[str]) -> str | None:
    """Return the nearest module around ``site`` that was called itself; lists of modules never are."""
    while site:
        site = site.rpartition(".")[0]
        if site in executed:
            return site
    return None


def measured_of(pair: Pair, keys: Sequence[Key]) -> Measurement:
    """Return the measurement of the first of these keys."""
    found = pair.measure(keys[0])
    assert found is not None
    return found


def _bad_inputs(pair: Pair, phase: str, output: Key) -> list[Key]:
    if output.what.startswith(_INPUT[phase]):
        return [output]
    call = output.what.partition("@")[2]
    return [key for key in _inputs(pair, phase, output.site) if key.what.partition("@")[2] == call and pair.bad(key)]


def _inputs_off(pair: Pair, phase: str, site: str, keys: Sequence[Key]) -> list[Key]:
    return [key for key in keys if key.site == site and key.what.startswith(_INPUT[phase]) and pair.bad(key)]


def _inputs(pair: Pair, phase: str, site: str) -> list[Key]:
    return [key for key in pair.keys(phase) if key.site == site and key.what.startswith(_INPUT[phase])]


def _own(pair: Pair, phase: str, key: Key, measured: Measurement, executed: Sequence[str]) -> str:
    inside = [site for site in executed if is_around(key.site, site)]
    kind = pair.reference.tree.get(key.site, "")
    own = f"its own code around {_last(inside[-1], key.site)} and the others: " if inside else ""
    name = f"{kind}: " if kind else ""
    return f"{name}{own}{key.what} {_size(measured)}, while what it is given agrees"


def _unpaired_child(pair: Pair, site: str) -> str | None:
    """Return the one module right inside ``site`` that only one of the runs calls, if it is one."""
    both = [{key.site for key in step.of_phase("forward")} for step in (pair.reference, pair.candidate)]
    executed = [*both[0], *both[1]]
    found = {s for s in both[0] ^ both[1] if s and parent(s, executed) == site}
    return found.pop() if len(found) == 1 else None


def _names(keys: Sequence[Key]) -> str:
    return ", ".join(key.what for key in keys[:3])


def _size(measured: Measurement) -> str:
    if measured.note:
        return f"is different ({measured.note})"
    return f"differs by {measured.relative:.2g} of its norm (allowed {measured.tolerance:.2g})"


def _last(site: str, around: str) -> str:
    return site.removeprefix(f"{around}.") if around else site
