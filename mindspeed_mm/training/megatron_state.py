"""The weights and the optimizer of the Megatron road as a checkpoint holds them: boxes of Hugging Face tensors.

A checkpoint knows no layout. Any tensor-, pipeline- or expert-parallel layout, with or without a distributed optimizer,
reads what any other wrote, and so do the tools that know the checkpoints of the FSDP2 road: names are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from mindspeed_mm.checkpoint.boxes import Box, BoxedTensor
from mindspeed_mm.checkpoint.coordination import gather
from mindspeed_mm.checkpoint.main_boxes import main_boxes
from mindspeed_mm.checkpoint.optimizer_state import IMPLEMENTATION, PREFIX, check_groups
from mindspeed_mm.checkpoint.run_state import Selection
from mindspeed_mm.distributed.main_parameters import MainParameter, named_globally, unwrap
from mindspeed_mm.distributed.piece import Piece
from mindspeed_mm.engine.megatron import MegatronEngine

_PREFIX = "model."  # TransformersModel, of the other road, holds the Hugging Face model in its attribute of that name


class MegatronState:
    """The :class:`~mindspeed_mm.checkpoint.run_state.RunState` of an engine.

    Args:
        engine: whose state it is.
        pieces: ``pieces(chunk)`` gives the boxes of each local parameter by its name in the unwrapped chunk.
    """

    def __init__(self, engine: MegatronEngine, pieces: Callable[[Any], dict[str, list[Piece]]]) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self._pieces: dict[int, list[Piece]] = {}
        self._others: list[tuple[Any, list[Piece]]] = []  # what is not trained
        trained = {id(main.parameter) for main in engine.mains.all}
        hf_names: dict[str, list[str]] = {}
        for chunk in engine.module:
            inner = unwrap(chunk)
            layout = pieces(inner)
            for (name, parameter), (global_name, _) in zip(
                inner.named_parameters(), named_globally(chunk), strict=True
            ):
                hf_names[global_name] = [_PREFIX + piece.hf_name for piece in layout[name]]
                self._pieces[id(parameter)] = layout[name]
                if id(parameter) not in trained and not parameter.requires_grad:
                    self._others.append((parameter, layout[name]))
        everybody = gather(hf_names)
        self._hf_names = {
            name: sorted({hf for part in everybody for hf in part.get(name, ())}) for part in everybody for name in part
        }
        self._steps: dict[str, Tensor] = {}

    def weights(self, part: Selection = "all") -> dict[tuple[str, ...], Tensor]:
        """Return what this rank holds of the weights; of trained ones the values in fp32 that the optimizer updates."""
        boxes: dict[str, list[Box]] = {}
        shapes: dict[str, tuple[int, ...]] = {}

        def take(found: Iterator[tuple[Piece, Box]]) -> None:
            for piece, box in found:
                if not _belongs(piece.hf_name, part):
                    continue
                mine = boxes.setdefault(_PREFIX + piece.hf_name, [])
                if all(box.offsets != other.offsets for other in mine):  # tied weights on one stage
                    mine.append(box)
                shapes[_PREFIX + piece.hf_name] = piece.global_shape

        for main in self.engine.mains.all:
            take(self._boxes(main, main.value.detach()))
        for parameter, layout in self._others:
            take((piece, Box(piece.offsets, piece.view(parameter.detach()))) for piece in layout)
        return {(name,): BoxedTensor(shapes[name], mine) for name, mine in boxes.items()}

    def weight_names(self, part: Selection = "all") -> Collection[str]:
        """Return the names of weights of the model."""
        return {hf for names in self._hf_names.values() for hf in names if _belongs(hf, part)}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return this rank's parts of the optimizer's state."""
        found: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        boxes: dict[str, list[Box]] = {}
        for main in self.engine.mains.all:
            for key, value in sorted(self.optimizer.state.get(main.value, {}).items()):
                if not isinstance(value, Tensor):
                    continue
                if value.shape != main.value.shape:  # the number of steps
                    found |= {self._key(piece, key): value for piece, _ in self._boxes(main, main.value.detach())}
                    continue
                for piece, box in self._boxes(main, value):
                    boxes.setdefault(self._key(piece, key), []).append(box)
                    shapes[self._key(piece, key)] = piece.global_shape
        return found | {name: BoxedTensor(shapes[name], mine) for name, mine in boxes.items()}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return each group's hyperparameters and Hugging Face names."""
        return [
            {
                "hyperparameters": {
                    key: value.item() if isinstance(value, Tensor) else value
                    for key, value in group.items()
                    if key not in IMPLEMENTATION
                },
                "params": sorted({hf for name in names for hf in self._hf_names[name]}),
                "scalars": {},
            }
            for group, names in zip(self.optimizer.param_groups, self.engine.group_names, strict=True)
        ]

    def check_groups(self, saved: list[dict[str, Any]]) -> None:
        """Check that the optimizer has the saved groups."""
        check_groups(self.optimizer_groups(), saved)

    def allocate_optimizer(self, metadata: Metadata) -> dict[str, Tensor]:
        """Replace the optimizer's state by empty tensors for what a checkpoint holds."""
        entries = {
            key.removeprefix(PREFIX): entry
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        kinds = {key.rpartition(".")[2] for key in entries}
        self.optimizer.state.clear()
        self._steps = {}
        for main in self.engine.mains.all:
            for kind in sorted(kinds):
                names = [_PREFIX + piece.hf_name for piece, _ in self._boxes(main, main.value.detach())]
                # Rows of a vocabulary that are padding have no name, and no state worth keeping.
                entry = entries.get(f"{names[0]}.{kind}") if names else None
                if entry is None:
                    continue
                if len(entry.size):
                    state = torch.zeros_like(main.value, dtype=entry.properties.dtype, requires_grad=False)
                    self.optimizer.state[main.value][kind] = state
                    continue
                for name in names:
                    self._steps.setdefault(f"{PREFIX}{name}.{kind}", torch.zeros((), dtype=entry.properties.dtype))
        return self.optimizer_tensors() | self._steps

    def restore_groups(self, saved: list[dict[str, Any]]) -> None:
        """Set the saved hyperparameters, and give every value a number of steps of its own."""
        for group, record in zip(self.optimizer.param_groups, saved, strict=True):
            group.update(record["hyperparameters"])
            beside = bool(group.get("fused") or group.get("capturable"))
            for value in group["params"]:
                main = next(main for main in self.engine.mains.all if main.value is value)
                first = next(self._boxes(main, value.detach()), None)
                name = first and _PREFIX + first[0].hf_name
                for key, step in self._steps.items():
                    owner, _, kind = key.removeprefix(PREFIX).rpartition(".")
                    if owner == name:
                        self.optimizer.state[value][kind] = step.clone().to(value.device if beside else "cpu")
        self._steps = {}

    def loaded(self) -> None:
        """Write the values that were read into the model."""
        self.engine.mains.publish()

    def _boxes(self, main: MainParameter, tensor: Tensor) -> Iterator[tuple[Piece, Box]]:
        """Yield the boxes of a tensor of a main parameter's shape, as parts of the Hugging Face tensors."""
        return main_boxes(main, self._pieces[id(main.parameter)], tensor)

    @staticmethod
    def _key(piece: Piece, state: str) -> str:
        return f"{PREFIX}{_PREFIX}{piece.hf_name}.{state}"


def _belongs(name: str, part: Selection) -> bool:
    return part == "all" or (part == "adapters") == (".lora_" in name)
