"""Put samples together into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from mindspeed_mm.data.encoding import IGNORE_INDEX
from mindspeed_mm.data.model_inputs import ModelInputs
from mindspeed_mm.errors import UserError

# Every family of today pads the same way; the names keep published data.json files valid.
COLLATORS = (
    *("qwen2vl", "qwen2_5_vl", "qwen3vl", "qwen3_vl", "qwen3omni", "glm4v", "glm4v_moe", "internvl", "deepseekvl2"),
    *("llm", "llm_pretrain"),
)
# Published names of what is trained on other data than conversations.
OTHER_DATA = {
    "qwen2vl_dpo": "preferences",
    "videoalign": "preferences",
    "open_sora_plan": "generation data",
    "bagel": "generation data",
    "whisper": "transcripts of an encoder-decoder model",
}


class PaddingCollator:
    """Pads what is per token to the longest sample on the right, and joins what belongs to images.

    A batch without an image simply has no image keys: models keep the ranks of a group in step by themselves.

    Args:
        pad_token_id: for ``input_ids``.
        pad_to_multiple_of: the length of a batch is a multiple of this.
        ignore_pad_token_for_loss: padding has the label ``IGNORE_INDEX``; otherwise the model learns to pad.
        model_inputs: adds ``position_ids`` (3, B, L') and ``vision_metadata`` to batches with images or videos of
            known sizes; None leaves both to the model.
    """

    def __init__(
        self,
        pad_token_id: int,
        pad_to_multiple_of: int = 8,
        ignore_pad_token_for_loss: bool = True,
        model_inputs: ModelInputs | None = None,
    ) -> None:
        self.pad_to_multiple_of = pad_to_multiple_of
        self._model_inputs = model_inputs
        label = IGNORE_INDEX if ignore_pad_token_for_loss else pad_token_id
        self._fill = {"input_ids": pad_token_id, "labels": label}

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Return a batch: keys of shape (L,) become (B, L'), the others are joined along their first dimension."""
        lengths = [len(sample["input_ids"]) for sample in samples]
        width = -(-max(lengths) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, Any] = {}
        for key, values in _by_key(samples).items():
            if _is_per_token(key, samples):
                rows = values[0].new_full((len(samples), width), self._fill.get(key, 0))
                for row, sample, length in zip(rows, samples, lengths, strict=True):
                    if key in sample:
                        row[:length] = sample[key]
                batch[key] = rows
            else:
                batch[key] = torch.cat(values)
        if self._model_inputs and (metadata := self._model_inputs.vision_metadata(batch)):
            rows = torch.zeros(3, len(samples), width, dtype=torch.long)
            for row, sample in enumerate(samples):
                rows[:, row, : lengths[row]] = self._model_inputs.positions(sample)
            batch.update(position_ids=rows, vision_metadata=metadata)
        return batch


class PackCollator:
    """Lays samples one after the other into one sequence, as if each of them were alone.

    Position ids start anew with every sample, no token is trained to predict the first one of the next sample, and
    ``cu_seqlens`` tells the attention and the loss where the samples are.

    Args:
        capacity: tokens of the sequence; what the samples leave is padded.
        pad_token_id: for ``input_ids``.
        model_inputs: of the model that is trained.
    """

    def __init__(self, capacity: int, pad_token_id: int, model_inputs: ModelInputs) -> None:
        self.capacity = capacity
        self._fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
        self._model_inputs = model_inputs

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Return one packed row of C = ``capacity`` tokens.

        Returns:
            Keys of shape (L,) become (1, C), the others are joined along their first dimension. Besides
            ``position_ids``, (1, C), for mRoPE (3, 1, C); ``cu_seqlens``, (N + 1,) int32, where the N samples begin
            and the last ends; ``max_seqlen``, the length of the longest piece, padding included; and
            ``vision_metadata`` of :class:`~mindspeed_mm.data.model_inputs.ModelInputs`.

        Raises:
            UserError: the samples are longer than the sequence.
        """
        ends = list(accumulate((len(sample["input_ids"]) for sample in samples), initial=0))
        padding = self.capacity - ends[-1]
        if padding < 0:
            raise UserError(
                f"packing: {len(samples)} samples of {ends[-1]} tokens do not fit into one sequence of "
                f"--seq-length {self.capacity}"
            )
        spans = list(pairwise(ends))
        batch: dict[str, Any] = {}
        for key, values in _by_key(samples).items():
            if _is_per_token(key, samples):
                row = values[0].new_full((1, self.capacity), self._fill.get(key, 0))
                for (start, end), sample in zip(spans, samples, strict=True):
                    if key in sample:
                        row[0, start:end] = sample[key]
                batch[key] = row
            else:
                batch[key] = torch.cat(values)
        batch["labels"][0, ends[:-1]] = IGNORE_INDEX  # else the last token of a sample would predict the next one
        positions = [self._model_inputs.positions(sample) for sample in samples]
        positions.append(torch.arange(padding).expand(len(positions[0]), -1))
        rows = torch.cat(positions, dim=1)
        batch["position_ids"] = rows if len(rows) == 1 else rows[:, None]
        batch["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
        batch["max_seqlen"] = max(padding, *(end - start for start, end in spans))
        if metadata := self._model_inputs.vision_metadata(batch):
            batch["vision_metadata"] = metadata
        return batch


def _is_per_token(key: str, samples: Sequence[dict[str, torch.Tensor]]) -> bool:
    """Return whether the value belongs to the tokens; what belongs to images or videos is never as long."""
    return all(sample[key].shape == sample["input_ids"].shape for sample in samples if key in sample)


def _by_key(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Return the values of each key, of the samples that have it, in the order of the samples."""
    keys = dict.fromkeys(key for sample in samples for key in sample)
    return {key: [sample[key] for sample in samples if key in sample] for key in keys}
