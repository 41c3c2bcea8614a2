"""Packed sequences in an unmodified Hugging Face model: no sample sees another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.common.strict_forward import takes

_KINDS = {"full_attention", "sliding_attention"}


class PackedAttention:
    """Gives the text decoder of a model the attention of packed sequences.

    HF can find packed samples by their position ids, but only if there is no mask and no cache, not among mRoPE's
    positions, and otherwise lets them see each other without a word. It also waits for the device to find out. So
    the decoder is told, by what each attention implementation takes: flash attention gets the boundaries, all
    others a mask. Position ids are the collator's.
    """

    def __init__(self, model: Any) -> None:
        """Attach to ``model``, before it is sharded."""
        self._name = type(model).__name__
        self._takes_positions = takes(model, "position_ids")
        self._pack: tuple[Tensor, int] | None = None
        self.decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
        if self.decoder is not None:
            self.decoder.register_forward_pre_hook(self._keep_apart, with_kwargs=True)

    @contextmanager
    def for_batch(self, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Iterator[None]:
        """Run the forward of one packed row, or of an ordinary batch if ``cu_seqlens`` is None.

        Args:
            cu_seqlens: (N + 1,) int32, where the samples begin and the last one ends; padding may follow.
            max_seqlen: at least the length of the longest sample and of the padding.

        Raises:
            UserError: the model's layers mix tokens in a way that cannot be confined to a sample.
        """
        if cu_seqlens is not None:
            self._check()
            self._pack = (cu_seqlens, max_seqlen or 0)
        try:
            yield
        finally:
            self._pack = None

    def _check(self) -> None:
        if self.decoder is None:
            raise UserError(f"packing: {self._name} has no text decoder to be found; set packing to false in data.json")
        if not self._takes_positions:
            raise UserError(
                f"packing: {self._name}.forward takes no position_ids, which start anew with each sample of a packed "
                "sequence; name them in its signature, or set packing to false in data.json"
            )
        if strange := self._kinds() - _KINDS:
            raise UserError(
                f"packing: {self._name} has layers of type {', '.join(sorted(strange))}, in which the samples of a "
                f"packed sequence would mix; set packing to false in data.json"
            )
        if self._implementation == "flex_attention":
            raise UserError("packing: flex_attention is not supported; set attn_implementation to sdpa in model.json")

    @property
    def _implementation(self) -> str:
        return str(self.decoder.config._attn_implementation)

    def _kinds(self) -> set[str]:
        config = self.decoder.config
        usual = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        return set(getattr(config, "layer_types", None) or [usual])

    def _keep_apart(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._pack is None:
            return None
        cu_seqlens, max_seqlen = self._pack
        inputs = kwargs.get("inputs_embeds")
        inputs = kwargs["input_ids"] if inputs is None else inputs
        length = inputs.shape[1]
        if "flash" in self._implementation:
            # The padding is one more sample. Without padding it is empty, which the kernels allow.
            ends = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), length)])
            sizes = {f"cu_seq_lens_{side}": ends for side in "qk"} | {f"max_length_{side}": max_seqlen for side in "qk"}
            return args, {**kwargs, **sizes, "attention_mask": None}
        masks = {kind: self._mask(kind, cu_seqlens, length, inputs) for kind in self._kinds()}
        return args, {**kwargs, "attention_mask": masks if len(masks) > 1 else next(iter(masks.values()))}

    def _mask(self, kind: str, cu_seqlens: Tensor, length: int, inputs: Tensor) -> Tensor:
        """Return (1, 1, S, S): True, or 0 for eager attention, where row may look at column."""
        positions = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        sample = torch.bucketize(positions, cu_seqlens[1:], right=True)
        query, key = positions[:, None], positions[None, :]
        visible = (sample[:, None] == sample[None, :]) & (key <= query)
        if kind == "sliding_attention":
            visible &= key > query - self.decoder.config.sliding_window
        if self._implementation != "eager":
            return visible[None, None]
        dtype = inputs.dtype if inputs.is_floating_point() else torch.float32
        added = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return added.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]
