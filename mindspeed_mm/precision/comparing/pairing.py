"""One step of two runs side by side: which of their tensors are apart by more than noise explains."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from statistics import median

from mindspeed_mm.precision.comparing.band import SAFETY, Band, Gap, assumed, floor, gap
from mindspeed_mm.precision.finding import Measurement
from mindspeed_mm.precision.records.record import Key, StepRecord
from mindspeed_mm.precision.records.sketch import Sketch

_FLOATS = ("float64", "float32", "bfloat16", "float16", "mixed")
# A gradient that is zero but for rounding is measured against those around it.
NEIGHBOURS = 0.1
_PHASE_SCALE = 1e-3
_NORM_OF_DISTANCE = 0.2
_COUNTED = 1e-6  # relative, of integers: they are added up in float32
UNCLIPPED = ("grad_local", "grad_reduced")
_GRADIENTS = (*UNCLIPPED, "grad_clipped")


class Pair:
    """A step of the reference and of the candidate.

    Args:
        reference, candidate: the step.
        band: the reference's own spread; None assumes one from dtype and depth.
        first: no earlier step has been recorded, so that nothing but the start can have made weights differ.
    """

    def __init__(self, reference: StepRecord, candidate: StepRecord, band: Band | None, first: bool = True) -> None:
        self.reference, self.candidate = reference, candidate
        self.step = reference.step
        self.band = band
        self.first = first
        self.idle: set[Key] = set()
        self._known: dict[Key, Measurement | None] = {}

    def keys(self, phase: str) -> list[Key]:
        """The reference's keys of a phase, in the order of execution."""
        return [key for key in self.reference.entries if key.phase == phase]

    def missing(self, phase: str) -> list[Key]:
        """Keys of the reference that the candidate has not, if it has the phase at all."""
        theirs = self.candidate.entries
        if not any(key.phase == phase for key in theirs):
            return []
        return [key for key in self.keys(phase) if key not in theirs]

    def extra(self, phase: str) -> list[Key]:
        """Keys of the candidate that the reference has not, if it has the phase at all."""
        ours = self.reference.entries
        if not any(key.phase == phase for key in ours):
            return []
        return [key for key in self.candidate.entries if key.phase == phase and key not in ours]

    def bad(self, key: Key) -> bool:
        """Whether both have the tensor, it can be compared, and it is out of the band in a way that matters."""
        found = None if key in self.idle else self.measure(key)
        return found is not None and not found.in_band

    def measure(self, key: Key) -> Measurement | None:
        """Return how far apart a tensor is; None where that cannot be said."""
        if key not in self._known:
            self._known[key] = self._measure(key)
        return self._known[key]

    def _measure(self, key: Key) -> Measurement | None:
        ours, theirs = self.reference.entries.get(key), self.candidate.entries.get(key)
        if ours is not None and theirs is None and self._is_cut(key):
            return Measurement(self.step, key.phase, key.site, key.what, 1.0, 0.0, "no gradient arrives there")
        if ours is None or theirs is None or (ours.dtype in _FLOATS) != (theirs.dtype in _FLOATS):
            return None
        note = ""
        if ours.dtype != theirs.dtype and ours.dtype in _FLOATS:
            note = f"computed in {theirs.dtype}, the reference in {ours.dtype}"
        elif bool(ours.nonfinite) != bool(theirs.nonfinite):
            note = self._whose_nonfinite(key, ours, theirs)
        by_place = "index" in (ours.rows, theirs.rows) or ours.rows != theirs.rows
        found = gap(ours, theirs)
        if ours.count != theirs.count:
            if by_place or ours.dtype not in _FLOATS:
                return None
            note = note or f"shape {_show(theirs.shape)}, in the reference {_show(ours.shape)}"
        elif ours.shape != theirs.shape or (by_place and not self.same_split):
            found = Gap(0.0, found.norm)  # the vectors' signs are those of other places
        allowed = self._allowed(key, ours, theirs)
        # Of the two measures the one that is further out speaks.
        apart, limit = found.distance, allowed.distance
        if found.norm * limit > apart * allowed.norm:
            apart, limit = found.norm, allowed.norm
        scale = max(ours.norm, 1e-30)
        return Measurement(self.step, key.phase, key.site, key.what, apart / scale, limit / scale, note)

    def _allowed(self, key: Key, ours: Sketch, theirs: Sketch) -> Gap:
        if ours.dtype not in _FLOATS:
            return Gap(_COUNTED * ours.norm, _COUNTED * ours.norm)
        dtypes = (ours.dtype, theirs.dtype)
        lowest = floor(*dtypes)
        scale = max(ours.norm, self._around(key) * ours.count**0.5)
        spread = None if self.band is None else self.band.spreads.get((self.step, key))
        if key.phase == "weights" and self.first:
            exact = min(lowest, 5e-6) * ours.norm
            return Gap(exact, exact)
        least = lowest * scale + self._from_weights(key)
        if spread is not None:
            # A difference of norms is one number, and small by accident in a few runs.
            norm = max(spread.norm, _NORM_OF_DISTANCE * spread.distance)
            return Gap(SAFETY * spread.distance + least, SAFETY * norm + least)
        relative = assumed(self._depth.get(key, 0), *dtypes, *(() if key.phase == "data" else self._coarsest))
        if not self.first:
            relative = 10 * relative + 10 * self.weights_apart
        # Without a band nothing is known of a bias; it is allowed what noise is.
        return Gap(relative * scale + least, relative * scale + least)

    @cached_property
    def gradients_apart(self) -> bool:
        """Whether parameters that both train have another gradient in the candidate, or none."""
        if any(key.what == "update" for key in [*self.missing("optimizer"), *self.extra("optimizer")]):
            return False
        return any(self.missing(phase) or any(map(self.bad, self.keys(phase))) for phase in UNCLIPPED)

    @cached_property
    def gradients_stop(self) -> bool:
        """Whether parameters that both train have no gradient in the candidate, or nothing but zeros."""
        if not self.gradients_apart:
            return False
        found = [key for phase in UNCLIPPED for key in self.reference.of_phase(phase)]
        theirs = self.candidate.entries
        return any(self.reference.entries[k].norm > 0 and (k not in theirs or theirs[k].norm == 0) for k in found)

    def _is_cut(self, key: Key) -> bool:
        """Whether this gradient, which the candidate lacks, is one of a tensor that both have computed.

        Layers that one of the runs has fused have the gradient of their common input together, so none of them has it.
        It is cut where another module that takes the same tensor has one, or where parameters get none.
        """
        ours, twin = self.reference.entries[key], Key("forward", key.site, key.what.removeprefix("grad_"))
        if key.phase != "backward" or ours.rows == "index" or not ours.norm > 0:
            return False
        if twin not in self.reference.entries or twin not in self.candidate.entries or not self.gradients_apart:
            return False
        tensor = self.reference.entries[twin].vector.tobytes()
        return self.gradients_stop or any(
            Key("backward", taker.site, f"grad_{taker.what}") in self.candidate.entries
            for taker in self._takers.get(tensor, ())
            if not is_around(taker.site, key.site)  # what is around it has the gradient of them all
        )

    @cached_property
    def _takers(self) -> dict[bytes, list[Key]]:
        """Return the modules that take a tensor of the reference, by its sketch."""
        found: dict[bytes, list[Key]] = defaultdict(list)
        for key, sketch in self.reference.of_phase("forward").items():
            if key.what.startswith("input."):
                found[sketch.vector.tobytes()].append(key)
        return found

    @cached_property
    def same_split(self) -> bool:
        """Whether all ranks got the same samples in the same order."""
        if len(self.reference.ranks) != len(self.candidate.ranks):
            return False
        return [s.id for s in self.reference.samples] == [s.id for s in self.candidate.samples]

    @cached_property
    def _coarsest(self) -> tuple[str, ...]:
        """What the modules compute in; gradients of parameters carry its rounding, whatever they are kept in."""
        both = [*self.reference.entries.items(), *self.candidate.entries.items()]
        found = {sketch.dtype for key, sketch in both if key.phase == "forward"}
        return tuple(found & {"bfloat16", "float16"})

    @cached_property
    def _depth(self) -> dict[Key, int]:
        """How many modules have run before, in the reference."""
        depth, found = 0, {}
        for key in self.reference.entries:
            if key.what.startswith(("output", "grad_input")):
                depth += 1
            found[key] = depth
        return found

    def _around(self, key: Key) -> float:
        """Return the root mean square that a tensor is at least expected to have, going by its neighbours."""
        if key.phase in _GRADIENTS:
            return max(self._near.get((key.phase, block(key.site)), 0.0), self._typical.get(key.phase, 0.0) * 0.01)
        return self._typical.get(key.phase, 0.0) * _PHASE_SCALE

    @cached_property
    def _near(self) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = defaultdict(float)
        for key, sketch in self.reference.entries.items():
            if key.phase in _GRADIENTS and sketch.count:
                place = (key.phase, block(key.site))
                found[place] = max(found[place], NEIGHBOURS * sketch.norm / sketch.count**0.5)
        return found

    @cached_property
    def _typical(self) -> dict[str, float]:
        sizes: dict[str, list[float]] = defaultdict(list)
        for key, sketch in self.reference.entries.items():
            if sketch.count and sketch.dtype in _FLOATS and sketch.norm == sketch.norm:
                sizes[key.phase].append(sketch.norm / sketch.count**0.5)
        return {phase: median(found) for phase, found in sizes.items()}

    @cached_property
    def _weight_gaps(self) -> dict[str, list[float]]:
        """Distances of the parameters of each module, where earlier steps have moved them apart."""
        found: dict[str, list[float]] = defaultdict(list)
        if not self.first:
            for key, sketch in self.reference.of_phase("weights").items():
                if key in self.candidate.entries:
                    found[key.site.rpartition(".")[0]].append(gap(sketch, self.candidate.entries[key]).distance)
        return found

    @cached_property
    def weights_apart(self) -> float:
        """How far earlier steps have moved all parameters apart, relative to their norm; 0 at the first step."""
        total = sum(sketch.square_sum for sketch in self.reference.of_phase("weights").values())
        apart = sum(value**2 for values in self._weight_gaps.values() for value in values)
        return float((apart / total) ** 0.5) if total else 0.0

    def _from_weights(self, key: Key) -> float:
        """Bound what the module's own weights, apart by earlier steps, do to this output: ``|dW x| <= |dW| |x|``."""
        gaps = self._weight_gaps.get(key.site)
        if not gaps or not key.what.startswith(("output", "grad_input")):
            return 0.0
        source = "input.0" if key.phase == "forward" else "grad_output.0"
        entry = self.reference.entries.get(Key(key.phase, key.site, source))
        ours = self.reference.entries[key]
        rows = ours.shape[0] if ours.shape else 1
        size = max(rows**0.5, entry.norm if entry and entry.dtype in _FLOATS else 0.0)
        return 2 * sum(gaps) * size

    def _whose_nonfinite(self, key: Key, ours: Sketch, theirs: Sketch) -> str:
        text = "NaN or infinity, none in the reference" if theirs.nonfinite else "NaN or infinity in the reference only"
        ranks = [r for r in self.candidate.ranks if (s := self.candidate.of_rank(r).get(key)) and s.nonfinite]
        return text + (f", on rank {', '.join(map(str, ranks))}" if ranks and len(self.candidate.ranks) > 1 else "")


def is_around(outer: str, inner: str) -> bool:
    """Return whether module ``outer`` holds module ``inner``; the model itself, "", holds all others."""
    return outer != inner and (not outer or inner.startswith(f"{outer}."))


def block(parameter: str) -> str:
    """Return the module around the one that owns a parameter: its parameters' gradients are of one size."""
    return parameter.rpartition(".")[0].rpartition(".")[0]


def _show(shape: tuple[int, ...] | None) -> str:
    return "unknown" if shape is None else "x".join(map(str, shape))
