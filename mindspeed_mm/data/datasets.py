"""The data set of type ``huggingface``: conversations with images, encoded when they are fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from mindspeed_mm.data.conversations import ConversationFiles
from mindspeed_mm.data.encoding import ConversationEncoder
from mindspeed_mm.data.images import load_image
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
    """

    def __init__(self, rows: datasets.Dataset, files: ConversationFiles, encoder: ConversationEncoder) -> None:
        self.rows = rows
        self.files = files
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Decode and encode one row; see ``ConversationEncoder.encode``."""
        row = self.rows[index]
        return self.encoder.encode(row["messages"], row["images"], self.files.where(row["file"], row["row"]))

    def where(self, index: int) -> str:
        """Return file and line (or number) of a row, for messages."""
        row = self.rows[index]
        return self.files.where(row["file"], row["row"])

    def question(self, index: int) -> Question:
        """Return one row without its last answer; see `Question`."""
        row = self.rows[index]
        where = self.files.where(row["file"], row["row"])
        inputs, answer = self.encoder.encode_question(row["messages"], row["images"], where)
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
        return {name: ConversationDataset(rows, self.files, self.encoder) for name, rows in parts.items()}
