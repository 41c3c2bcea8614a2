"""A Hugging Face folder into and out of a model whose tensors are spread over ranks in boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from mindspeed_mm.checkpoint.coordination import gather, group_position, run_together
from mindspeed_mm.checkpoint.hf_export import MAX_SHARD_BYTES, write_hf_folder
from mindspeed_mm.checkpoint.hf_folder import FileTensor, open_weights
from mindspeed_mm.checkpoint.hf_import import check_import
from mindspeed_mm.checkpoint.hf_layout import ImportPlan, plan_import
from mindspeed_mm.checkpoint.tensors import named_tensors
from mindspeed_mm.distributed.piece import Piece
from mindspeed_mm.distributed.state import host_group
from mindspeed_mm.errors import UserError

Boxes = Sequence[tuple[Piece, Tensor]]
"""What this rank holds: boxes of Hugging Face tensors and views of its own parameters, of the boxes' shapes."""


def load_hf_boxes(bare: PreTrainedModel, folder: str | Path, boxes: Boxes, strict: bool = True) -> list[str]:
    """Fill what this rank holds from a folder's safetensors files.

    Only these boxes are read where a weight is stored as the Hugging Face module has it, the whole where
    Transformers converts the layout (fused experts). Every rank calls this.

    Args:
        bare: the Hugging Face model on meta.
        folder: a folder with ``model.safetensors``, or the files of ``model.safetensors.index.json``.
        boxes: to fill; they keep their dtype.
        strict: whether weights that are missing, unexpected or of another shape are an error.

    Returns:
        Lines about what did not match, empty when ``strict``.

    Raises:
        UserError: as ``load_hf_weights``; raised on all ranks, before anything was changed.
    """
    folder = Path(folder)
    return run_together(f"reading the weights in {folder}", lambda: _load(bare, folder, boxes, strict))


def _load(bare: PreTrainedModel, folder: Path, boxes: Boxes, strict: bool) -> list[str]:
    shapes = {names: tensor.shape for names, tensor in named_tensors(bare, "base").items()}
    first_name = {name: names[0] for names in shapes for name in names}
    wanted: dict[str, list[tuple[Piece, Tensor]]] = {}
    for piece, view in boxes:
        wanted.setdefault(first_name[piece.hf_name], []).append((piece, view))
    with open_weights(folder) as stored:
        plan = plan_import(bare, stored, first_name)
        problems = check_import(plan, shapes)
        if problems and strict:
            hint = "Use the folder's own config.json, or pass --load-strict false to take what fits."
            raise UserError("\n".join([f"{folder}: the weights do not fit the model.", *problems, hint]))
        _fill(plan, bare, stored, first_name, wanted)
    return problems


@torch.no_grad()
def _fill(
    plan: ImportPlan,
    bare: PreTrainedModel,
    stored: dict[str, FileTensor],
    first_name: dict[str, str],
    wanted: dict[str, list[tuple[Piece, Tensor]]],
) -> None:
    for step in plan.steps:
        targets = {name: wanted.get(first_name.get(name, name), []) for name in step.outputs}
        if not any(targets.values()):
            continue
        values = {} if step.converter is None else step.run(bare, stored)
        for name, parts in targets.items():
            for piece, view in parts:
                if tuple(step.outputs[name].shape) != piece.global_shape:
                    continue
                value = values[name][piece.block] if values else stored[step.sources[0][1]].read(piece.block)
                view.copy_(value)


def export_hf_boxes(
    bare: PreTrainedModel,
    folder: str | Path,
    boxes: Boxes,
    assets_from: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the model as a Hugging Face folder that ``from_pretrained`` loads bit for bit; every rank calls this.

    Weights are sent to rank 0 one at a time.

    Args:
        bare: the Hugging Face model on meta; gives names, layouts and config.json.
        folder: see ``export_hf``.
        boxes: of this rank; those held by several ranks are taken from one.
        assets_from: see ``export_hf``.
        dtype: to write in; None keeps the parameters'.
        max_shard_bytes: see ``export_hf``.

    Raises:
        UserError: as ``export_hf``.
    """
    senders = Senders(boxes)

    def gather(names: list[str]) -> dict[str, Tensor]:
        found = {name: senders.gather(name) for name in names}
        return {name: tensor.to(dtype) if dtype else tensor for name, tensor in found.items() if tensor is not None}

    return write_hf_folder(bare, senders.names, gather, Path(folder).resolve(), assets_from, max_shard_bytes)


@dataclass(frozen=True)
class _Claim:
    """A box, and the rank that sends it."""

    rank: int
    piece: Piece
    dtype: torch.dtype


class Senders:
    """Who sends what to rank 0, agreed on by all ranks when this is made."""

    def __init__(self, boxes: Boxes) -> None:
        self._mine = {(piece.hf_name, piece.offsets): view for piece, view in boxes}
        self._group = host_group("export") if dist.is_initialized() else None
        self._rank = group_position()[0]
        mine = [_Claim(self._rank, piece, view.dtype) for piece, view in boxes if not piece.replica]
        claims: list[list[_Claim]] = gather(mine, self._group)
        self._claims: dict[str, dict[tuple[int, ...], _Claim]] = {}
        for claim in (claim for claims_of_rank in claims for claim in claims_of_rank):
            self._claims.setdefault(claim.piece.hf_name, {}).setdefault(claim.piece.offsets, claim)

    @property
    def names(self) -> list[str]:
        """Of all tensors, in the same order on all ranks."""
        return sorted(self._claims)

    def gather(self, name: str) -> Tensor | None:
        """Return a whole tensor on the host of rank 0, None elsewhere."""
        claims = list(self._claims[name].values())
        if self._rank > 0:
            if parts := [self._mine[name, c.piece.offsets] for c in claims if c.rank == self._rank]:
                dist.send(torch.cat([part.detach().cpu().flatten() for part in parts]), 0, group=self._group)
            return None
        whole = torch.empty(claims[0].piece.global_shape, dtype=claims[0].dtype)
        for rank in sorted({claim.rank for claim in claims}):
            pieces = [claim.piece for claim in claims if claim.rank == rank]
            if rank == 0:
                for piece in pieces:
                    whole[piece.block] = self._mine[name, piece.offsets].detach().cpu()
                continue
            sizes = [torch.Size(piece.sizes).numel() for piece in pieces]
            received = torch.empty(sum(sizes), dtype=whole.dtype)
            dist.recv(received, rank, group=self._group)
            for piece, part in zip(pieces, received.split(sizes), strict=True):
                whole[piece.block] = part.view(piece.sizes)
        return whole
