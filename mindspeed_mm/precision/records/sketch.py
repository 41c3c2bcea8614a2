"""A few numbers that stand for a tensor, add up over its parts, and tell how far two tensors are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

SIZE = 32
"""Numbers of a sketch's vector."""


@dataclass(frozen=True)
class Sketch:
    """A linear sketch of a tensor with some plain statistics.

    Element ``x[i0, i1, ...]`` is added to number ``j`` of ``vector`` with the sign ``r0_j(i0) * r1_j(i1) * ...``, where
    the signs of a dimension are a fixed random function of its index in the *full* tensor; those of the rows of an
    activation are a function of the sample and the place in it (see
    :mod:`mindspeed_mm.precision.recording.rows`). So the sketches of parts add up to the sketch of the whole, however
    it was cut, and ``|A - B|^2`` is, on average, ``|vector_a - vector_b|^2 / SIZE`` (the tug-of-war sketch of Alon,
    Matias and Szegedy, 1996).

    Attributes:
        vector: (SIZE,) float64.
        count: elements behind it, padding left out.
        total: their sum.
        square_sum: the sum of their squares, exact unless ``estimated``.
        maximum: the largest; -inf without elements.
        minimum: the smallest; inf without elements.
        nonfinite: pieces that hold NaN or infinity, 0 if there is none. How many pieces a tensor has depends on how it
            was split.
        dtype: what the tensor was stored in, as torch names it: ``float32``; ``mixed`` for parts that differ.
        shape: of the full tensor; of an activation its rows without padding, all samples of the step, and the other
            dimensions. None for parts that do not fit together.
        rows: what tells the rows of an activation apart: ``token``, ``patch``, ``image``, ``sample``, or ``index``
            where nothing but their place in the batch does: such sketches depend on how the global batch was split.
            Empty for what has no rows: parameters, gradients of parameters, optimizer state.
        part: ``(offset, size)`` in each dimension of what one rank holds; of several boxes of one tensor, one after the
            other. None for all of it.
        copy: another rank holds the same, which counts.
        summed: what ranks hold adds up. Otherwise equal parts of different ranks are one, which must be equal.
        estimated: tensors were added element by element, as local gradients are, so that ``square_sum`` is an estimate
            from ``vector``, to about 25 %, and ``maximum`` and ``minimum`` are those of the summands.
    """

    vector: np.ndarray
    count: int
    total: float
    square_sum: float
    maximum: float
    minimum: float
    nonfinite: int
    dtype: str
    shape: tuple[int, ...] | None
    rows: str = ""
    part: tuple[tuple[int, int], ...] | None = None
    copy: bool = False
    summed: bool = False
    estimated: bool = False

    def __add__(self, other: Sketch) -> Sketch:
        """Return the sketch of both parts together, or of the sum of both where they are the same part."""
        overlap = self.summed and not self.rows and self.part == other.part
        vector = self.vector + other.vector
        estimated = overlap or self.estimated or other.estimated
        estimate = float(vector @ vector) / SIZE
        return Sketch(
            vector=vector,
            count=self.count if overlap else self.count + other.count,
            total=self.total + other.total,
            square_sum=estimate if estimated else self.square_sum + other.square_sum,
            maximum=max(self.maximum, other.maximum),
            minimum=min(self.minimum, other.minimum),
            nonfinite=self.nonfinite + other.nonfinite,
            dtype=self.dtype if self.dtype == other.dtype else "mixed",
            shape=_joined_shape(self, other),
            rows=self.rows if self.rows == other.rows else "index",
            part=_joined_part(self, other),
            copy=self.copy and other.copy,
            summed=self.summed or other.summed,
            estimated=estimated,
        )

    def scaled(self, factor: float) -> Sketch:
        """Return the sketch of the tensor times ``factor``."""
        if factor == 1.0:
            return self
        ends = sorted((self.maximum * factor, self.minimum * factor)) if self.count else [math.inf, -math.inf]
        return replace(
            self,
            vector=self.vector * factor,
            total=self.total * factor,
            square_sum=self.square_sum * factor**2,
            maximum=ends[1],
            minimum=ends[0],
        )

    @property
    def norm(self) -> float:
        """The L2 norm, exact."""
        return math.sqrt(self.square_sum) if self.square_sum >= 0 else math.nan

    @property
    def mean(self) -> float:
        """The mean; 0 without elements."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True)
class Distance:
    """How far A is from B.

    Attributes:
        relative: estimate of ``|A - B| / |B|``, within about 20 % for 9 of 10 pairs of tensors; 0 for equal sketches,
            infinite where only one is zero or only one is finite; 0 for two that are not finite, of which nothing more
            can be said.
        norm_gap: ``||A| - |B|| / |B|``, exact; 0 where one of the norms is only estimated.
    """

    relative: float
    norm_gap: float


def distance(a: Sketch, b: Sketch) -> Distance:
    """Return how far ``a`` is from ``b``, the reference."""
    if a.nonfinite or b.nonfinite:
        apart = 0.0 if a.nonfinite and b.nonfinite else math.inf
        return Distance(apart, apart)
    estimate = float(np.linalg.norm(a.vector - b.vector)) / math.sqrt(SIZE)
    gap = 0.0 if a.estimated or b.estimated else abs(a.norm - b.norm)
    return Distance(_over(estimate, b.norm), _over(gap, b.norm))


def _over(difference: float, norm: float) -> float:
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else math.inf


def _joined_part(a: Sketch, b: Sketch) -> tuple[tuple[int, int], ...] | None:
    if a.part == b.part:
        return a.part
    return None if a.rows or b.rows or a.part is None or b.part is None else a.part + b.part


def _joined_shape(a: Sketch, b: Sketch) -> tuple[int, ...] | None:
    if a.shape is None or b.shape is None:
        return None
    if a.rows and b.rows and a.shape and b.shape and a.shape[1:] == b.shape[1:]:
        return (a.shape[0] + b.shape[0], *a.shape[1:])
    return a.shape if a.shape == b.shape else None
