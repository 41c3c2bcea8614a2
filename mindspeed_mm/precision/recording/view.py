"""What a recorder has to know of a model: where its tensors are, what they are called, and how its modules are watched.

Names are those of the Hugging Face model, whatever has been put around it and however it is split over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from mindspeed_mm.distributed.grad_norm import parameter_norms
from mindspeed_mm.precision.recording.hooks import ModuleHooks
from mindspeed_mm.precision.recording.placement import Placed, place
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.rows import BatchRows
from mindspeed_mm.precision.recording.sites import class_name, innermost, parameter_names, sites
from mindspeed_mm.precision.records.entries import Call, Key


@dataclass(frozen=True)
class Held:
    """A tensor that an optimizer updates, or that is frozen, and what it is of the model.

    Attributes:
        value: its ``grad`` is its gradient, its state is the optimizer's under it.
        parts: names and parts of the tensors that a tensor laid out as ``value`` consists of, or a scalar belongs to.
    """

    value: Tensor
    parts: Callable[[Tensor], Iterable[tuple[str, Placed]]]


class Hooks(Protocol):
    """What watches the modules of one step."""

    @property
    def notes(self) -> list[str]:
        """What a reader of the record should know."""

    @property
    def kept(self) -> dict[str, list[Call]]:
        """Calls by site."""

    @property
    def stages(self) -> dict[Key, int]:
        """See :class:`~mindspeed_mm.precision.records.entries.RankStep`."""

    def install(self) -> None:
        """Attach to the model."""

    def remove(self) -> None:
        """Leave nothing behind."""

    def begin_micro_batch(self, batch: BatchRows) -> None:
        """A forward pass is about to begin with these samples."""


class ModelView(Protocol):
    """A model as a recorder sees it.

    Attributes:
        config: of the Hugging Face model.
        speaks: no other rank has the same samples, or this one counts for them.
        speaks_for_loss: no other rank has the same part of the loss, or this one counts for it.
    """

    config: Any
    speaks: bool
    speaks_for_loss: bool

    @property
    def held(self) -> list[Held]:
        """The parameters."""

    def buffers(self) -> dict[str, Tensor]:
        """Return the floating-point buffers by name."""

    def group_names(self, optimizer: Optimizer) -> list[list[str]]:
        """Return the names of the parameters of each group, those that other ranks hold included."""

    def tree(self) -> dict[str, str]:
        """Return the class of each module by path, parents before children."""

    def hooks(self, pool: StepPool, keep: tuple[str, ...]) -> Hooks:
        """Return what watches the modules, not yet attached; of those that match ``keep`` the calls are kept."""

    def gradient_names(self) -> list[str]:
        """Return the names of all parameters that are trained, on all ranks together."""

    def gradient_norms(self) -> Tensor:
        """Return the L2 norm of each one's gradient, (N,), the same on all ranks. A collective."""


class PlainView:
    """A model whose parameters are tensors or DTensors with a name each; see :class:`ModelView`.

    Args:
        model: plain, wrapped or sharded.
        speaks: no other rank has the same samples, or this one counts for them.
    """

    def __init__(self, model: nn.Module, speaks: bool = True) -> None:
        self.root = innermost(model)
        self.config = getattr(self.root, "config", None)
        self.speaks = self.speaks_for_loss = speaks

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        names = parameter_names(self.root)
        return {names[name]: parameter for name, parameter in self.root.named_parameters()}

    @property
    def held(self) -> list[Held]:
        """The parameters."""
        return [Held(parameter, _named(name)) for name, parameter in self._parameters.items()]

    def buffers(self) -> dict[str, Tensor]:
        """Return the floating-point buffers by name."""
        names = parameter_names(self.root)
        return {names[name]: value for name, value in self.root.named_buffers() if value.is_floating_point()}

    def group_names(self, optimizer: Optimizer) -> list[list[str]]:
        """Return the names of the parameters of each group."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]

    def tree(self) -> dict[str, str]:
        """Return the class of each module by path."""
        return {site.name: class_name(site.module) for site in sites(self.root)}

    def hooks(self, pool: StepPool, keep: tuple[str, ...]) -> Hooks:
        """Return what watches the modules."""
        return ModuleHooks(self.root, pool, keep)

    def gradient_names(self) -> list[str]:
        """Return the names of the parameters that are trained."""
        return [name for name, parameter in self._parameters.items() if parameter.requires_grad]

    def gradient_norms(self) -> Tensor:
        """Return the L2 norm of each one's gradient. A collective."""
        return parameter_norms([parameter for parameter in self._parameters.values() if parameter.requires_grad])


def _named(name: str) -> Callable[[Tensor], Iterable[tuple[str, Placed]]]:
    return lambda tensor: [(name, place(tensor))]
