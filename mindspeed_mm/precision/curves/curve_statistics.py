"""What the differences of two curves say beyond their size: leaning to one side, growing from some step on, noise."""

from __future__ import annotations

import numpy as np

_SHORTEST = 8  # steps on either side of a change
_STRENGTH = 30.0  # of a change: variance explained over variance left, per degree of freedom
_GROWTH = 2.0  # of the mean difference, at least
_WINDOW = 50  # steps to either side whose noise belongs to a step


def one_sidedness(difference: np.ndarray) -> float:
    """Return ``|mean of d| / mean of |d|``: near 0 for differences around zero, 1 for those of one sign."""
    size = float(np.mean(np.abs(difference))) if difference.size else 0.0
    return abs(float(np.mean(difference))) / size if size else 0.0


def onset(difference: np.ndarray) -> int | None:
    """Return the index from which on the absolute differences are larger than before, None if they do not grow.

    The split that explains most of the variance of ``|d|`` is taken if it is strong and the mean at least doubles;
    then it is moved to the first step of the rise.
    """
    size = np.abs(np.asarray(difference, dtype=np.float64))
    count = size.size
    if count < 2 * _SHORTEST:
        return None
    places = np.arange(_SHORTEST, count - _SHORTEST + 1)
    sums = np.cumsum(size)
    before = sums[places - 1] / places
    after = (sums[-1] - sums[places - 1]) / (count - places)
    explained = places * (count - places) / count * (after - before) ** 2
    best = int(np.argmax(np.where(after > before, explained, 0.0)))
    left = float(np.sum((size - size.mean()) ** 2) - explained[best])
    strength = explained[best] * (count - 2) / left if left > 0 else np.inf
    if not (after[best] > _GROWTH * before[best] and explained[best] > 0 and strength > _STRENGTH):
        return None
    split = int(places[best])
    windows = np.lib.stride_tricks.sliding_window_view(size[:split], max(_SHORTEST, split // 20))
    quiet = windows[np.argmin(np.median(windows, axis=1))]
    usual = float(np.median(quiet) + 6 * np.median(np.abs(quiet - np.median(quiet))))
    while split > 0 and size[split - 1] > usual:
        split -= 1
    return split


def band(noise: np.ndarray) -> np.ndarray:
    """Return, for each step, the largest absolute noise within 50 steps of it."""
    size = np.abs(noise)
    padded = np.pad(size, _WINDOW, mode="constant", constant_values=0.0)
    return np.asarray(np.lib.stride_tricks.sliding_window_view(padded, 2 * _WINDOW + 1).max(axis=1))
