"""How far two runs of the same training may lie apart: measured on repeated reference runs, or assumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_mm.errors import UserError
from mindspeed_mm.precision.records.record import Key, Record
from mindspeed_mm.precision.records.sketch import SIZE, Sketch

FORMAT = 1
SAFETY = 6.0
"""What a measured spread is multiplied with: the few runs behind it do not show the largest one."""

# Relative to the tensor's norm: what summing in another order changes, whatever was measured.
_FLOOR = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 1e-4, "float16": 1e-4}
# Without a band: rounding of one operation, about what a chain of a few of them leaves.
_ASSUMED = {"float64": 1e-11, "float32": 4e-6, "bfloat16": 2e-2, "float16": 3e-3}


@dataclass(frozen=True)
class Gap:
    """How far two tensors are apart, by measures that see different things.

    Attributes:
        distance: estimate of ``|A - B|``: whatever differs, rounding included.
        norm: ``||A| - |B||``, exact; 0 where a norm is an estimate. Rounding goes up and down and hardly moves
            it, so that in 16 bits it shows what is biased long before the distance does.
    """

    distance: float = 0.0
    norm: float = 0.0

    def widened(self, other: Gap) -> Gap:
        """Return the larger of both, measure by measure."""
        return Gap(max(self.distance, other.distance), max(self.norm, other.norm))


def gap(a: Sketch, b: Sketch) -> Gap:
    """Return how far two tensors are apart."""
    if a.nonfinite or b.nonfinite:
        apart = 0.0 if a.nonfinite and b.nonfinite else float("inf")
        return Gap(apart, apart)
    of_norms = 0.0 if a.estimated or b.estimated else abs(a.norm - b.norm)
    return Gap(float(np.linalg.norm(a.vector - b.vector)) / SIZE**0.5, of_norms)


def floor(*dtypes: str) -> float:
    """Return the relative difference that is never a finding; of several dtypes the coarsest counts."""
    return max(_FLOOR.get(dtype, _FLOOR["float32"]) for dtype in dtypes)


def assumed(depth: int, *dtypes: str) -> float:
    """Return the relative tolerance after ``depth`` modules when nothing was measured."""
    return max(_ASSUMED.get(dtype, _ASSUMED["float32"]) for dtype in dtypes) * (1 + depth) ** 0.5


@dataclass
class Band:
    """The largest distances between reference runs that differ by noise only.

    Attributes:
        runs: that were compared.
        spreads: by step and key.
        scalars: the same of the step's scalars, by step and name.
    """

    runs: int
    spreads: dict[tuple[int, Key], Gap] = field(default_factory=dict)
    scalars: dict[tuple[int, str], float] = field(default_factory=dict)

    @classmethod
    def measure(cls, records: Sequence[Record]) -> Band:
        """Compare every two of these records at the steps that all have.

        Raises:
            UserError: there are fewer than two, or they have no step in common.
        """
        if len(records) < 2:
            raise UserError(
                "precision band: one record has no spread; record the reference again with --precision-perturb 1, 2, 3 "
                "and pass all the folders."
            )
        steps = set.intersection(*(set(record.steps) for record in records))
        if not steps:
            raise UserError("precision band: the records have no step in common; capture the same steps in all.")
        band = cls(len(records))
        for number in sorted(steps):
            for one, other in combinations([record.step(number) for record in records], 2):
                for key in one.entries.keys() & other.entries.keys():
                    apart = gap(one.entries[key], other.entries[key])
                    band.spreads[number, key] = apart.widened(band.spreads.get((number, key), Gap()))
                for name in one.scalars.keys() & other.scalars.keys():
                    spread = abs(one.scalars[name] - other.scalars[name])
                    band.scalars[number, name] = max(spread, band.scalars.get((number, name), 0.0))
        return band

    def write(self, path: Path) -> None:
        """Write the band as JSON."""
        content = {
            "precision_band": FORMAT,
            "runs": self.runs,
            "spreads": [
                [step, key.phase, key.site, key.what, found.distance, found.norm]
                for (step, key), found in self.spreads.items()
            ],
            "scalars": [[step, name, value] for (step, name), value in self.scalars.items()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Band:
        """Read what :meth:`write` wrote.

        Raises:
            UserError: it is not a band.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if content["precision_band"] != FORMAT:
                raise KeyError(f"precision_band {content['precision_band']}")
            spreads = {
                (step, Key(phase, site, what)): Gap(distance, norm)
                for step, phase, site, what, distance, norm in content["spreads"]
            }
            return cls(content["runs"], spreads, {(step, name): v for step, name, v in content["scalars"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--band {path}: not a band ({error}); make one with 'mindspeed-mm precision band REF REF2 -o {path}'."
            ) from error
