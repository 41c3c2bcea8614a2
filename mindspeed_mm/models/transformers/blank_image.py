"""Keeping ranks in step when their batches differ in images and videos.

Under FSDP every call of the vision tower gathers its parameters from all ranks. A rank that skips the tower, or calls
it a second time for its videos, leaves the others waiting, or kills them. So a rank with fewer calls than the others
runs the tower on a blank image and adds zero times the result to the embeddings: the loss is exact and the tower's
gradients are exactly zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from mindspeed_mm.distributed.state import host_group
from mindspeed_mm.models.transformers.families import Family


class BlankImage:
    """Runs the vision tower equally often on all ranks, on a blank image where there is nothing else to see.

    It acts inside the forward of the language model, where FSDP has the parameters of the tower's parents
    gathered. It acts under any process group, one rank included, so that a batch without images means the same
    for every world size: zero gradients for the tower, not missing ones. Without a process group the HF model
    is untouched.
    """

    def __init__(self, model: nn.Module, family: Family, transformer_config: Any) -> None:
        """Attach to ``model``, a family that has a ``dummy_image``."""
        assert family.dummy_image is not None
        self._model = model
        self._backbone: Any = model.get_submodule(family.backbone)
        self._family = family
        self._inputs = family.dummy_image(transformer_config)
        self._blanks = 0
        self._backbone.language_model.register_forward_pre_hook(self._add_blanks, with_kwargs=True)

    @contextmanager
    def for_batch(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Run the forward of one batch. All ranks do so together."""
        # HF runs the tower once for all images and once for all videos of a batch.
        calls = sum(batch.get(key) is not None for key in ("pixel_values", "pixel_values_videos"))
        if dist.is_initialized():
            most = self._most_of_all_ranks(calls) if self._hosts else calls
            self._blanks = max(most, 1) - calls
        try:
            yield
        finally:
            self._blanks = 0

    @cached_property
    def _hosts(self) -> dist.ProcessGroup | None:
        """The hosts of all ranks, if each call of the tower gathers and not all batches mean equally many."""
        units = [path for path, module in self._model.named_modules() if isinstance(module, FSDPModule)]
        gathers = any(self._family.component_of(path) in ("vision_encoder", "vision_projector") for path in units)
        sees_videos = "pixel_values_videos" in inspect.signature(self._model.forward).parameters
        if not (gathers and sees_videos) or dist.get_world_size() == 1:
            return None
        # Only the hosts know what is in a batch, and they agree without waiting for their devices.
        return host_group("blank images")

    def _most_of_all_ranks(self, calls: int) -> int:
        most = torch.tensor(calls)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._hosts)
        return int(most)

    def _add_blanks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for _ in range(self._blanks):
            embeds: Tensor = kwargs["inputs_embeds"]
            features = self._backbone.get_image_features(**{k: v.to(embeds.device) for k, v in self._inputs.items()})
            kwargs["inputs_embeds"] = add_nothing(embeds, features)
        return args, kwargs


def add_nothing(embeds: Tensor, features: Any) -> Tensor:
    """Return ``embeds`` plus zero times all tensors in ``features``, for the backward pass to go through them."""
    leaves = [t for t in tree_leaves(features) if isinstance(t, Tensor) and t.requires_grad]
    if not leaves:  # a frozen tower had to run, but has nothing to say
        return embeds
    zero = torch.stack([t.sum() for t in leaves]).sum() * 0
    return embeds + zero.to(embeds.dtype)
