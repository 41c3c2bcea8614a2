"""The data set of type ``huggingface``: conversations with images, encoded when they are fetched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from mindspeed_mm.data.encoding import ConversationEncoder
from mindspeed_mm.data.images import load_image
from mindspeed_mm.data.measuring import measure
from mindspeed_mm.data.preparation import Measured, Prepared
from mindspeed_mm.data.quarantine import BadSample, Quarantine
from mindspeed_mm.data.rows import RowFiles
from mindspeed_mm.data.sample_cache import SampleCache
from mindspeed_mm.errors import UserError

if TYPE_CHECKING:
    import datasets

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A conversation up to its last answer.

    Attributes:
        inputs: of the model, a batch of one sample: (1, L) per token, the others as the processor gives them.
        answer: token ids of the answer that the data has, its end-of-turn token last; (A,).
        pictures: its images, as PIL images.
    """

    inputs: dict[str, torch.Tensor]
    answer: torch.Tensor
    pictures: list[Any]


class ConversationDataset(Dataset[dict[str, torch.Tensor]]):
    """Map-style data set of conversations.

    Args:
        rows: table made by ``read_conversations``.
        files: where the rows came from.
        encoder: makes tensors of a row.
        quarantine: lists bad samples, for which loaders then take `stand_in`; without it they end the run.
        cache: of these rows.
        part_of: the data set that these rows are taken from, which has the cache, and where they are in it.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        files: RowFiles,
        encoder: ConversationEncoder,
        quarantine: Quarantine | None = None,
        cache: SampleCache | None = None,
        part_of: tuple[ConversationDataset, np.ndarray] | None = None,
    ) -> None:
        self.rows = rows
        self.files = files
        self.encoder = encoder
        self.quarantine = quarantine
        self.cache = cache
        self._part_of = part_of
        self._sizes: np.ndarray | None = None
        self._prepared: Prepared | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Decode and encode one row, or take it from the cache; see ``ConversationEncoder.encode``.

        Raises:
            BadSample: the row cannot be trained on.
            UserError: its length is not the one that batches were planned with.
        """
        if self._part_of is not None:
            whole, positions = self._part_of
            return whole[int(positions[index])]
        if self._prepared is not None and (kept := self._prepared.sample(index)) is not None:
            return kept
        row = self.rows[index]
        return self._as_planned(index, self._encode(row), row)

    def _encode(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self._made_by(self.encoder.encode, row)

    def _made_by(self, make: Callable[[dict[str, Any], str], _T], row: dict[str, Any]) -> _T:
        where = self.files.where(row["file"], row["row"])
        try:
            if row["problem"]:
                raise BadSample(where, row["problem"])
            return make(row, where)
        except BadSample as error:
            raise error.at(*self._place(row)) from error.__cause__

    def _as_planned(self, index: int, sample: dict[str, torch.Tensor], row: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self._sizes is not None and (planned := self._sizes[index, 0]) != (found := len(sample["input_ids"])):
            raise UserError(
                f"{self.files.where(row['file'], row['row'])}: has {found} tokens, had {planned} when it was prepared: "
                "a file that it names has changed since; run mindspeed-mm data prepare, which looks at such rows again"
            )
        return sample

    def measure(self, index: int) -> Measured:
        """Return a sample and its sizes; raises what fetching it raises."""
        row = self.rows[index]
        return measure(self._encode(row), row, self.encoder)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens and vision patches of every sample, int32 (N, 2); of a bad one, those of its stand-in.

        They come from the cache. What it does not have is prepared now, by all ranks that ask for it.

        Raises:
            UserError: there are bad samples and no quarantine, or the cache cannot be written to.
        """
        if self._part_of is not None:
            whole, positions = self._part_of
            return whole.sizes[positions]
        if self._sizes is None:
            self._sizes = self._look_up_sizes()
        return self._sizes

    def _look_up_sizes(self) -> np.ndarray:
        if self.cache is None:
            rows = [self.measure(index) for index in range(len(self))]
            return np.array([(row.tokens, row.patches) for row in rows], np.int32)
        self._prepared = self.cache.prepare(self, self.rows)
        sizes = np.stack([self._prepared.column("tokens"), self._prepared.column("patches")], axis=1)
        if (bad := self._prepared.bad) and self.quarantine is None:
            raise UserError(
                f"{next(iter(bad.values()))}\n{len(bad)} of {len(self)} samples are bad: mindspeed-mm data inspect "
                "lists them, on_bad_sample: quarantine leaves them out. After repairing files that rows name, run "
                "mindspeed-mm data prepare"
            )
        sizes[list(bad)] = len(self.stand_in()["input_ids"]), 0
        return sizes

    def stand_in(self) -> dict[str, torch.Tensor]:
        """Return a short sample without a target, which keeps the place of a bad one."""
        return self.encoder.stand_in()

    def bad_rows(self) -> list[BadSample]:
        """Return the rows that are bad already by what their file says of them."""
        found = [row for row in self.rows.select_columns(["problem", "file", "row"]) if row["problem"]]
        return [
            BadSample(self.files.where(row["file"], row["row"]), row["problem"]).at(*self._place(row)) for row in found
        ]

    def _place(self, row: dict[str, Any]) -> tuple[str, int]:
        return str(self.files.paths[row["file"]]), row["row"]

    def where(self, index: int) -> str:
        """Return file and line (or number) of a row, for messages."""
        row = self.rows[index]
        return self.files.where(row["file"], row["row"])

    def question(self, index: int) -> Question:
        """Return one row without its last answer; see `Question`.

        Raises:
            BadSample: the row cannot be trained on.
        """
        row = self.rows[index]
        where = self.files.where(row["file"], row["row"])
        if row["problem"]:
            raise BadSample(where, row["problem"])
        inputs, answer = self.encoder.encode_question(row, where)
        pictures = [load_image(path, where, options.image_max_pixels, options.image_min_pixels)
                    for options in [self.encoder.options] for path in row["images"]]  # fmt: skip
        return Question(inputs, answer, pictures)

    def train_test_split(self, test_size: float, seed: int) -> dict[str, ConversationDataset]:
        """Split at random, the same way for the same seed.

        Args:
            test_size: share of the rows that go to ``"test"``, in (0, 1).
            seed: of the split.

        Returns:
            ``{"train": ..., "test": ...}``, as ``datasets.Dataset.train_test_split`` does.

        Raises:
            UserError: one of the parts would be empty.
        """
        import datasets

        try:
            places = datasets.Dataset.from_dict({"place": range(len(self))})
            parts = places.train_test_split(test_size=test_size, seed=seed)
        except ValueError as error:
            raise UserError(f"basic_parameters.val_rate: {test_size} of {len(self)} rows: {error}") from None

        def part(places: np.ndarray) -> ConversationDataset:
            rows = self.rows.select(places)
            return ConversationDataset(rows, self.files, self.encoder, self.quarantine, self.cache, (self, places))

        return {name: part(np.array(rows["place"])) for name, rows in parts.items()}
