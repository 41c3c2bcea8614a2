"""Features of the vision tower that enter the decoder behind its first layers (Qwen3-VL).

They travel as the ``context`` that megatron-core passes from layer to layer for models with cross attention. So each
micro-batch has its own, also when many are on their way, and recomputed layers give back their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mindspeed_mm.errors import UserError


def add_features(layers: Sequence[nn.Module]) -> None:
    """Make layer ``i`` add ``context[i]`` to the hidden states it returns, where there is a context.

    Args:
        layers: the first of the decoder, as many as there are features.
    """
    for index, layer in enumerate(layers):
        layer.register_forward_hook(_adding(index), with_kwargs=True)


def _adding(index: int) -> Any:
    def add(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        hidden, context = output
        return (hidden if context is None else hidden + context[index]), context

    return add


def spread(features: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return features of images at their places in the sequence, zero elsewhere.

    Args:
        features: for each layer (T, H), of all images of the micro-batch in order.
        mask: (B, S) bool, the T positions of images.

    Returns:
        (N, S, B, H).
    """
    where = mask[..., None]
    return torch.stack(
        [part.new_zeros(*mask.shape, part.shape[-1]).masked_scatter(where, part).transpose(0, 1) for part in features]
    )


def check_first_chunk(count: int, first: range) -> None:
    """Refuse a pipeline whose first chunk does not hold all layers that take features.

    Args:
        count: of those layers.
        first: layers of the first chunk.

    Raises:
        UserError: it does not.
    """
    if len(first) < count:
        raise UserError(
            f"the first {count} layers of the text decoder take features of the vision tower (image_encoder."
            f"vision_encoder.deepstack_visual_indexes), but the first pipeline chunk holds {len(first)}. Use fewer "
            f"pipeline stages or virtual chunks (--pipeline-model-parallel-size, "
            f"--virtual-pipeline-model-parallel-size), or text_decoder.pipeline_num_layers of model.json."
        )
