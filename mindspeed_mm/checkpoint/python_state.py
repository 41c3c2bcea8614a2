"""Python state in files that ``torch.load(weights_only=True)`` accepts: reading one never runs code."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindspeed_mm.checkpoint.coordination import condense
from mindspeed_mm.errors import UserError

_ARRAY = "__ndarray__"


def encode_python_state(state: Any, where: str) -> bytes:
    """Return plain Python values, numpy arrays and tensors as the content of a file.

    Raises:
        TypeError: ``state`` holds an object that could only be pickled; the message says where, below ``where``.
    """
    buffer = io.BytesIO()
    torch.save(_encode(state, where), buffer)
    return buffer.getvalue()


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_python_state(path: Path) -> Any:
    """Read what `encode_python_state` made; numpy arrays come back as numpy arrays.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return _decode(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"cannot read {path}: {condense(error)}; pass --ckpt-step for another checkpoint") from error


def _encode(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(value.copy())}
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {_encode(k, where): _encode(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds plain values, arrays and tensors only")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return value[_ARRAY].numpy()
        return {k: _decode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_decode(v) for v in value)
    return value
