"""Start from a Hugging Face folder: its weights streamed into a model that may already be sharded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mindspeed_mm.checkpoint.coordination import run_together
from mindspeed_mm.checkpoint.hf_folder import FileTensor, open_weights
from mindspeed_mm.checkpoint.hf_layout import ImportPlan, ImportStep, plan_import, skeleton
from mindspeed_mm.checkpoint.tensors import listing, local_block, local_part, named_tensors
from mindspeed_mm.errors import UserError


def load_hf_weights(hf_model: PreTrainedModel, folder: str | Path, strict: bool = True) -> list[str]:
    """Fill the parameters and persistent buffers of a model from a folder's safetensors files.

    Every rank reads for itself, one weight at a time, and only its own block of it: some rows at a time where the
    weight is stored as the module has it, its own experts where Transformers fuses or transposes them. What is
    converted in other ways is read whole. The weights keep the model's dtype. Every rank calls this.

    Args:
        hf_model: plain or sharded, with storage (not on meta).
        folder: a folder with ``model.safetensors``, or the files of ``model.safetensors.index.json``.
        strict: whether weights that are missing, unexpected or of another shape are an error.

    Returns:
        Lines about what did not match, empty when ``strict``.

    Raises:
        UserError: there are no weights, a file is damaged, or the weights do not fit (nothing was changed then);
            raised on all ranks.
    """
    folder = Path(folder)
    return run_together(f"reading the weights in {folder}", lambda: _load(hf_model, folder, strict))


def _load(hf_model: PreTrainedModel, folder: Path, strict: bool) -> list[str]:
    _tie(hf_model)
    targets = named_tensors(hf_model, "base")
    by_name = {name: tensor for names, tensor in targets.items() for name in names}
    bare = skeleton(type(hf_model), hf_model.config)
    with open_weights(folder) as stored:
        plan = plan_import(bare, stored, by_name)
        problems = check_import(plan, {names: tensor.shape for names, tensor in targets.items()})
        if problems and strict:
            hint = "Use the folder's own config.json, or pass --load-strict false to take what fits."
            raise UserError("\n".join([f"{folder}: the weights do not fit the model.", *problems, hint]))
        filled: set[int] = set()
        for step in plan.steps:
            _run(step, bare, stored, by_name, filled, folder)
    return problems


def check_import(plan: ImportPlan, shapes: dict[tuple[str, ...], torch.Size]) -> list[str]:
    """Compare what a plan gives with the model's weights; return what does not match.

    Args:
        plan: from `plan_import`.
        shapes: the model's weights, all names of each with its shape.
    """
    given = {name: tensor.shape for step in plan.steps for name, tensor in step.outputs.items()}
    known = given.keys() | plan.broken.keys()
    expected = {name: shape for names, shape in shapes.items() for name in names}
    problems = {
        "missing": [names[0] for names in shapes if known.isdisjoint(names)],
        "not in the model": [*plan.unexpected, *(name for name in given if name not in expected)],
        "of another shape": [
            f"{name}: stored {tuple(shape)}, model {tuple(expected[name])}"
            for name, shape in given.items()
            if name in expected and shape != expected[name]
        ],
        "in parts that do not fit together": [f"{name}: {reason}" for name, reason in plan.broken.items()],
    }
    return [f"{len(names)} weights {what}:\n{listing(names)}" for what, names in problems.items() if names]


@torch.no_grad()
def _run(
    step: ImportStep,
    bare: PreTrainedModel,
    stored: dict[str, FileTensor],
    targets: dict[str, torch.Tensor],
    filled: set[int],
    folder: Path,
) -> None:
    """Copy what one step gives into this rank's part of the model."""
    values: dict[str, torch.Tensor] = {}
    if step.converter is not None and not step.by_rows:
        values = step.run(bare, stored)
    for name, meta in step.outputs.items():
        target = targets.get(name)
        if target is None or target.shape != meta.shape:
            continue
        part, block = local_part(target), local_block(target)
        if not part.numel():
            continue
        pieces: Iterable[tuple[Any, torch.Tensor]]
        if step.converter is None:
            pieces = stored[step.sources[0][1]].pieces(block)
        elif step.by_rows:
            pieces = [(..., step.run(bare, stored, block[0])[name][(slice(None), *block[1:])])]
        else:
            pieces = [(..., values[name][block])]
        for rows, value in pieces:
            if id(target) not in filled:
                part[rows].copy_(value)
            # Tied in the config and yet stored under both names: harmless only while the two are equal.
            elif not torch.equal(part[rows], value.to(part)):
                raise UserError(
                    f"{folder}: {name} is tied to another weight by the config, but stored with other values; "
                    'set "tie_word_embeddings": false in its config.json'
                )
        filled.add(id(target))


def _tie(model: PreTrainedModel) -> None:
    """Tie again what giving storage to a model on meta has taken apart."""
    tied = model.all_tied_weights_keys.items()
    tensor = model.get_parameter_or_buffer
    if any(tensor(target) is not tensor(source) for target, source in tied):
        model.tie_weights()
