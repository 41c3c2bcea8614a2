"""Finding what a model cannot take of a batch while that is still in host memory: token ids, and where padding is.

On an accelerator a token id too large would be a device assertion, which names nothing and takes the whole process with
it, and to look at the padding the host would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from mindspeed_mm.distributed.main_parameters import unwrap
from mindspeed_mm.errors import UserError
from mindspeed_mm.losses import IGNORE
from mindspeed_mm.models.megatron.inputs import pads_on_the_left
from mindspeed_mm.training.checkpointing import hf_model

# Ids that some families put beyond their vocabulary, and replace before they are looked up.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


class TokenCheck:
    """Checks ``input_ids`` and ``labels`` of a batch against a Hugging Face language model's vocabulary.

    For a ``VLMModel`` it checks ``attention_mask`` as well, where padding may be at the end only.

    Args:
        model: of any kind; what is not known of it is not checked.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap(model[0] if isinstance(model, nn.ModuleList) else model)
        self._pads_at_the_end = hasattr(inner, "blueprint")
        model = hf_model(model)
        config = getattr(model, "config", None)
        self._inputs = _rows(model, "get_input_embeddings", "num_embeddings")
        self._outputs = _rows(model, "get_output_embeddings", "out_features")
        self._placeholders = {value for name in _PLACEHOLDERS if isinstance(value := getattr(config, name, None), int)}

    def __call__(self, batch: Any, names: Callable[[], list[str] | None]) -> None:
        """Check one batch; tensors that are not in host memory are left alone.

        Raises:
            UserError: an id is outside of the vocabulary; names the sample by ``names``, else by its row.
        """
        if not isinstance(batch, Mapping):
            return
        ids, labels = batch.get("input_ids"), batch.get("labels")
        if not isinstance(ids, Tensor) or not _is_host_table(ids):
            return
        ends = batch.get("cu_seqlens")
        mask = batch.get("attention_mask")
        if self._pads_at_the_end and isinstance(mask, Tensor) and _is_host_table(mask):
            self._check_padding(mask, names)
        if self._inputs:
            self._refuse("input_ids", ids, self._inputs, self._placeholders, names, ends)
        if self._outputs and isinstance(labels, Tensor) and _is_host_table(labels) and labels.shape == ids.shape:
            self._refuse("labels", labels, self._outputs, {IGNORE}, names, ends)

    @staticmethod
    def _check_padding(mask: Tensor, names: Callable[[], list[str] | None]) -> None:
        wrong = pads_on_the_left(mask).any(1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise UserError(
                f"{_sample(names, row, row)}: attention_mask has padding before tokens; pretrain_vlm.py can have it at "
                "the end of a row only. Pad on the right (padding_side of the tokenizer)."
            )

    def _refuse(
        self,
        key: str,
        values: Tensor,
        size: int,
        allowed: set[int],
        names: Callable[[], list[str] | None],
        ends: Tensor | None,
    ) -> None:
        outside = (values < 0) | (values >= size)
        for value in allowed:
            outside &= values != value
        if not outside.any():
            return
        row, position = outside.nonzero()[0].tolist()
        value, number = int(values[row, position]), row
        if ends is not None:  # the samples of a packed row
            number = int((ends[1:] <= position).sum())
            position -= int(ends[number])
        raise UserError(
            f"{_sample(names, number, row)}: {key} has {value} at position {position}, the model's vocabulary has "
            f"{size} tokens. Use the tokenizer of this model, or a model whose vocabulary covers it"
            + (f"; {IGNORE} marks what is no target." if key == "labels" else ".")
        )


def _sample(names: Callable[[], list[str] | None], number: int, row: int) -> str:
    """Return the name of a sample of the batch, or where it lies if names are not known."""
    samples = names()
    return samples[number] if samples and number < len(samples) else f"row {row} of the batch"


def _is_host_table(value: Tensor) -> bool:
    return value.ndim == 2 and value.is_cpu and not value.is_floating_point()


def _rows(model: nn.Module, getter: str, attribute: str) -> int | None:
    """Return the rows of an embedding or output head, None where the model has none to ask."""
    try:
        value = getattr(getattr(model, getter)(), attribute)
    except (AttributeError, NotImplementedError):
        return None
    return value if isinstance(value, int) else None
