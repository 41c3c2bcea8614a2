"""Keeping ranks in step when the batch of one rank has no image.

Under FSDP every call of the vision tower gathers its parameters from all ranks. A rank that skips the tower
leaves the others waiting, or kills them. So a rank without an image runs the tower on a blank one and adds zero
times the result to the embeddings: the loss is exact and the tower's gradients are exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mindspeed_mm.errors import UserError
from mindspeed_mm.models.transformers.families import Family


class BlankImage:
    """Runs the vision tower once in every forward pass, on a blank image if there is nothing else.

    It acts inside the forward of the language model, where FSDP has the parameters of the tower's parents
    gathered. It acts under any process group, one rank included, so that a batch without images means the same
    for every world size: zero gradients for the tower, not missing ones. Without a process group the HF model
    is untouched.
    """

    def __init__(self, model: nn.Module, family: Family, transformer_config: Any) -> None:
        """Attach to ``model``, a family that has a ``dummy_image``."""
        assert family.dummy_image is not None
        self._backbone: Any = model.get_submodule(family.backbone)
        self._inputs = family.dummy_image(transformer_config)
        self._needed = False
        self._backbone.language_model.register_forward_pre_hook(self._add_blank, with_kwargs=True)

    @contextmanager
    def for_batch(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Run the forward of one batch.

        Raises:
            UserError: the batch has both images and videos, for which HF runs the tower twice while other ranks
                run it once.
        """
        kinds = [key for key in ("pixel_values", "pixel_values_videos") if batch.get(key) is not None]
        if len(kinds) == 2 and dist.is_initialized() and dist.get_world_size() > 1:
            raise UserError(
                "a micro-batch has both images and videos, which several ranks cannot process in step. "
                "Put images and videos in different micro-batches, for example with --micro-batch-size 1."
            )
        self._needed = not kinds and dist.is_initialized()
        try:
            yield
        finally:
            self._needed = False

    def _add_blank(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._needed:
            return None
        embeds: Tensor = kwargs["inputs_embeds"]
        features = self._backbone.get_image_features(**{k: v.to(embeds.device) for k, v in self._inputs.items()})
        leaves = [t for t in tree_leaves(features) if isinstance(t, Tensor) and t.requires_grad]
        if leaves:  # a frozen tower had to run, but has nothing to say
            zero = torch.stack([t.sum() for t in leaves]).sum() * 0
            kwargs["inputs_embeds"] = embeds + zero.to(embeds.dtype)
        return args, kwargs
