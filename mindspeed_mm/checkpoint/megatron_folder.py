"""Weights that Megatron saved as one torch file per rank, put together: ``mp_rank_00/model_optim_rng.pt`` and so on.

Tensor-parallel parts are joined as Megatron cuts them: rows of column-parallel layers and embeddings, columns of
row-parallel ones; the halves of a gated MLP are cut one by one. Layers of a pipeline stage are numbered from 0 in it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mindspeed_mm.errors import UserError

_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?$")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_COLUMN = re.compile(r"(word_embeddings|output_layer|lm_head|linear_qkv|query_key_value|linear_fc1|dense_h_to_4h)\.")
_ROW = re.compile(r"(linear_proj|self_attention\.dense|linear_fc2|dense_4h_to_h)\.weight$")
_GATED = re.compile(r"(linear_fc1|dense_h_to_4h)\.(weight|bias)$")
_LAYER = re.compile(r"(\blayers\.)(\d+)(\.)")


def is_megatron_folder(folder: Path) -> bool:
    """Return whether a folder holds, or tracks, such files."""
    return bool(_ranks(folder)) or bool(_ranks(_tracked(folder)))


def read_megatron(folder: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the folder that is read, its weights by Megatron's names, and the optimizer's tensors by their places.

    The optimizer's tensors of several ranks are not joined; their names start with ``mp_rank_01.``.

    Raises:
        UserError: files are missing, hold what is not read for safety, or virtual pipeline stages.
    """
    path = folder if _ranks(folder) else _tracked(folder)
    parts = {key: _load(file) for key, file in _ranks(path).items()}
    stages = sorted({stage for _, stage in parts})
    weights: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    before = 0
    for stage in stages:
        ranks = [parts[key] for key in sorted(parts) if key[1] == stage]
        if any("model" not in part for part in ranks):
            raise UserError(f"{path}: virtual pipeline stages (model0, model1) are not read; save without them")
        flat = [_flatten(part["model"]) for part in ranks]
        gated = bool(getattr(ranks[0].get("args"), "swiglu", False))
        layers = [int(found[2]) for name in flat[0] if (found := _LAYER.search(name))]
        for name in flat[0]:
            whole = _join(name, [part[name] for part in flat], gated)
            weights[_renumbered(name, before)] = whole
        before += max(layers, default=-1) + 1
    for (tensor, stage), part in parts.items():
        prefix = f"mp_rank_{tensor:02d}{f'_{stage:03d}' if len(stages) > 1 else ''}." if len(parts) > 1 else ""
        own = _flatten(part.get("optimizer") or {}, "optimizer.")
        state.update({f"{prefix}{name}": value for name, value in own.items()})
    return path, weights, state


def _renumbered(name: str, before: int) -> str:
    return _LAYER.sub(lambda found: f"{found[1]}{int(found[2]) + before}{found[3]}", name, count=1)


def _tracked(folder: Path) -> Path:
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return folder
    word = tracker.read_text(encoding="utf-8").strip()
    return folder / (f"iter_{int(word):07d}" if word.isdigit() else word)


def _ranks(folder: Path) -> dict[tuple[int, int], Path]:
    found = {}
    for path in sorted(folder.glob("mp_rank_*")) if folder.is_dir() else []:
        name = _RANK.match(path.name)
        file = next((path / file for file in _FILES if (path / file).is_file()), None)
        if name and file:
            found[int(name[1]), int(name[2] or 0)] = file
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:
        raise UserError(
            f"{file}: cannot be read without running code from it ({str(error).splitlines()[0]}); "
            "save its 'model' alone: torch.save({'model': torch.load(file, weights_only=False)['model']}, file)"
        ) from error


def _flatten(content: Mapping[Any, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            flat |= _flatten(dict(enumerate(value)), f"{prefix}{key}.")
    return flat


def _join(name: str, parts: list[torch.Tensor], gated: bool) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    if _ROW.search(name):
        return torch.cat(parts, dim=1)
    if gated and _GATED.search(name):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    if _COLUMN.search(name):
        return torch.cat(parts)
    if all(torch.equal(parts[0], part) for part in parts[1:]):
        return parts[0]
    raise UserError(
        f"{name}: differs between tensor-parallel ranks and is no layer that they share; they have diverged"
    )
