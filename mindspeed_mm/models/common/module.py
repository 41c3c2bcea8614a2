"""The base class of multimodal models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class MultiModalModule(nn.Module):
    """An ``nn.Module`` with the few members that the training loop and pipeline schedules expect of a model.

    Args:
        config: the model's configuration, or ``None`` for one that needs none. Kept as ``self.config``.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config
        self.input_tensor: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """Take the activations of the previous pipeline stage; unused without pipeline parallelism."""
        self.input_tensor = input_tensor

    def build_layer(self) -> nn.Module:
        """Build one layer; for subclasses that build theirs one by one."""
        raise NotImplementedError(f"{type(self).__name__} has no build_layer()")

    def _get_num_layers(self, num_layers: int) -> int:
        """Return how many of ``num_layers`` this pipeline stage holds."""
        stages = getattr(self.config, "pipeline_model_parallel_size", None) or 1
        if num_layers % stages:
            raise ValueError(f"{num_layers} layers cannot be split evenly over {stages} pipeline stages")
        return num_layers // stages

    def _get_layer(self, layer_number: int) -> nn.Module:
        """Return layer ``layer_number`` of this pipeline stage, counted from 0."""
        return self.get_submodule(f"layers.{layer_number}")
