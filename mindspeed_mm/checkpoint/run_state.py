"""What the store asks of a run: its tensors by name, wherever and however they lie, and its optimizer's groups."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from mindspeed_mm.checkpoint import optimizer_state
from mindspeed_mm.checkpoint.tensors import named_tensors

Selection = Literal["all", "base", "adapters"]


@runtime_checkable
class RunState(Protocol):
    """The weights and the optimizer of a run, on this rank."""

    def weights(self, part: Selection = "all") -> dict[tuple[str, ...], torch.Tensor]:
        """Return the live weights of this rank by all their names, as ``tensors.named_tensors`` does."""

    def weight_names(self, part: Selection = "all") -> Collection[str]:
        """Return the names of weights, those that only other ranks hold included."""

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's state tensors of this rank, under ``optimizer.state.<weight>.<state>``."""

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return each group's hyperparameters and names as plain values, the same on all ranks."""

    def check_groups(self, saved: list[dict[str, Any]]) -> None:
        """Check that the optimizer has the saved groups; raises UserError."""

    def allocate_optimizer(self, metadata: Metadata) -> dict[str, torch.Tensor]:
        """Replace the optimizer's state by empty tensors for what a checkpoint holds, and return these by key."""

    def restore_groups(self, saved: list[dict[str, Any]]) -> None:
        """Set the saved hyperparameters, after the state has been read."""

    def loaded(self) -> None:
        """Learn that weights were written."""


class ModuleState:
    """A module, plain or sharded by FSDP2, and an optimizer over its parameters; without one only weights count."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        self.model = model
        self._optimizer = optimizer

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, where there is one."""
        assert self._optimizer is not None
        return self._optimizer

    def weights(self, part: Selection = "all") -> dict[tuple[str, ...], torch.Tensor]:
        """Return the live weights."""
        return named_tensors(self.model, part)

    def weight_names(self, part: Selection = "all") -> Collection[str]:
        """Return the names of weights: every rank has a part of each."""
        return {name for names in self.weights(part) for name in names}

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Return the optimizer's state tensors."""
        return optimizer_state.optimizer_tensors(self.model, self.optimizer)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups as plain values."""
        return optimizer_state.optimizer_groups(self.model, self.optimizer)

    def check_groups(self, saved: list[dict[str, Any]]) -> None:
        """Check that the optimizer has the saved groups."""
        optimizer_state.check_groups(self.optimizer_groups(), saved)

    def allocate_optimizer(self, metadata: Metadata) -> dict[str, torch.Tensor]:
        """Replace the optimizer's state by empty tensors."""
        return optimizer_state.allocate_state(self.model, self.optimizer, metadata)

    def restore_groups(self, saved: list[dict[str, Any]]) -> None:
        """Set the saved hyperparameters."""
        optimizer_state.restore_groups(self.model, self.optimizer, saved)

    def loaded(self) -> None:
        """Do nothing: the weights are the module's own."""


def run_state(model: nn.Module | RunState, optimizer: Optimizer | None) -> RunState:
    """Return the state of a run given as such, or as a module and an optimizer."""
    return ModuleState(model, optimizer) if isinstance(model, nn.Module) else model
