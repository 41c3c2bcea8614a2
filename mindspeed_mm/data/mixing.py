"""Several data sets in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from mindspeed_mm.data.order import shares_of
from mindspeed_mm.errors import UserError


class MixedDataset(ConcatDataset[Any]):
    """Data sets one after the other, of which an epoch takes different shares.

    Args:
        datasets: map-style, of the same kind.
        repeat_times: of each: below 1 only its first rows, above 1 rows more than once.
        weights: of each in an epoch, in any unit; None takes every row as often as ``repeat_times`` says. A set that
            gives fewer rows than it has goes on with the others in the next epoch.
    """

    def __init__(
        self, datasets: Sequence[Any], repeat_times: Sequence[float], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(datasets)
        self.parts = list(datasets)
        self._repeat_times, self._weights = repeat_times, weights
        self.shares = shares_of([len(part) for part in datasets], repeat_times, weights)
        if weights and (never := [n for n, share in enumerate(self.shares) if not share.per_epoch]):
            number, rows = never[0], sum(share.per_epoch for share in self.shares)
            raise UserError(
                f"data.json: dataset_param.basic_parameters.mixture.{number}.weight: {weights[number]:g} beside the "
                f"others is not one of the {rows} rows of an epoch, so it would never be trained on; raise it"
            )

    @property
    def sizes(self) -> np.ndarray | None:
        """Tokens and image patches of every sample, (N, 2) int32, where all sets know them."""
        sizes = [getattr(part, "sizes", None) for part in self.parts]
        return None if any(one is None for one in sizes) else np.concatenate(sizes)

    def where(self, index: int) -> str:
        """Name a sample, for messages."""
        part, index = self._locate(index)
        return str(getattr(self.parts[part], "where", f"data set {part}, sample {{}}".format)(index))

    def question(self, index: int) -> Any:
        """Return a sample without its last answer; see ``ConversationDataset.question``."""
        part, index = self._locate(index)
        return self.parts[part].question(index)

    def train_test_split(self, test_size: float, seed: int) -> dict[str, Any]:
        """Split each set; see ``ConversationDataset.train_test_split``. The held-out parts are not mixed."""
        splits = [part.train_test_split(test_size=test_size, seed=seed) for part in self.parts]
        train = MixedDataset([split["train"] for split in splits], self._repeat_times, self._weights)
        return {"train": train, "test": MixedDataset([split["test"] for split in splits], [1.0] * len(splits))}

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.cumulative_sizes, index, side="right"))
        return part, index - (self.cumulative_sizes[part - 1] if part else 0)

    def __getattr__(self, name: str) -> Any:
        """Return what the first set has, its encoder say: they are of the same kind."""
        if name in ("parts", "datasets"):  # not there yet while it is being unpickled
            raise AttributeError(name)
        return getattr(self.parts[0], name)
