"""The first place where a run leaves its reference, phase by phase in the order in which causes come before effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mindspeed_mm.precision.comparing import optimizer_phase
from mindspeed_mm.precision.comparing.band import SAFETY, Band
from mindspeed_mm.precision.comparing.blame import blame
from mindspeed_mm.precision.comparing.continuity import before, rewritten
from mindspeed_mm.precision.comparing.idle import settle
from mindspeed_mm.precision.comparing.pairing import Pair
from mindspeed_mm.precision.comparing.samples import difference
from mindspeed_mm.precision.finding import Finding, Measurement, Verdict
from mindspeed_mm.precision.records.record import PHASES, Key, Record, StepRecord

_GRADIENT_WORDS = {
    "grad_local": "gradients of the parameters, before they are reduced",
    "grad_reduced": "reduced gradients, while the local ones agree",
    "grad_clipped": "clipped gradients, while the reduced ones agree",
}


def compare(reference: Record, candidate: Record, band: Band | None = None) -> Verdict:
    """Compare two records step by step and name the first difference.

    Args:
        reference: the record to be like.
        candidate: the record to judge.
        band: the reference's own spread; without one a conservative one is assumed, which the verdict says.
    """
    verdict = Verdict("compare")
    steps = [step for step in reference.steps if step in candidate.steps]
    if not steps:
        verdict.undecided = (
            f"no step was recorded in both: {reference.steps} in {reference.folder}, {candidate.steps} in "
            f"{candidate.folder}; record both with the same --precision-capture steps=..."
        )
        return verdict
    if band is None:
        verdict.notes.append(
            "no --band: tolerances are assumed from dtype and depth; measure the reference's own spread with "
            "'mindspeed-mm precision band'"
        )
    if lone := sorted({*reference.steps, *candidate.steps} - set(steps)):
        verdict.notes.append(f"recorded in one run only, and not compared: steps {lone}")
    judge = Judge(reference, candidate, band, verdict)
    for step in steps:
        if judge.step(step, first=step == steps[0]):
            break
    return verdict


class Judge:
    """Goes through the phases of one step after the other and stops at the first that differs."""

    def __init__(self, reference: Record, candidate: Record, band: Band | None, verdict: Verdict) -> None:
        self.reference, self.candidate, self.band, self.verdict = reference, candidate, band, verdict

    def step(self, step: int, first: bool) -> bool:
        """Judge one step; return whether it differs."""
        pair = Pair(self.reference.step(step), self.candidate.step(step), self.band, first)
        self._tabulate(pair)
        phases: list[Callable[[Pair], list[Finding]]] = [
            self.data,
            self.weights,
            self.forward,
            self.loss,
            self.backward,
            self.gradients,
            self.optimizer,
        ]
        for judge in phases:
            found = judge(pair)
            self.verdict.findings += found
            if any(finding.severity == "error" for finding in found):
                if judge != self.optimizer:  # what is set differently is known without computing anything
                    self.verdict.findings += optimizer_phase.declared(pair, self._replay("optimizer", step))
                return True
        return False

    def data(self, pair: Pair) -> list[Finding]:
        """The samples, by their content."""
        elsewhere = {n: self.reference.step(n).samples for n in self.reference.steps if n != pair.step}
        found = difference(pair.reference.samples, pair.candidate.samples, elsewhere)
        if found is None:
            if not (pair.reference.samples and pair.candidate.samples):
                self._note("the samples of one run are not known: that both trained on the same is taken for granted")
            return []
        command = f"mindspeed-mm precision data-diff {self._folders}"
        return [Finding("data", found[0], pair.step, found[1], command)]

    def weights(self, pair: Pair) -> list[Finding]:
        """The parameters at the start; later ones have to be what the optimizer made of them."""
        if not pair.first:
            return self._rewritten(pair)
        command = f"mindspeed-mm precision state-diff {self._folders}"
        found = []
        for keys, words in (
            (pair.missing("weights"), "only the reference has"),
            (pair.extra("weights"), "only the candidate has"),
        ):
            # What is no parameter need not be there: it is judged by what the modules compute with it.
            if sites := [key.site for key in keys if key.what == "parameter"]:
                found.append(_of_parameters("weights", pair, sites, f"{words} {_some(sites)}", command))
        bad = [key for key in pair.keys("weights") if pair.bad(key)]
        if bad:
            text = f"{_share(bad, pair)} parameters differ: {_worst(pair, bad)}"
            found.append(_of_parameters("weights", pair, [key.site for key in bad], text, command))
        return found

    def forward(self, pair: Pair) -> list[Finding]:
        """Modules in the order in which they ran."""
        for note in settle(pair):
            self._note(note)
        found = blame(pair, "forward")
        if found is None:
            return []
        site = found.site or ""
        return [Finding("forward", site, pair.step, found.evidence, self._replay("module", pair.step, site))]

    def loss(self, pair: Pair) -> list[Finding]:
        """The loss, given logits that agree."""
        command = self._replay("loss", pair.step)
        ours, theirs = pair.reference.scalars, pair.candidate.scalars
        for name in ("num_tokens", "loss"):
            if name in ours and name in theirs and not self._close(pair, name, ours[name], theirs[name]):
                text = f"{name} is {theirs[name]:.9g}, in the reference {ours[name]:.9g}, from modules that agree"
                return [Finding("loss", "loss", pair.step, text, command)]
        bad = [key for key in pair.keys("loss") if pair.bad(key)]
        if bad:
            return [Finding("loss", bad[0].site or "loss", pair.step, _worst(pair, bad), command)]
        return []

    def backward(self, pair: Pair) -> list[Finding]:
        """Modules in the order in which gradients reached them."""
        found = blame(pair, "backward")
        if found is None:
            return []
        if found.site is None:
            text = f"the gradient that the loss sends back: {found.evidence}, while the loss agrees"
            return [Finding("loss", "loss", pair.step, text, self._replay("loss", pair.step))]
        return [
            Finding("backward", found.site, pair.step, found.evidence, self._replay("module", pair.step, found.site))
        ]

    def gradients(self, pair: Pair) -> list[Finding]:
        """Parameters' gradients: summed up, reduced over the ranks, clipped."""
        for phase, words in _GRADIENT_WORDS.items():
            command = f"mindspeed-mm precision invariants {self.candidate.folder}"
            if phase == "grad_clipped":
                command = "compare --clip-grad, and over which parameters and ranks the norm is taken"
            for keys, who in ((pair.missing(phase), "the reference"), (pair.extra(phase), "the candidate")):
                if keys:
                    sites = [key.site for key in keys]
                    text = f"only {who} trains {_some(sites)}: the other has no gradient of them"
                    return [_of_parameters(phase, pair, sites, text, "compare which modules are frozen")]
            bad = [key for key in pair.keys(phase) if pair.bad(key)]
            if bad:
                text = f"{_share(bad, pair)} {words}, differ: {_worst(pair, bad)}{_factor(pair, bad)}{_norms(pair)}"
                return [_of_parameters(phase, pair, [key.site for key in bad], text, command)]
        return []

    def optimizer(self, pair: Pair) -> list[Finding]:
        """The optimizer, judged by replaying its step."""
        found, notes = optimizer_phase.judge(pair, *self._before(pair), self._replay("optimizer", pair.step))
        for note in notes:
            self._note(note)
        return found

    def _rewritten(self, pair: Pair) -> list[Finding]:
        """Parameters that something wrote to since the optimizer's last step, and in the reference nothing."""
        reference, candidate = self._before(pair)
        if candidate is None or reference is None:
            return []
        found = rewritten(candidate, pair.candidate)
        for site in rewritten(reference, pair.reference):
            found.pop(site, None)
        if not found:
            return []
        worst = max(found, key=lambda site: found[site])
        text = f"since the optimizer's step {pair.step - 1} something else has changed {_some(list(found))}; "
        text += f"{worst} by {found[worst]:.2g} of its norm"
        command = "see what writes to them between two steps: an average, a tie, a cast, a checkpoint"
        return [_of_parameters("weights", pair, list(found), text, command)]

    def _before(self, pair: Pair) -> tuple[StepRecord | None, StepRecord | None]:
        return before(self.reference, pair.step), before(self.candidate, pair.step)

    def _close(self, pair: Pair, name: str, ours: float, theirs: float) -> bool:
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            return str(ours) == str(theirs)
        allowed = 2e-6 * abs(ours)
        if pair.band is not None and (pair.step, name) in pair.band.scalars:
            allowed += SAFETY * pair.band.scalars[pair.step, name]
        elif name == "loss":
            coarse = any(s.dtype in ("bfloat16", "float16") for s in pair.reference.of_phase("forward").values())
            allowed = (2e-2 if coarse else 1e-5) * abs(ours)
            if not pair.first:
                allowed = 10 * allowed + 10 * pair.weights_apart * abs(ours)
        return abs(ours - theirs) <= allowed

    def _tabulate(self, pair: Pair) -> None:
        for phase in PHASES:
            if phase != "optimizer":
                rows = [pair.measure(key) for key in pair.keys(phase)]
                self.verdict.table += [row for row in rows if row is not None]

    def _note(self, text: str) -> None:
        if text not in self.verdict.notes:
            self.verdict.notes.append(text)

    @property
    def _folders(self) -> str:
        return f"{self.reference.folder} {self.candidate.folder}"

    def _replay(self, what: str, step: int, site: str = "") -> str:
        return f"mindspeed-mm precision replay {what} {self._folders} --step {step}" + (
            f" --site {site}" if site else ""
        )


def common_site(sites: Sequence[str], everything: Sequence[str]) -> str:
    """Return what some parameters' paths have in common; empty for all of them, or where they have nothing."""
    if len(sites) == 1:
        return sites[0]
    if len(set(sites)) == len(set(everything)):
        return ""
    prefix = []
    for parts in zip(*(site.split(".") for site in sites), strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return ".".join(prefix)


def _of_parameters(phase: str, pair: Pair, sites: Sequence[str], evidence: str, command: str) -> Finding:
    everything = [key.site for key in pair.keys(phase)]
    return Finding(phase, common_site(sites, everything), pair.step, evidence, command, sites=tuple(sites))


def _share(bad: Sequence[Key], pair: Pair) -> str:
    return f"{len(bad)} of {len(pair.keys(bad[0].phase))}"


def _worst(pair: Pair, bad: Sequence[Key]) -> str:
    rows: list[Measurement] = [row for key in bad if (row := pair.measure(key))]
    worst = max(rows, key=lambda row: row.relative / max(row.tolerance, 1e-30))
    text = worst.note or f"by {worst.relative:.2g} of its norm, allowed {worst.tolerance:.2g}"
    return f"{worst.site or worst.what} {text}"


def _factor(pair: Pair, bad: Sequence[Key]) -> str:
    """Say so when the gradients differ by one factor only."""
    ratios = []
    for key in bad:
        ours, theirs = pair.reference.entries[key].vector, pair.candidate.entries[key].vector
        if not (size := float(ours @ ours)):
            return ""
        ratio = float(ours @ theirs) / size
        if float(((theirs - ratio * ours) ** 2).sum()) > 1e-6 * size * ratio**2:
            return ""
        ratios.append(ratio)
    if max(ratios) - min(ratios) > 1e-3 * abs(max(ratios)):
        return ""
    return f"; all are the reference's times {ratios[0]:.6g}"


def _norms(pair: Pair) -> str:
    ours, theirs = pair.reference.scalars.get("grad_norm"), pair.candidate.scalars.get("grad_norm")
    return "" if ours is None or theirs is None else f"; gradient norm {theirs:.6g}, in the reference {ours:.6g}"


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} parameters: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
