"""How tensor-parallel ranks share a vocabulary: equal parts, the last of which may hold rows that are no words.

These rows are padding. They start at zero and stay there: no token is looked up in them, their logits are cut off
before anything is computed of them, so that their gradient is zero. No file has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DIVISOR = "make_vocab_size_divisible_by"
"""In ``megatron`` of model.json, where the command line's flag is put; no field of ``TransformerConfig``."""


@dataclass(frozen=True)
class VocabularyShare:
    """The part of one rank.

    Attributes:
        words: of the whole vocabulary.
        rows: of each rank's part.
        rank: this rank's place among them.
    """

    words: int
    rows: int
    rank: int

    @property
    def first(self) -> int:
        """The first word here; the number of words or more where there are none."""
        return self.rank * self.rows

    @property
    def held(self) -> int:
        """How many rows here are words; the others follow them."""
        return min(max(self.words - self.first, 0), self.rows)


def rows_of_each(words: int, ranks: int, divisor: int = 1) -> int:
    """Return how many rows each of ``ranks`` has, a multiple of ``divisor``: all together Megatron's padded size."""
    return math.ceil(words / (ranks * divisor)) * divisor
