"""Rotary angles from position ids: of text, and of text with images (mRoPE), in both layouts that models use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.errors import UserError


class RotaryAngles(nn.Module):
    """The angles that megatron-core's attention rotates queries and keys by.

    Frequencies and sections are those of Transformers, whatever kind of RoPE the model has. Megatron-core's own
    modules give other angles: they know no interleaved sections, no scaling but Llama's, and under context
    parallelism 0.12 cuts the batch in place of the sequence.

    Args:
        hf_rotary: the decoder's own module, with storage.

    Raises:
        UserError: the angles depend on the length of the sequence, or are not all there is to it.
    """

    def __init__(self, hf_rotary: Any) -> None:
        super().__init__()
        kind = hf_rotary.rope_type
        if hf_rotary.attention_scaling != 1.0 or kind in ("dynamic", "longrope"):
            raise UserError(
                f"text_decoder: rope_scaling of type '{kind}' cannot be trained by pretrain_vlm.py (its angles depend "
                f"on the length, or it scales the scores); use pretrain_transformers.py, or another type."
            )
        # Not a buffer: casting the model to bf16 would round it.
        self.inv_freq: Tensor = hf_rotary.inv_freq.detach().clone().float()
        self._section: list[int] | None = getattr(hf_rotary, "mrope_section", None)
        self._interleaved = hf_rotary.config.model_type.startswith("qwen3")

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return the angles.

        Args:
            position_ids: (B, S), or (3, B, S) over time, height and width.

        Returns:
            (S, B, 1, D) fp32, where D is the rotated part of a head; its second half repeats the first.
        """
        if self.inv_freq.device != position_ids.device:
            self.inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids[..., None] * self.inv_freq
        if angles.dim() == 4:
            angles = self._sections(angles)
        return torch.cat([angles, angles], dim=-1)[:, :, None].transpose(0, 1).contiguous()

    def _sections(self, angles: Tensor) -> Tensor:
        """Take each frequency's angle from time, height or width: (3, B, S, D / 2) to (B, S, D / 2)."""
        if self._section is None:
            return angles[0]
        if not self._interleaved:
            return torch.cat([part[i % 3] for i, part in enumerate(angles.split(self._section, dim=-1))], dim=-1)
        chosen = angles[0].clone()
        for axis in (1, 2):
            every_third = slice(axis, self._section[axis] * 3, 3)
            chosen[..., every_third] = angles[axis][..., every_third]
        return chosen
