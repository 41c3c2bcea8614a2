"""Watching the modules of pipeline chunks under the names of the Hugging Face modules that they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.piece import Piece
from mindspeed_mm.precision.recording.hooks import seen_inputs, seen_outputs
from mindspeed_mm.precision.recording.megatron.sites import ChunkSite, Share, chunk_sites
from mindspeed_mm.precision.recording.placement import Placed, box_of
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.rows import BatchRows
from mindspeed_mm.precision.recording.sites import Site, sites
from mindspeed_mm.precision.recording.watching import MicroBatch, Seen, Watch, in_backward
from mindspeed_mm.precision.records.entries import Call, Key


class PipelineHooks:
    """Watches all chunks of a rank; see :class:`~mindspeed_mm.precision.recording.view.Hooks`.

    Args:
        chunks: in their order, not wrapped; modules are watched of those that are a ``VLMModel``.
        layouts: pieces of each one's parameters.
        pool: takes the sketches.
    """

    def __init__(
        self, chunks: Sequence[nn.Module], layouts: Sequence[Mapping[str, Sequence[Piece]]], pool: StepPool
    ) -> None:
        self.kept: dict[str, list[Call]] = {}
        self._batches: list[BatchRows] = []
        self._chunks = [
            ChunkHooks(chunk, layout, pool, parallel.place_in_pipeline(number), self._batches)
            for number, (chunk, layout) in enumerate(zip(chunks, layouts, strict=True))
            if hasattr(chunk, "blueprint")
        ]
        others = {type(chunk).__name__ for chunk in chunks if not hasattr(chunk, "blueprint")}
        self._notes = [f"{name}: its modules are not recorded, only its parameters" for name in others]

    @property
    def notes(self) -> list[str]:
        """What a reader of the record should know."""
        return list(dict.fromkeys([*self._notes, *(note for chunk in self._chunks for note in chunk.notes)]))

    @property
    def stages(self) -> dict[Key, int]:
        """The places of the chunks in the pipeline."""
        return {key: stage for chunk in self._chunks for key, stage in chunk.stages.items()}

    def install(self) -> None:
        """Attach to all chunks."""
        for chunk in self._chunks:
            chunk.install()

    def remove(self) -> None:
        """Leave nothing behind."""
        for chunk in self._chunks:
            chunk.remove()

    def begin_micro_batch(self, batch: BatchRows) -> None:
        """Take these samples for the next forward pass of each chunk that has not seen them."""
        self._batches.append(batch)


@dataclass
class _ChunkBatch(MicroBatch):
    """A micro-batch in a chunk; ``own`` are the rows of this rank by the number of positions."""

    own: dict[int, BatchRows] = field(default_factory=dict)


class ChunkHooks(Watch):
    """Watches one chunk.

    Every chunk sees all micro-batches in their order, forward and backward, while several are on their way.

    Args:
        chunk: a ``VLMModel``, not wrapped.
        layout: pieces of its parameters.
        pool: takes the sketches.
        stage: place of the chunk in the pipeline.
        batches: of the step so far, shared with who adds to them.
    """

    def __init__(
        self,
        chunk: Any,
        layout: Mapping[str, Sequence[Piece]],
        pool: StepPool,
        stage: int,
        batches: Sequence[BatchRows],
    ) -> None:
        super().__init__(pool, stage)
        self._chunk = chunk
        self._layout = layout
        self._batches = batches
        self._ranks = _Ranks()
        self._running: _ChunkBatch | None = None
        self._returning: _ChunkBatch | None = None

    def install(self) -> None:
        """Attach to the chunk, its modules and its parameters."""
        self._handles += [
            self._chunk.register_forward_pre_hook(self._forward_begins),
            self._chunk.register_forward_hook(self._forward_ends),
        ]
        super().install()
        for name, parameter in self._chunk.named_parameters():
            if parameter.requires_grad:
                copy = self._ranks.tensor > 0 and not self._adds_up(name, parameter)
                see = partial(self._see_local_gradient, self._layout[name], copy)
                self._handles.append(parameter.register_hook(see))

    def _forward_begins(self, *_: Any) -> None:
        number = self._running.number + 1 if self._running else 0
        self._running = _ChunkBatch(number, self._batches[number])

    def _forward_ends(self, chunk: Any, args: Any, output: Any) -> None:
        assert self._running is not None
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._backward_begins, self._running))

    def _backward_begins(self, batch: _ChunkBatch, *_: Any) -> None:
        self._returning = batch

    def _micro_batch(self, again: bool) -> MicroBatch | None:
        return self._returning if again else self._running

    def _sites(self) -> Iterable[Any]:
        yield from chunk_sites(self._chunk, self._layout)
        encoder = self._chunk.image_encoder
        if encoder is None:
            return
        if encoder.shares_images:
            self._note("enable_encoder_dp: what happens inside of the vision tower is not recorded")
            return
        shared = {path.rpartition(".")[0] for path, module in encoder.named_modules() if _splits_outputs(module)}
        for site in sites(encoder):
            # What is between the linear layers that ranks share is known by their outputs and inputs.
            between = site.path.rpartition(".")[0] in shared and not list(site.module.parameters())
            if site.path and not between:
                yield replace(site, name=encoder.hf_name(site.path), vision=True)

    def _is_first(self, site: Any) -> bool:
        return not hasattr(site.module, "adapter")  # it adds to the output

    def _inputs(
        self, site: Site | ChunkSite, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterable[Seen]:
        if isinstance(site, Site):
            for seen in seen_inputs(site, batch.rows, args, kwargs):
                yield self._of_all_samples(seen, _splits_inputs(site.module))
            return
        value = next((item for item in args if isinstance(item, Tensor)), kwargs.get("hidden_states"))
        for share in site.inputs:
            yield from self._share(site, share, value, batch)

    def _outputs(self, site: Site | ChunkSite, batch: Any, output: Any) -> Iterable[Seen]:
        if isinstance(site, Site):
            for seen in seen_outputs(site, batch.rows, output):
                yield self._of_all_samples(seen, _splits_outputs(site.module))
            return
        values = list(site.read(output))
        for number, share in enumerate(site.outputs):
            yield from self._share(site, share, values[min(number, len(values) - 1)], batch)

    def _after(self, site: Any, module: nn.Module, args: Any, output: Any) -> None:
        super()._after(site, module, args, output)
        if isinstance(site, ChunkSite) and site.is_head and not in_backward():
            head = site.outputs[0].site
            self._pool.alias(Key("loss", head, "logits"), Key("forward", head, "output.0"))

    def _of_all_samples(self, seen: Seen, split: bool = False) -> Seen:
        """Place what every rank computes for all positions: ranks differ in its gradient, by what they do with it.

        Args:
            seen: as if it were the whole tensor.
            split: tensor-parallel ranks have even parts of its last dimension.
        """
        ranks, shape = self._ranks, list(seen.value.shape)
        part = None
        if split:
            part = (*((0, size) for size in shape[:-1]), (ranks.tensor * shape[-1], shape[-1]))
            shape[-1] *= ranks.tensors
        whole, copy = tuple(shape), ranks.tensor > 0 and not split
        return replace(
            seen,
            part=lambda value: Placed(value, whole, part, copy or ranks.context > 0, True),
            part_of_gradient=lambda gradient: Placed(
                gradient, whole, part, copy, True, ranks.contexts > 1, ranks.context == 0
            ),
        )

    def _share(self, site: ChunkSite, share: Share, value: Any, batch: _ChunkBatch) -> Iterator[Seen]:
        """Yield what this rank has of a tensor of another module, unless it has nothing that could be compared."""
        if not isinstance(value, Tensor):
            return
        if site.whole:
            if (rows := batch.rows.of(value.shape, vision=False)) is not None:
                yield self._of_all_samples(Seen(share.site, share.what, value, batch.rows, rows))
            return
        part = partial(self._part, share, batch)
        placed = part(value)
        length = placed.local.shape[0]
        own = self._own_rows(batch).get(length)
        rows = own.of_positions(placed.local.shape) if own else None
        if site.is_head and share.what.startswith("output") and length != max(self._own_rows(batch)):
            rows = None  # a part of the logits, which are computed in chunks
        if own is None or rows is None:
            if site.is_head:
                self._note(f"{share.site}: the logits were never in memory as a whole; the loss is computed in chunks")
            return
        yield Seen(share.site, share.what, value, own, rows, part, part if share.has_gradient else None)

    def _part(self, share: Share, batch: _ChunkBatch, value: Tensor) -> Placed:
        """Return what this rank's own positions of a tensor, (S, B, ...) or (S * B, ...), are of the whole."""
        ranks = self._ranks
        if value.dim() == 2 and batch.rows.samples is not None and batch.rows.samples.shape is not None:
            value = value.unflatten(0, (-1, batch.rows.samples.shape[0]))
        local = value if share.columns is None else value[..., share.columns]
        shape = list(local.shape)
        box = [(0, size) for size in shape]
        if local.dim() == 4:  # heads
            shape[2] *= ranks.tensors
            box[2] = (ranks.tensor * local.shape[2], local.shape[2])
        if share.width is not None:
            shape[-1] = share.width
            box[-1] = (share.offset, local.shape[-1])
        split = shape != list(local.shape)
        # Ranks that split neither the sequence nor the features have the same.
        alike = not split and max(self._own_rows(batch), default=0) == local.shape[0]
        return Placed(local, tuple(shape), tuple(box) if split else None, alike and ranks.tensor > 0, True)

    def _own_rows(self, batch: _ChunkBatch) -> dict[int, BatchRows]:
        """Return the rows that this rank computes, and under sequence parallelism its part of them, by their number."""
        if not batch.own:
            positions = self._chunk.split.source("cpu").numpy()
            batch.own[len(positions)] = batch.rows.at(positions)
            if self._chunk.config.sequence_parallel and self._ranks.tensors > 1:
                mine = positions.reshape(self._ranks.tensors, -1)[self._ranks.tensor]
                batch.own[len(mine)] = batch.rows.at(mine)
        return batch.own

    def _adds_up(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether each tensor-parallel rank has a part of this parameter's gradient, or a summand of it."""
        if getattr(parameter, "tensor_model_parallel", False):
            return True
        inside = name.startswith("text_decoder.decoder.")
        heads = "q_layernorm" in name or "k_layernorm" in name
        return inside and (heads or bool(self._chunk.config.sequence_parallel))

    def _see_local_gradient(self, layout: Sequence[Piece], copy: bool, gradient: Tensor) -> None:
        for piece in layout:
            box = Placed(piece.view(gradient), piece.global_shape, box_of(piece.offsets, piece.sizes), copy, True)
            self._pool.add_whole(Key("grad_local", piece.hf_name, "gradient"), box, summed=True)


def _splits_outputs(module: nn.Module) -> bool:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    return isinstance(module, ColumnParallelLinear)


def _splits_inputs(module: nn.Module) -> bool:
    from megatron.core.tensor_parallel import RowParallelLinear

    return isinstance(module, RowParallelLinear)


class _Ranks:
    """This rank's place among those that share layers and sequences."""

    def __init__(self) -> None:
        from megatron.core import parallel_state as ps

        self.tensor, self.tensors = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
        self.context, self.contexts = ps.get_context_parallel_rank(), ps.get_context_parallel_world_size()
