"""Put samples together into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mindspeed_mm.data.encoding import IGNORE_INDEX

# Every family of today pads the same way; the names keep published data.json files valid.
COLLATORS = ("qwen2vl", "qwen2_5_vl", "qwen3vl", "qwen3_vl", "glm4v", "glm4v_moe", "internvl", "llm", "llm_pretrain")


class PaddingCollator:
    """Pads what is per token to the longest sample on the right, and joins what belongs to images.

    A batch without an image simply has no image keys: models keep the ranks of a group in step by themselves.

    Args:
        pad_token_id: for ``input_ids``.
        pad_to_multiple_of: the length of a batch is a multiple of this.
        ignore_pad_token_for_loss: padding has the label ``IGNORE_INDEX``; otherwise the model learns to pad.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 8, ignore_pad_token_for_loss: bool = True) -> None:
        self.pad_to_multiple_of = pad_to_multiple_of
        label = IGNORE_INDEX if ignore_pad_token_for_loss else pad_token_id
        self._fill = {"input_ids": pad_token_id, "labels": label}

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Return a batch: keys of shape (L,) become (B, L'), the others are joined along their first dimension."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        width = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {}
        for key in dict.fromkeys(key for sample in samples for key in sample):
            values = [sample[key] for sample in samples if key in sample]
            if values[0].ndim == 1:
                rows = values[0].new_full((len(samples), width), self._fill.get(key, 0))
                for row, value in zip(rows, values, strict=True):
                    row[: len(value)] = value
                batch[key] = rows
            else:
                batch[key] = torch.cat(values)
        return batch
