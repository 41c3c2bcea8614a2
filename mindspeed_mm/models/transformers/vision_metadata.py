"""Handing the vision tower what the workers have computed, so that it need not ask the device."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# These towers only split by the boundaries, and read them on the host to do so. Others compute with them.
_SPLIT_ON_HOST = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


class VisionMetadata:
    """Passes vision metadata to the calls of the vision tower, past FSDP, which would round it to ``param_dtype``.

    A tower that gets none computes its own, as it does when it is recomputed in the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach to ``model``, before it is sharded."""
        takes_grid = (m for m in model.modules() if "grid_thw" in inspect.signature(m.forward).parameters)
        self._tower: Any = next(takes_grid, None)
        self._calls: list[dict[str, Any]] = []
        if self._tower is not None:
            self._tower.register_forward_pre_hook(self._hand_over, with_kwargs=True)

    @contextmanager
    def for_batch(self, metadata: Mapping[str, dict[str, Any]] | None, device: torch.device) -> Iterator[None]:
        """Run the forward of one batch.

        Args:
            metadata: for ``image`` and ``video`` the keyword arguments of the tower's forward, on the host.
            device: of the model.
        """
        if metadata and self._tower is not None:
            # HF runs the tower on all images, then on all videos.
            self._calls = [self._place(metadata[kind], device) for kind in ("image", "video") if kind in metadata]
        try:
            yield
        finally:
            self._calls = []

    def _place(self, values: dict[str, Any], device: torch.device) -> dict[str, Any]:
        config = self._tower.config
        flash = "flash" in str(config._attn_implementation)
        on_host = not flash and config.model_type.removesuffix("_vision") in _SPLIT_ON_HOST
        placed = {}
        for key, value in values.items():
            if not isinstance(value, Tensor):
                if flash:
                    placed[key] = value
            elif on_host and key in ("cu_seqlens", "cu_window_seqlens"):
                placed[key] = value
            else:
                placed[key] = value.to(device, non_blocking=True)
        return placed

    def _hand_over(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        patches = args[0] if args else kwargs["hidden_states"]
        if not self._calls or len(self._calls[0]["position_ids"]) != len(patches):
            return None
        return args, {**kwargs, **self._calls.pop(0)}
