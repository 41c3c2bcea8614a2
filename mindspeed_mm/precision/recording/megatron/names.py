"""What the parameters of all ranks are called in the Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mindspeed_mm.checkpoint.coordination import gather
from mindspeed_mm.distributed.main_parameters import named_globally
from mindspeed_mm.distributed.piece import Piece


@dataclass(frozen=True)
class AllNames:
    """The parameters of the whole model.

    Attributes:
        of: Hugging Face names of each parameter, by its name in a model that is not split into stages.
        trained: Hugging Face names of what is trained, in the model's order.
        frozen: of all others.
    """

    of: dict[str, list[str]]
    trained: list[str]
    frozen: list[str]

    def of_groups(self, groups: Sequence[Sequence[str]]) -> list[list[str]]:
        """Return the Hugging Face names in each group of parameters."""
        return [list(dict.fromkeys(hf for name in names for hf in self.of[name])) for names in groups]


def gather_names(chunks: Sequence[nn.Module], layouts: Sequence[Mapping[str, Sequence[Piece]]], model: Any) -> AllNames:
    """Ask all ranks. A collective.

    Args:
        chunks: of this rank, not wrapped.
        layouts: pieces of each one's parameters.
        model: of Hugging Face, or None.
    """
    mine = {
        global_name: ([piece.hf_name for piece in layout[name]], parameter.requires_grad)
        for chunk, layout in zip(chunks, layouts, strict=True)
        for (name, parameter), (global_name, _) in zip(chunk.named_parameters(), named_globally(chunk), strict=True)
    }
    known: dict[str, list[str]] = {}
    trained: dict[str, bool] = {}
    for part in gather(mine):
        for name, (hf_names, requires_grad) in part.items():
            known[name] = list(dict.fromkeys([*known.get(name, ()), *hf_names]))
            trained |= dict.fromkeys(hf_names, requires_grad)
    order = {} if model is None else {name: number for number, (name, _) in enumerate(model.named_parameters())}
    in_order = sorted(trained, key=lambda name: (order.get(name, len(order)), name))
    return AllNames(
        known, [name for name in in_order if trained[name]], [name for name in in_order if not trained[name]]
    )
