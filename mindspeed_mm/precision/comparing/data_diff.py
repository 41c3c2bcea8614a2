"""Whether two records hold the same samples in the same order, and if not, what happened to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from mindspeed_mm.precision.finding import Finding, Verdict
from mindspeed_mm.precision.records.record import Record, SampleFingerprint

_MOST = 0.9  # of the samples both have, at one distance: they are shifted
_AROUND = 8  # tokens shown on either side of a difference
_SAMPLER = (
    "compare seed, shuffle, drop_last and the position after a resume: mindspeed-mm precision config-diff REF CAND"
)
_PROCESSING = "compare tokenizer, template, image processor and truncation: mindspeed-mm data inspect shows the samples"

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Placed:
    """A sample and where it was trained on: its step, and its place in the order of all recorded samples.

    Attributes:
        key: what tells it apart: its tokens; where several samples have the same ones, its other fields as well.
    """

    step: int
    place: int
    sample: SampleFingerprint
    key: str = ""

    def __str__(self) -> str:
        """Return how people find it."""
        return f"{self.sample.name or self.sample.id[:12]} (step {self.step})"


def placed(record: Record) -> list[Placed]:
    """Return all samples of a record in the order of training."""
    found: list[Placed] = []
    for step in record.steps:
        found += [Placed(step, len(found) + i, sample) for i, sample in enumerate(record.step(step).samples)]
    return found


def judge_data(reference: list[Placed], candidate: list[Placed], decode: Decode | None = None) -> Verdict:
    """Compare samples: the same, reordered, shifted, missing, duplicated, or with another content.

    Another order within a global batch changes nothing but rounding and is a note.

    Args:
        reference: its samples in order.
        candidate: the other's.
        decode: token ids to text, for what is shown of different samples.
    """
    verdict = Verdict("data-diff")
    if not reference or not candidate:
        verdict.undecided = f"the {'candidate' if reference else 'reference'} has recorded no samples"
        return verdict
    steps = sorted({p.step for p in reference} & {p.step for p in candidate})
    if not steps:
        verdict.undecided = "the records have no step in common"
        return verdict
    reference, candidate, blind = _identified(reference, candidate)
    verdict.findings += _order(reference, candidate, steps, verdict, blind)
    verdict.findings += _contents(reference, candidate, verdict)
    verdict.findings += _changed_tokens(reference, candidate, decode)
    verdict.notes.append(f"{len(reference)} and {len(candidate)} samples, {len(steps)} steps in common")
    return verdict


def _identified(reference: list[Placed], candidate: list[Placed]) -> tuple[list[Placed], list[Placed], list[str]]:
    """Give samples their keys. One in the place of another with the same tokens is that sample, changed.

    Returns:
        Both sides, and the fields that would tell samples with the same tokens apart, if they ever agreed.
    """
    sides = [Counter(p.sample.id for p in samples) for samples in (reference, candidate)]
    repeated = {id_ for side in sides for id_, count in side.items() if count > 1}
    both = [p.sample.fields for p in (*reference, *candidate)]
    common = sorted(set.intersection(*(set(fields) for fields in both)))
    # A field that never agrees tells nothing apart: it is made in another way.
    telling = [n for n in common if {p.sample.fields[n] for p in reference} & {p.sample.fields[n] for p in candidate}]

    def key(p: Placed) -> str:
        return p.sample.id + ("".join(f"|{p.sample.fields[n]}" for n in telling) if p.sample.id in repeated else "")

    ours = [replace(p, key=key(p)) for p in reference]
    theirs = [replace(p, key=key(p)) for p in candidate]
    at, known, there = {(p.step, p.place): p for p in ours}, _counts(ours), _counts(theirs)
    for i, p in enumerate(theirs):
        mine = at.get((p.step, p.place))
        if mine and not known[p.key] and not there[mine.key] and mine.sample.id == p.sample.id:
            theirs[i] = replace(p, key=mine.key)
    return ours, theirs, [name for name in common if name not in telling] if repeated else []


def _order(
    reference: list[Placed], candidate: list[Placed], steps: Sequence[int], verdict: Verdict, blind: list[str]
) -> Iterator[Finding]:
    wrong = [step for step in steps if _ids(reference, step) != _ids(candidate, step)]
    if not wrong:
        if any(_in_order(reference, step) != _in_order(candidate, step) for step in steps):
            verdict.notes.append("samples come in another order within a global batch, which changes only rounding")
        return
    if blind:
        text = (
            f"many samples have the same tokens, and {', '.join(blind)} agrees in none: either other samples, or the "
            "same ones made otherwise"
        )
        yield _finding("samples", wrong[0], text, _SAMPLER)
        return
    if shift := _shift(reference, candidate):
        size = sum(p.step == steps[0] for p in reference)
        whole = f", {abs(shift) // size} steps" if size and shift % size == 0 else ""
        side = "later" if shift > 0 else "earlier"
        text = f"the candidate has each sample {abs(shift)} samples{whole} {side} than the reference"
        yield _finding("order", wrong[0], text, _SAMPLER)
        return
    ours, theirs = _counts(reference), _counts(candidate)
    if ours == theirs:
        moved = next(p for p in candidate if p.step == wrong[0] and p.key not in _ids(reference, wrong[0]))
        home = next(p for p in reference if p.key == moved.key)
        text = f"all samples are there, but in other steps: {moved} is in step {home.step} of the reference"
        yield _finding("order", wrong[0], text, _SAMPLER)
        return
    yield from _absent(reference, candidate, wrong[0])


def _absent(reference: list[Placed], candidate: list[Placed], step: int) -> Iterator[Finding]:
    ours, theirs = _counts(reference), _counts(candidate)
    twice = [p for p in candidate if theirs[p.key] > max(ours[p.key], 1)]
    if twice:
        text = f"{len({p.key for p in twice})} samples are there more often than in the reference: {_some(twice)}"
        yield _finding("duplicates", twice[0].step, text, _SAMPLER)
    missing = [p for p in reference if not theirs[p.key]]
    foreign = [p for p in candidate if not ours[p.key]]
    if missing and not foreign:
        count = len(missing)
        where = ""
        if [p.place for p in missing] == list(range(count)):
            where = ", the first ones"
        elif [p.place for p in missing] == list(range(len(reference) - count, len(reference))):
            where = ", the last ones"
        text = f"{count} samples of the reference are missing{where}: {_some(missing)}"
        yield _finding("missing", missing[0].step, text, _SAMPLER)
    elif foreign:
        text = f"{len(foreign)} of {len(candidate)} samples are not the reference's: {_some(foreign)}"
        yield _finding("samples", foreign[0].step, text, _PROCESSING)
    elif not twice:
        text = f"samples are in other steps, {_some([p for p in candidate if p.step == step])}"
        yield _finding("order", step, text, _SAMPLER)


def _contents(reference: list[Placed], candidate: list[Placed], verdict: Verdict) -> Iterator[Finding]:
    """Compare the fields of samples with the same tokens."""
    ours = {p.key: p for p in reference}
    apart: dict[str, list[Placed]] = {}
    one_sided: set[str] = set()
    for other in candidate:
        mine = ours.get(other.key)
        if mine is None:
            continue
        fields, others = mine.sample.fields, other.sample.fields
        one_sided |= fields.keys() ^ others.keys()
        for name in fields.keys() & others.keys():
            if fields[name] != others[name]:
                apart.setdefault(name, []).append(other)
    for name, samples in sorted(apart.items()):
        text = f"{name} of {len(samples)} samples differs though their tokens are the same: {_some(samples)}"
        yield _finding(name, samples[0].step, text, _PROCESSING)
    if one_sided:
        verdict.notes.append(f"fields that only one side has were not compared: {', '.join(sorted(one_sided))}")


def _changed_tokens(reference: list[Placed], candidate: list[Placed], decode: Decode | None) -> Iterator[Finding]:
    """Where both sides have a strange sample at the same place, show where their tokens part."""
    ours, theirs = _counts(reference), _counts(candidate)
    at = {(p.step, p.place): p for p in reference if not theirs[p.key]}
    pairs = [(at[p.step, p.place], p) for p in candidate if not ours[p.key] and (p.step, p.place) in at]
    if not pairs or not (pairs[0][0].sample.tokens and pairs[0][1].sample.tokens):
        return
    mine, other = pairs[0]
    a, b = mine.sample.tokens, other.sample.tokens
    first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shown = [_excerpt(tokens, first, decode) for tokens in (a, b)]
    text = f"{other}: tokens differ from number {first} on, of {len(a)} and {len(b)}: {shown[0]} became {shown[1]}"
    yield _finding("input_ids", other.step, text, _PROCESSING)


def _excerpt(tokens: Sequence[int], place: int, decode: Decode | None) -> str:
    part = list(tokens[max(0, place - _AROUND) : place + _AROUND])
    return repr(decode(part)) if decode else str(part)


def _shift(reference: list[Placed], candidate: list[Placed]) -> int:
    """Return by how many samples the candidate is behind; 0 where that is not one number."""
    ours, theirs = _counts(reference), _counts(candidate)
    places = {p.key: p.place for p in reference if ours[p.key] == 1}
    known = [p for p in candidate if theirs[p.key] == 1 and p.key in places]
    distances = Counter(p.place - places[p.key] for p in known)
    if len(known) < 2:
        return 0
    distance, count = distances.most_common(1)[0]
    overlap = min(len(reference), len(candidate)) - abs(distance)
    return distance if count >= _MOST * len(known) and count >= _MOST * overlap else 0


def _ids(samples: list[Placed], step: int) -> Counter[str]:
    return Counter(_in_order(samples, step))


def _in_order(samples: list[Placed], step: int) -> list[str]:
    return [p.key for p in samples if p.step == step]


def _counts(samples: list[Placed]) -> Counter[str]:
    return Counter(p.key for p in samples)


def _some(samples: Sequence[Placed]) -> str:
    return ", ".join(str(p) for p in samples[:3]) + (", ..." if len(samples) > 3 else "")


def _finding(site: str, step: int, evidence: str, command: str) -> Finding:
    return Finding("data", site, step, evidence, command)
