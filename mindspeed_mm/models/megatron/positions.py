"""Position ids as the Hugging Face model would compute them, on pipeline stages that have no vision tower as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.models.megatron.blueprint import Blueprint


class Positions:
    """Calls the model's own ``get_rope_index`` on an instance without modules.

    Args:
        blueprint: the model.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self._config = blueprint.config
        self._model: Any = None
        backbone: Any = type(blueprint.backbone)
        if hasattr(backbone, "get_rope_index"):
            self._model = backbone.__new__(backbone)
            nn.Module.__init__(self._model)
            self._model.config = self._config

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, media: dict[str, Any]) -> Tensor:
        """Return the positions of a batch that brings none.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S), 0 for padding, or None.
            media: grids, ``mm_token_type_ids`` and the like.

        Returns:
            (3, B, S) where images or videos have more than one coordinate, else (B, S).
        """
        grids = {key: media.get(key) for key in ("image_grid_thw", "video_grid_thw")}
        if self._model is None or all(grid is None for grid in grids.values()):
            return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        more = {key: media[key] for key in ("second_per_grid_ts",) if media.get(key) is not None}
        types = media.get("mm_token_type_ids")
        positions: Tensor = self._model.get_rope_index(
            input_ids,
            mm_token_type_ids=self.token_types(input_ids) if types is None else types,
            attention_mask=attention_mask,
            **grids,
            **more,
        )[0]
        return positions

    def token_types(self, input_ids: Tensor) -> Tensor:
        """Return which tokens are images (1) and videos (2)."""
        return (input_ids == self._config.image_token_id).int() + 2 * (input_ids == self._config.video_token_id).int()
