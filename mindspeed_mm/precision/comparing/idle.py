"""Differences that make none: a tensor is another one, and what is made of it is the same.

Rotary angles of positions that are all shifted, as left padding shifts them, are such, or the experts of a token named
in another order. How something is handed on is no finding as long as nothing follows from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from functools import partial

from mindspeed_mm.precision.comparing.pairing import UNCLIPPED, Pair, is_around
from mindspeed_mm.precision.records.record import Key

# So many times what is noticed of its effect a difference has to be, or it may be too small to have one.
_LARGE = 1000.0


def settle(pair: Pair) -> list[str]:
    """Take the differences that make none out of what is bad in the forward pass; return what to say of them.

    Such is what differs inside of a module whose outputs agree, and what all modules that take it make the same of.
    """
    made: list[Key] = []
    while idle := _idle(pair):  # what a module was given is idle once what it returns is
        pair.idle |= {*idle, *(Key("backward", key.site, f"grad_{key.what}") for key in idle)}
        made += [key for key in idle if key.what.startswith("output.")]
    return [f"{key.site} returns another {key.what} without any effect: left out" for key in made[:1]]


def _idle(pair: Pair) -> list[Key]:
    limits = _limits(pair)
    tensors: dict[tuple[bytes, bytes], list[Key]] = defaultdict(list)
    for key in filter(pair.bad, pair.keys("forward")):
        row = pair.measure(key)
        if row is not None and not row.note:
            sketches = pair.reference.entries[key], pair.candidate.entries[key]
            tensors[sketches[0].vector.tobytes(), sketches[1].vector.tobytes()].append(key)
    return [key for keys in tensors.values() if _is_idle(pair, keys, limits) for key in keys]


def _is_idle(pair: Pair, keys: list[Key], limits: dict[str, float]) -> bool:
    """Return whether a tensor, which goes by these names, is off without an effect."""
    row = pair.measure(keys[0])
    assert row is not None
    has_none = partial(_has_no_effect, row.relative, limits)
    if all(any(has_none(around) for around in limits if is_around(around, key.site)) for key in keys):
        return True
    takers = {key.site for key in keys if key.what.startswith("input.")}
    takers = {site for site in takers if not any(is_around(site, other) for other in takers)}
    # Who is given something else that is wrong too says nothing about this.
    telling = [site for site in takers if has_none(site) or not _is_disturbed(pair, site, keys)]
    return bool(telling) and all(map(has_none, telling))


def _has_no_effect(relative: float, limits: dict[str, float], site: str) -> bool:
    return site in limits and relative > _LARGE * limits[site]


def _limits(pair: Pair) -> dict[str, float]:
    """Return the modules that make the same of what they are given, and what would have been noticed of them.

    Their outputs agree, and the gradients of all parameters in them that something else was multiplied with.
    """
    found: dict[str, float] = {}
    off: set[str] = set()
    given: set[str] = set()
    for key in pair.keys("forward"):
        row = pair.measure(key)
        if row is not None and key.what.startswith("output."):
            found[key.site] = max(found.get(key.site, 0.0), row.tolerance)
        if pair.bad(key):
            (off if key.what.startswith("output.") else given).add(key.site)
    gradients = [key for phase in UNCLIPPED for key in pair.keys(phase)]
    trained = {owner for key in gradients if (owner := key.site.rpartition(".")[0]) in given and pair.bad(key)}
    off |= {site for site in found for owner in trained if site == owner or is_around(site, owner)}
    return {site: limit for site, limit in found.items() if site not in off}


def _is_disturbed(pair: Pair, site: str, known: Collection[Key]) -> bool:
    others = [k for k in pair.keys("forward") if k.site == site and k.what.startswith("input.") and k not in known]
    return any(pair.bad(key) and "int" not in pair.reference.entries[key].dtype for key in others)
