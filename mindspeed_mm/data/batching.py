"""Which samples go into the model together: one by one, packed into one sequence, or up to a number of tokens.

The smallest thing that a plan makes is a unit, a list of samples; a micro batch is ``--micro-batch-size`` units and a
global batch ``--global-batch-size``. A plan looks at one window of the order at a time and at nothing else. So the
units of a window are known without those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from mindspeed_mm.data.order import Order
from mindspeed_mm.data.packing import plan_packs

_PACKS_IN_WINDOW = 200


class Plan(Protocol):
    """How samples form units.

    Attributes:
        name: for messages, and to notice that a run goes on with another plan.
        window: samples that are planned together.
    """

    name: str
    window: int

    def units(self, samples: np.ndarray) -> list[list[Any]]:
        """Return the units of one window of samples."""

    def at_least(self, samples: np.ndarray) -> int:
        """Return a lower bound of the units of many samples, in whatever order they come."""


class Singles:
    """Every sample is a unit."""

    name = "samples"

    def __init__(self, window: int = 2**16) -> None:
        self.window = window

    def units(self, samples: np.ndarray) -> list[list[Any]]:
        """Return the units of one window of samples."""
        return [[index] for index in samples.tolist()]

    def at_least(self, samples: np.ndarray) -> int:
        """Return the number of units."""
        return len(samples)


class Packs:
    """A unit is a pack: samples that share one sequence.

    Args:
        lengths: tokens of every sample, (N,).
        capacity: tokens of a sequence.
        window: samples that are planned together; by default those of about 200 packs.
    """

    name = "packs"

    def __init__(self, lengths: np.ndarray, capacity: int, window: int | None = None) -> None:
        self.lengths = np.clip(lengths, 1, capacity)
        self.capacity = capacity
        mean = max(1.0, float(self.lengths.mean())) if len(lengths) else 1.0
        self.window = window or max(1, round(_PACKS_IN_WINDOW * capacity / mean))

    def units(self, samples: np.ndarray) -> list[list[Any]]:
        """Return the units of one window of samples."""
        packs = plan_packs(self.lengths[samples].tolist(), self.capacity, len(samples))
        return [samples[pack].tolist() for pack in packs]

    def at_least(self, samples: np.ndarray) -> int:
        """Return what packs without a gap would make."""
        return -(-int(self.lengths[samples].sum(dtype=np.int64)) // self.capacity)


class TokenBudget:
    """A unit is a micro batch: as many samples of like length as make it no larger than a number of tokens, padded.

    Args:
        lengths: tokens of every sample, (N,), none more than the budget.
        budget: tokens of a micro batch, padding included.
        window: samples that are looked at when micro batches are filled.
        multiple: the length of a micro batch is padded to a multiple of this.
    """

    name = "token budgets"

    def __init__(self, lengths: np.ndarray, budget: int, window: int, multiple: int = 1) -> None:
        self.lengths = np.minimum(-(-lengths // multiple) * multiple, budget)
        self.budget = budget
        self.window = window

    def units(self, samples: np.ndarray) -> list[list[Any]]:
        """Return the units of one window of samples, in the order of their first samples."""
        units: list[list[int]] = []
        longest = 0
        for position in np.argsort(-self.lengths[samples], kind="stable").tolist():
            if not units or (len(units[-1]) + 1) * longest > self.budget:
                units.append([])
                longest = int(self.lengths[samples[position]])
            units[-1].append(position)
        return [samples[unit].tolist() for unit in sorted(sorted(unit) for unit in units)]

    def at_least(self, samples: np.ndarray) -> int:
        """Return what micro batches without padding would make."""
        return -(-int(self.lengths[samples].sum(dtype=np.int64)) // self.budget)


class IndexWindows:
    """The units of a map-style data set, window by window.

    Args:
        order: of the samples; has a length.
        num_samples: of the data set.
        plan: makes the units.
        about: what else decides the order, to notice that a run goes on with another.
    """

    def __init__(self, order: Any, num_samples: int, plan: Plan, about: dict[str, Any] | None = None) -> None:
        self.order: Order = order
        self.num_samples = num_samples
        self.plan = plan
        self.window = plan.window
        self.counts = len(order) if isinstance(plan, Singles) else None
        self.about = {"samples": len(order), "units": plan.name, **(about or {})}

    def windows(self, epoch: int, first: int = 0, state: Any = None) -> Iterator[tuple[list[list[Any]], Any]]:
        """Yield the units of each window of ``epoch`` from number ``first`` on, and None: a number is all it takes."""
        order = self.order(epoch)
        for begin in range(first * self.window, len(order), self.window):
            yield self.plan.units(order[begin : begin + self.window]), None

    def one_pass(self) -> Iterator[list[list[Any]]]:
        """Yield the units of every window of the data set in its own order."""
        for begin in range(0, self.num_samples, self.window):
            yield self.plan.units(np.arange(begin, min(begin + self.window, self.num_samples)))

    def at_least(self) -> int:
        """Return a lower bound of the units of an epoch."""
        return self.plan.at_least(self.order(0)) if self.counts is None else self.counts
