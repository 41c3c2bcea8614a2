"""The pipeline chunks of a rank as a recorder sees them: boxes of the Hugging Face model's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint.main_boxes import main_boxes
from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.main_parameters import MainParameter, MainParameters, is_expert, unwrap
from mindspeed_mm.distributed.piece import Piece
from mindspeed_mm.models.megatron.layout import pieces
from mindspeed_mm.precision.recording.megatron.hooks import PipelineHooks
from mindspeed_mm.precision.recording.megatron.names import gather_names
from mindspeed_mm.precision.recording.megatron.sites import rotary_frequencies
from mindspeed_mm.precision.recording.placement import Placed, box_of
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.sites import class_name, sites
from mindspeed_mm.precision.recording.view import Held, Hooks


class MegatronView:
    """A model that is split by megatron-core; see :class:`~mindspeed_mm.precision.recording.view.ModelView`.

    To build it is a collective.

    Args:
        chunks: of this rank, each in megatron-core's DDP.
        mains: what the optimizer is over.
        group_names: the parameters of each of its groups, by the names that
            :func:`~mindspeed_mm.distributed.main_parameters.named_globally` gives them.

    Raises:
        KeyError: it is not known what a parameter is in the Hugging Face model.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], mains: MainParameters, group_names: Sequence[Sequence[str]]
    ) -> None:
        from megatron.core import parallel_state as ps

        self._chunks = [unwrap(chunk) for chunk in chunks]
        self._layouts = [pieces(chunk) for chunk in self._chunks]
        self._blueprint = getattr(self._chunks[0], "blueprint", None)
        self.config = getattr(self._blueprint, "config", None)
        first = ps.get_tensor_model_parallel_rank() == 0
        self.speaks_for_loss = first
        self.speaks = first and ps.get_context_parallel_rank() == 0 and parallel.is_first_stage()
        self._held = list(_held(self._chunks, self._layouts, mains))
        names = gather_names(self._chunks, self._layouts, self._blueprint and self._blueprint.model)
        self._group_names, self._names = names.of_groups(group_names), names.trained
        self._owners: Tensor | None = None  # of the boxes of gradients

    @property
    def held(self) -> list[Held]:
        """The main parameters, and those that are frozen."""
        return self._held

    def buffers(self) -> dict[str, Tensor]:
        """Return the floating-point buffers of the vision tower, and the frequencies of rotary angles."""
        found: dict[str, Tensor] = {}
        for chunk in self._chunks:
            encoder: Any = getattr(chunk, "image_encoder", None)
            if encoder is not None:
                found |= {
                    encoder.hf_name(n): value for n, value in encoder.named_buffers() if value.is_floating_point()
                }
            found |= rotary_frequencies(chunk)
        return found

    def group_names(self, optimizer: Optimizer) -> list[list[str]]:
        """Return the names of the parameters of each group, on all ranks together."""
        return self._group_names

    def tree(self) -> dict[str, str]:
        """Return the class of each module of the Hugging Face model by path."""
        if self._blueprint is None:
            return {}
        return {site.name: class_name(site.module) for site in sites(self._blueprint.model)}

    def hooks(self, pool: StepPool, keep: tuple[str, ...]) -> Hooks:
        """Return what watches the modules of all chunks."""
        return PipelineHooks(self._chunks, self._layouts, pool)

    def gradient_names(self) -> list[str]:
        """Return the names of all parameters that are trained."""
        return self._names

    def gradient_norms(self) -> Tensor:
        """Return the L2 norm of each one's gradient, of fp32 sums. A collective of all ranks."""
        found = [
            (name, placed.local)
            for held in self._held
            if held.value.grad is not None
            for name, placed in held.parts(held.value.grad)
            if not placed.copy
        ]
        squares = torch.zeros(len(self._names), device=accelerator.device())
        if found:
            if self._owners is None:  # once: the host waits for the device
                place = {name: number for number, name in enumerate(self._names)}
                self._owners = torch.tensor([place[name] for name, _ in found], device=squares.device)
            norms = torch.stack(torch._foreach_norm([box for _, box in found], 2, dtype=torch.float32))
            squares.index_add_(0, self._owners, norms.square())
        dist.all_reduce(squares)
        return squares.sqrt()


def _held(
    chunks: Sequence[nn.Module], layouts: Sequence[dict[str, list[Piece]]], mains: MainParameters
) -> Iterator[Held]:
    layout_of = {
        id(parameter): layout[name]
        for chunk, layout in zip(chunks, layouts, strict=True)
        for name, parameter in chunk.named_parameters()
    }
    taken: set[str] = set()
    for main in mains.all:
        copy = not mains.sharded and not _is_first_replica(main.parameter)
        layout = layout_of[id(main.parameter)]
        names = {piece.hf_name: piece.replica for piece, _ in main_boxes(main, layout, main.value.detach())}
        # Each expert has a number of steps of its own, and all of them are one tensor.
        scalars = {name: replica for name, replica in names.items() if name not in taken}
        taken |= scalars.keys()
        yield Held(main.value, partial(_parts_of_main, main, layout, scalars, copy))
    for chunk in chunks:
        for parameter in chunk.parameters():
            if not parameter.requires_grad:
                copy = not _is_first_replica(parameter)
                yield Held(parameter, partial(_parts_of_frozen, layout_of[id(parameter)], copy))


def _is_first_replica(parameter: nn.Parameter) -> bool:
    """Return whether this is the first of the ranks that hold the same part and see different samples."""
    from megatron.core import parallel_state as ps

    if is_expert(parameter):
        return bool(ps.get_expert_data_parallel_rank() == 0)
    return dist.get_rank(parallel.replica_group()) == 0


def _parts_of_main(
    main: MainParameter, layout: Sequence[Piece], scalars: Mapping[str, bool], copy: bool, tensor: Tensor
) -> Iterable[tuple[str, Placed]]:
    if tensor.shape != main.value.shape:  # the number of steps
        return [(name, Placed(tensor, (), None, copy or replica, True)) for name, replica in scalars.items()]
    return [
        (piece.hf_name, _box(piece, box.offsets, box.tensor, copy)) for piece, box in main_boxes(main, layout, tensor)
    ]


def _parts_of_frozen(layout: Sequence[Piece], copy: bool, tensor: Tensor) -> Iterable[tuple[str, Placed]]:
    return [(piece.hf_name, _box(piece, piece.offsets, piece.view(tensor), copy)) for piece in layout]


def _box(piece: Piece, offsets: Sequence[int], local: Tensor, copy: bool) -> Placed:
    return Placed(local, piece.global_shape, box_of(offsets, local.shape), copy or piece.replica, True)
