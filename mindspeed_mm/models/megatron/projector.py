"""The projector's two linear layers as megatron-core's, split over tensor-parallel ranks.

All projectors we know are a linear layer, an activation and a linear layer, with a norm before them or without. The
first is split by its outputs, the second by its inputs, under the names that Hugging Face gives them.

This imports megatron-core; import it inside functions only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn


class Column(ColumnParallelLinear):
    """Of whole inputs, returns this rank's part of the outputs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (..., outputs / ranks) of (..., inputs), the same on all ranks."""
        output: Tensor = super().forward(hidden_states)[0]
        return output


class Row(RowParallelLinear):
    """Of this rank's part of the inputs, returns whole outputs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (..., outputs), the same on all ranks, of (..., inputs / ranks)."""
        output: Tensor = super().forward(hidden_states)[0]
        return output


def split_projector(projector: nn.Module, config: Any) -> None:
    """Replace the pairs of linear layers in a projector, in place; their values are megatron-core's first ones.

    A pair whose inner width the ranks do not divide stays whole on every rank, and so does what is no pair.

    Args:
        projector: of Hugging Face, or a list of them.
        config: ``TransformerConfig`` of the text decoder.
    """
    config = copy.copy(config)
    config.sequence_parallel = False  # features of images are whole on every rank
    for one in projector if isinstance(projector, nn.ModuleList) else [projector]:
        linear = list(_linear_layers(one))
        if len(linear) != 2:
            continue
        (*_, first), (*_, second) = linear
        inner = first.out_features
        if inner != second.in_features or inner % config.tensor_model_parallel_size:
            continue
        kinds: tuple[tuple[Any, dict[str, Any]], ...] = (
            (Column, {"gather_output": False}),
            (Row, {"input_is_parallel": True}),
        )
        for (parent, name, module), (kind, options) in zip(linear, kinds, strict=True):
            parallel = kind(
                module.in_features,
                module.out_features,
                config=config,
                init_method=config.init_method,
                bias=module.bias is not None,
                skip_bias_add=False,
                **options,
            )
            setattr(parent, name, parallel)


def _linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child
