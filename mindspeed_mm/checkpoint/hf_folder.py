"""The weights of a Hugging Face folder, opened without reading them, and files written beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mindspeed_mm.checkpoint.tensors import listing
from mindspeed_mm.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class FileTensor:
    """One tensor in a safetensors file; `read` takes only the asked block from the disk."""

    handle: Any
    key: str

    @property
    def meta(self) -> torch.Tensor:
        """A tensor on meta with the shape and dtype of the stored one."""
        shape = self.handle.get_slice(self.key).get_shape()
        # An empty slice tells the dtype without a table of safetensors' own dtype names.
        sample = self.handle.get_slice(self.key)[:0] if shape else self.read()
        return torch.empty(shape, dtype=sample.dtype, device="meta")

    def read(self, block: tuple[slice, ...] = ()) -> torch.Tensor:
        """Return the tensor, or the block of it that one slice for each dimension cuts out."""
        if not block:
            return self.handle.get_tensor(self.key)
        return self.handle.get_slice(self.key)[block]


@contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, FileTensor]]:
    """Open the safetensors files of a Hugging Face folder and give its tensors by their names on disk.

    Raises:
        UserError: the folder has no safetensors weights, lacks a file of its index, or a file is damaged.
    """
    with ExitStack() as stack:
        tensors: dict[str, FileTensor] = {}
        for file in _weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} is not a readable safetensors file ({error}); download it again") from error
            tensors.update({key: FileTensor(handle, key) for key in handle.keys()})  # noqa: SIM118 - no mapping
        yield tensors


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such Hugging Face folder")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        other = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        found = f"; it has {', '.join(other[:5])}, which is not read" if other else ""
        if any(not name.endswith(".safetensors") for name in other):
            found += ": a pickle may run code; have Transformers write safetensors files from it, where you trust it"
        raise UserError(
            f"{folder} has no weights: neither {WEIGHTS} nor {INDEX} is there{found}; download them into it"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / INDEX} is not a safetensors index ({error})") from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder} lacks {len(absent)} of the {len(names)} files in its index:\n{listing(absent)}")
    return [folder / name for name in names]


class ShardWriter:
    """Writes tensors into safetensors files of at most a given size, collecting one file's worth at a time."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._shards: list[list[str]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a CPU tensor under its name on disk."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the files their final names, and write the index when there are several."""
        self._flush()
        count = len(self._shards)
        names = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for i, name in enumerate(names):
            self._temporary(i).rename(self._folder / name)
        if count > 1:
            weight_map = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        path = self._temporary(len(self._shards))
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~_umask())  # safetensors creates it for the owner alone
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _temporary(self, index: int) -> Path:
        return self._folder / f"shard-{index}.tmp"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
