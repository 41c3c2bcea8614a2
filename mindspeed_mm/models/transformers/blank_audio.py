"""Keeping ranks in step when only some of their batches have audio, as `blank_image` does for images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from mindspeed_mm.models.transformers.blank_image import add_nothing
from mindspeed_mm.models.transformers.families import Family


class BlankAudio:
    """Runs the audio tower on silence where a batch has nothing to hear.

    A batch with audio runs the tower once, so every batch then does, without asking the other ranks.
    """

    def __init__(self, model: nn.Module, family: Family, transformer_config: Any) -> None:
        """Attach to ``model``, a family that has a ``dummy_audio``."""
        assert family.dummy_audio is not None
        parts = (m for m in model.modules() if hasattr(m, "audio_tower") and hasattr(m, "language_model"))
        self._backbone: Any = next(parts)
        self._inputs = family.dummy_audio(transformer_config)
        self._blank = False
        self._backbone.language_model.register_forward_pre_hook(self._add_blank, with_kwargs=True)

    @contextmanager
    def for_batch(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Run the forward of one batch. All ranks do so together."""
        self._blank = dist.is_initialized() and batch.get("input_features") is None
        try:
            yield
        finally:
            self._blank = False

    def _add_blank(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._blank:
            embeds = kwargs["inputs_embeds"]
            heard = self._backbone.audio_tower(**{k: v.to(embeds.device) for k, v in self._inputs.items()})
            kwargs["inputs_embeds"] = add_nothing(embeds, self._backbone.multi_modal_projector(heard.last_hidden_state))
        return args, kwargs
