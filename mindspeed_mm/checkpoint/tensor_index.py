"""The index of a folder of tensors, DCP's ``.metadata``: a pickle, read so that it cannot run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mindspeed_mm.checkpoint.coordination import condense
from mindspeed_mm.errors import UserError

NAME = ".metadata"
# What DCP puts into its index, of every version; none of it does anything but hold values.
_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}


def read_index(folder: Path) -> Metadata:
    """Return what the index says of a folder's tensors.

    Raises:
        UserError: the index is damaged, or holds more than an index does.
    """
    path = folder / NAME
    try:
        with open(path, "rb") as file:
            index = _Unpickler(file).load()
    except UserError as error:
        raise UserError(f"{path} is not read: {error}") from error
    except Exception as error:
        raise UserError(f"cannot read {path}: {condense(error)}; pass --ckpt-step for another checkpoint") from error
    if not isinstance(index, Metadata):
        raise UserError(f"{path} is no index of tensors; pass --ckpt-step for another checkpoint")
    return index


class _Unpickler(pickle.Unpickler):
    """Makes objects of the known classes and of no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class, or a function that makes objects, that the pickle asks for."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _KNOWN:
            return super().find_class(module, name)
        raise UserError(
            f"it is a pickle that asks for {module}.{name}, which no index of tensors needs; it may run code. Have the "
            "weights sent as safetensors files."
        )
