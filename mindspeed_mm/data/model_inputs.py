"""What a Hugging Face model works out from a batch before its first layer, worked out where the batch is made."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Families whose towers take what `vision_metadata` returns.
_TOWERS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe")


class ModelInputs:
    """Position ids and vision metadata, computed by HF's own code on the host.

    A model would compute them from tensors on the device, and wait for it a dozen times in every forward pass.

    Args:
        folder: with the model's ``config.json``.
        trust_remote_code: as for the model.
    """

    def __init__(self, folder: str | Path, trust_remote_code: bool = False) -> None:
        self._folder = str(folder)
        self._trust_remote_code = trust_remote_code

    def __getstate__(self) -> dict[str, Any]:
        # What is cached is found again in the worker.
        return {"_folder": self._folder, "_trust_remote_code": self._trust_remote_code}

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            self._folder, local_files_only=True, trust_remote_code=self._trust_remote_code
        )

    @cached_property
    def _position_model(self) -> Any:
        """The model without any module in it, for its ``get_rope_index``; None if it has none."""
        from transformers import MODEL_MAPPING

        model_class = MODEL_MAPPING.get(type(self._config), None)
        if not hasattr(model_class, "get_rope_index"):
            return None
        model = model_class.__new__(model_class)
        nn.Module.__init__(model)
        model.config = self._config
        return model

    def positions(self, sample: dict[str, Tensor]) -> Tensor:
        """Return the position ids of one sample: (3, L) time, height, width for a model with mRoPE, else (1, L)."""
        ids = sample["input_ids"]
        if self._position_model is None:
            return torch.arange(len(ids))[None]
        types = sample.get("mm_token_type_ids")
        if types is None:
            types = (ids == self._config.image_token_id).int() + 2 * (ids == self._config.video_token_id).int()
        given = {key: sample.get(key) for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
        given = {key: value for key, value in given.items() if value is not None}
        return self._position_model.get_rope_index(ids[None], mm_token_type_ids=types[None], **given)[0][:, 0]

    def vision_metadata(self, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what the vision tower derives from the sizes of images and videos.

        Args:
            batch: with ``image_grid_thw``, ``video_grid_thw`` (n, 3), both or neither.

        Returns:
            For ``image`` and ``video``, each if the batch has some and the tower takes it: the keyword arguments of
            its forward, tensors but for ``max_seqlen`` and ``max_window_seqlen``.
        """
        if self._config.model_type not in _TOWERS or not _towers_take_metadata():
            return {}
        grids = {kind: batch.get(f"{kind}_grid_thw") for kind in ("image", "video")}
        return {kind: _of_grid(self._config.vision_config, grid) for kind, grid in grids.items() if grid is not None}


def _towers_take_metadata() -> bool:
    """Return whether transformers is new enough."""
    try:
        from transformers import vision_utils
    except ImportError:
        return False
    return hasattr(vision_utils, "get_vision_interpolation_indices_and_weights")


def _of_grid(config: Any, grid: Tensor) -> dict[str, Any]:
    from transformers import vision_utils

    merge = config.spatial_merge_size
    ends = vision_utils.get_vision_cu_seqlens(grid)
    found = {
        "cu_seqlens": ends,
        "max_seqlen": int(ends.diff().max()),
        "position_ids": vision_utils.get_vision_position_ids(grid, merge),
    }
    if window := getattr(config, "window_size", None):
        index, ends = vision_utils.get_vision_window_index(grid, merge, window, config.patch_size)
        found.update(window_index=index, cu_window_seqlens=ends, max_window_seqlen=int(ends.diff().max()))
    if table := getattr(config, "num_position_embeddings", None):
        found["interp_indices"], found["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, int(table**0.5), align_corners=True, spatial_merge_size=merge
        )
    return found
