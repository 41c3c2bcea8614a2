"""What a micro-batch brings along, in the form that all stages compute with; what has none is refused."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm import accelerator
from mindspeed_mm.distributed.sequence_split import SequenceSplit
from mindspeed_mm.errors import UserError


class PaddingCheck:
    """Refuses masks that causal attention does not amount to."""

    def __init__(self) -> None:
        self._is_known = False

    def __call__(self, attention_mask: Tensor | None) -> None:
        """Look at a mask; for padding in that of the first micro-batch only, since the host waits for the device.

        Raises:
            UserError: it is not (B, S), or padding comes before tokens.
        """
        if attention_mask is None:
            return
        if attention_mask.dim() != 2:
            raise UserError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}: pretrain_vlm.py computes causal "
                "attention, and takes (batch, sequence) with 0 for padding. For samples of one row that must not see "
                "each other pass cu_seqlens."
            )
        if self._is_known:
            return
        self._is_known = True
        if bool(pads_on_the_left(attention_mask).any()):
            raise UserError(
                "attention_mask: padding comes before tokens; pretrain_vlm.py can have it at the end of a row only. "
                "Pad on the right (padding_side of the tokenizer)."
            )


def pads_on_the_left(attention_mask: Tensor) -> Tensor:
    """Return (B, S - 1) bool, True where a token follows padding."""
    return attention_mask[:, 1:] > attention_mask[:, :-1]


def real_images(pixel_values: Tensor | None, image_flags: Tensor | None) -> Tensor | None:
    """Return the images that do not only fill up, None if there are none.

    Args:
        pixel_values: (images, ...).
        image_flags: (images,) or (images, 1), 1 for those that are real; None: all are.
    """
    if pixel_values is None or image_flags is None:
        return pixel_values
    real = pixel_values[image_flags.flatten() == 1]
    return real if len(real) else None


def coordinates(position_ids: Tensor) -> Tensor:
    """Return position ids without the row of text positions that Transformers' packing puts before the three others."""
    return position_ids[1:] if position_ids.dim() == 3 and len(position_ids) == 4 else position_ids


def gather_alike(split: SequenceSplit, rows: int) -> None:
    """Make micro-batches equally long on all ranks that share experts, as gathering all tokens wants them.

    The host waits for the device here; ``moe_token_dispatcher_type`` alltoall needs none of this.

    Args:
        split: of this rank's micro-batch; padding is added at its end.
        rows: of the micro-batch.

    Raises:
        UserError: they have different numbers of rows.
    """
    from megatron.core import parallel_state

    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    if group.size() == 1:
        return
    most = torch.tensor([sum(split.lengths), rows, -rows], device=accelerator.device())
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    longest, most_rows, fewest = most.tolist()
    if most_rows != -fewest:
        raise UserError(
            f"--moe-token-dispatcher-type allgather: ranks that share experts have micro-batches of {-fewest} and of "
            f"{most_rows} samples, which it cannot gather; use alltoall."
        )
    split.extend(longest)
