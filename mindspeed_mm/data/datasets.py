"""The data set of type ``huggingface``: conversations with images, encoded when they are fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from mindspeed_mm.data.encoding import ConversationEncoder
from mindspeed_mm.data.images import load_image
from mindspeed_mm.data.quarantine import BadSample, Quarantine
from mindspeed_mm.data.rows import RowFiles
from mindspeed_mm.errors import UserError

if TYPE_CHECKING:
    import datasets


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
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        files: RowFiles,
        encoder: ConversationEncoder,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.rows = rows
        self.files = files
        self.encoder = encoder
        self.quarantine = quarantine

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Decode and encode one row; see ``ConversationEncoder.encode``.

        Raises:
            BadSample: the row cannot be trained on.
        """
        row = self.rows[index]
        where = self.files.where(row["file"], row["row"])
        try:
            if row["problem"]:
                raise BadSample(where, row["problem"])
            return self.encoder.encode(row, where)
        except BadSample as error:
            raise error.at(*self._place(row)) from error.__cause__

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
        """Return one row without its last answer; see `Question`."""
        row = self.rows[index]
        where = self.files.where(row["file"], row["row"])
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
        try:
            parts = self.rows.train_test_split(test_size=test_size, seed=seed)
        except ValueError as error:
            raise UserError(f"basic_parameters.val_rate: {test_size} of {len(self)} rows: {error}") from None
        return {
            name: ConversationDataset(rows, self.files, self.encoder, self.quarantine) for name, rows in parts.items()
        }
