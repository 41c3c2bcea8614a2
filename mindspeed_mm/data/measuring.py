"""What is kept of a sample besides its tensors."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mindspeed_mm.data.encoding import IGNORE_INDEX, ConversationEncoder
from mindspeed_mm.data.preparation import Measured

if TYPE_CHECKING:
    import datasets

_MEDIA = ("images", "videos", "audios")


def measure(sample: Mapping[str, torch.Tensor], row: Mapping[str, Any], encoder: ConversationEncoder) -> Measured:
    """Return the sizes of an encoded row.

    Args:
        sample: of ``encoder`` and ``row``.
        row: its messages and media.
        encoder: that is asked again, without a limit, where the sample may have been cut.
    """
    tokens = uncut = len(sample["input_ids"])
    if tokens == encoder.options.seq_length:
        unlimited = copy(encoder)
        unlimited.options = replace(encoder.options, seq_length=None)
        uncut = len(unlimited.encode(row, "")["input_ids"])
    return Measured(
        sample,
        tokens=tokens,
        patches=count_patches(sample, _patch_side(encoder.options.folder)),
        targets=int((sample["labels"][1:] != IGNORE_INDEX).sum()),
        uncut=uncut,
        stamp=_stamp([path for name in _MEDIA for path in row.get(name) or ()]),
    )


def count_patches(sample: Mapping[str, torch.Tensor], side: int) -> int:
    """Return how many patches the vision tower sees.

    Args:
        sample: ``pixel_values`` of shape (patches, values), or (..., 3, height, width) for families that are given
            whole pictures or tiles; the same of videos.
        side: of a patch in pixels.
    """
    pixels = [value for key, value in sample.items() if key.startswith("pixel_values")]
    return sum(
        len(value)
        if value.ndim == 2
        else value[..., 0, 0, 0].numel() * (value.shape[-2] // side) * (value.shape[-1] // side)
        for value in pixels
    )


def media_stamps(rows: datasets.Dataset) -> np.ndarray:
    """Return a number for the media files of each row, int32 (N,), that changes when one of them is replaced."""
    columns = [rows[:][name] for name in _MEDIA if name in rows.column_names]
    return np.array(
        [_stamp([path for paths in row for path in paths or ()]) for row in zip(*columns, strict=True)], np.int32
    )


def _stamp(paths: list[str]) -> int:
    digest = 0
    for path in paths:
        try:
            stat = Path(path).stat()
            text = f"{path} {stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            text = f"{path} is missing"
        digest = zlib.crc32(text.encode(), digest)
    return digest & 0x7FFFFFFF


@lru_cache
def _patch_side(folder: str) -> int:
    file = Path(folder) / "config.json"
    vision = json.loads(file.read_text(encoding="utf-8")).get("vision_config") or {} if file.is_file() else {}
    side = vision.get("patch_size", 14)  # 14: of CLIP, and of all who began with it
    return int(side[0] if isinstance(side, list) else side)
