"""The weights of a Hugging Face folder, opened without reading them, and files written beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mindspeed_mm.checkpoint.tensors import listing
from mindspeed_mm.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


# So much of a weight is in host memory at a time, beside where it goes.
_PIECE = 2**22  # bytes


@dataclass(frozen=True)
class FileTensor:
    """One tensor in a safetensors file.

    Bytes come by ``pread`` instead of safetensors' map of the file, whose pages would stay in the process's memory, and
    those of `pieces` into one place, as memory that is taken and given back for each would be scattered.
    """

    handle: Any
    key: str
    descriptor: int
    start: int
    scratch: torch.Tensor

    @cached_property
    def meta(self) -> torch.Tensor:
        """A tensor on meta with the shape and dtype of the stored one."""
        shape = self.handle.get_slice(self.key).get_shape()
        # An empty slice tells the dtype without a table of safetensors' own dtype names.
        sample = self.handle.get_slice(self.key)[:0] if shape else self.handle.get_tensor(self.key)
        return torch.empty(shape, dtype=sample.dtype, device="meta")

    def read(self, block: tuple[slice, ...] = ()) -> torch.Tensor:
        """Return the tensor, or the block of it that one slice for each dimension, or for the first ones, cuts out."""
        return self._read(block, None)

    def pieces(self, block: tuple[slice, ...]) -> Iterator[tuple[Any, torch.Tensor]]:
        """Read a block some rows at a time; give where in it they lie, and them, until the next piece is read."""
        if not block:
            yield ..., self.read()
            return
        first, rest = block[0], block[1:]
        step = max(1, len(self.scratch) // max(1, self.meta[:1].nbytes))
        for start in range(first.start, first.stop, step):
            stop = min(start + step, first.stop)
            yield slice(start - first.start, stop - first.start), self._read((slice(start, stop), *rest), self.scratch)

    def _read(self, block: tuple[slice, ...], place: torch.Tensor | None) -> torch.Tensor:
        shape, dtype = self.meta.shape, self.meta.dtype
        if not shape:
            return self.handle.get_tensor(self.key)
        rows, *others = [range(n)[s] for n, s in zip(shape, (*block, *[slice(None)] * len(shape)), strict=False)]
        if any(len(other) != n for other, n in zip(others, shape[1:], strict=True)):
            return self.handle.get_slice(self.key)[block]
        wanted, row_bytes = (len(rows), *shape[1:]), self.meta[:1].nbytes
        size = len(rows) * row_bytes
        if place is None or len(place) < size:
            place = torch.empty(size, dtype=torch.uint8)
        into, start = memoryview(place[:size].numpy()), self.start + rows.start * row_bytes
        while into:
            count = os.preadv(self.descriptor, [into], start)
            if not count:
                raise UserError(f"{self.key} ends too early in its safetensors file; download it again")
            into, start = into[count:], start + count
        return place[:size].view(dtype).view(wanted)


@contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, FileTensor]]:
    """Open the safetensors files of a Hugging Face folder and give its tensors by their names on disk.

    Raises:
        UserError: the folder has no safetensors weights, lacks a file of its index, or a file is damaged.
    """
    scratch = torch.empty(_PIECE, dtype=torch.uint8)
    with ExitStack() as stack:
        tensors: dict[str, FileTensor] = {}
        for path in _weight_files(folder):
            try:
                handle = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a readable safetensors file ({error}); download it again") from error
            file = stack.enter_context(open(path, "rb", buffering=0))
            # Eight bytes with the length of the JSON that follows, which says where behind it each tensor lies.
            length = int.from_bytes(file.read(8), "little")
            places = json.loads(os.pread(file.fileno(), length, 8))
            for key in handle.keys():  # noqa: SIM118 - no mapping
                start = 8 + length + places[key]["data_offsets"][0]
                tensors[key] = FileTensor(handle, key, file.fileno(), start, scratch)
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
        absent = [name for name in names if not (folder / name).is_file()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is not a safetensors index ({error})") from error
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
