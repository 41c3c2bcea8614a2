"""Whether two runs trained on the same samples in the same steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from mindspeed_mm.precision.records.record import SampleFingerprint

Samples = Sequence[SampleFingerprint]


def difference(reference: Samples, candidate: Samples, elsewhere: Mapping[int, Samples]) -> tuple[str, str] | None:
    """Return which field differs and how; None for the same samples, in whatever order, or where one is not known.

    Args:
        reference: its samples of a global batch.
        candidate: its samples of the same one.
        elsewhere: the reference's samples by step, to say where a wrong sample belongs.
    """
    if not reference or not candidate:
        return None
    ours, theirs = Counter(s.id for s in reference), Counter(s.id for s in candidate)
    extra, absent = theirs - ours, ours - theirs
    fields = _fields_apart(reference, candidate)
    if not extra and not absent:
        return fields
    if len(reference) == len(candidate) and "input_ids" not in _common(reference, candidate) and fields:
        return fields
    named = {s.id: s for s in [*reference, *candidate]}
    parts = []
    if extra:
        parts.append(f"{sum(extra.values())} samples are not the reference's ({_list(extra, named, elsewhere, ours)})")
    if absent:
        parts.append(f"{sum(absent.values())} of its samples are absent ({_list(absent, named, {}, Counter())})")
    return "samples", f"of {len(reference)} samples " + " and ".join(parts)


def _fields_apart(reference: Samples, candidate: Samples) -> tuple[str, str] | None:
    """Compare the content of samples with the same id, field by field."""
    common = _common(reference, candidate)
    apart: dict[str, list[str]] = {}
    for name in sorted(common):
        ours = Counter((s.id, s.fields.get(name)) for s in reference)
        theirs = Counter((s.id, s.fields.get(name)) for s in candidate)
        if ours != theirs:
            apart[name] = sorted({id_ for id_, _ in (ours - theirs)})
    if not apart:
        return None
    named = {s.id: s for s in [*reference, *candidate]}
    text = "; ".join(f"{name} of {len(ids)} samples ({_name(named[ids[0]])}, ...)" for name, ids in apart.items())
    return ", ".join(apart), f"the same samples with another content: {text}"


def _common(reference: Samples, candidate: Samples) -> set[str]:
    return set.intersection(*(set(s.fields) for s in [*reference, *candidate]))


def _list(
    ids: Counter[str], named: Mapping[str, SampleFingerprint], elsewhere: Mapping[int, Samples], known: Counter[str]
) -> str:
    words = []
    for id_ in list(ids)[:3]:
        word = _name(named[id_])
        steps = [step for step, samples in elsewhere.items() if any(s.id == id_ for s in samples)]
        if known[id_]:
            word += ", which is there already"
        elif steps:
            word += f", which the reference has in step {', '.join(map(str, steps[:3]))}"
        words.append(word)
    return "; ".join([*words, *(["..."] if len(ids) > 3 else [])])


def _name(sample: SampleFingerprint) -> str:
    return sample.name or (f"number {sample.position}" if sample.position is not None else sample.id[:12])
