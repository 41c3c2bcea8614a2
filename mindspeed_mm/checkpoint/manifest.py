"""What a checkpoint holds, so that anybody can tell later whether it still does: ``manifest.json``.

::

    {"checksum": "...",                                       of everything that follows in this file
     "format": 1, "iteration": 100, "world_size": 2, "validation_loss": null,
     "versions": {"mindspeed_mm": "...", "torch": "...", "transformers": "..."},
     "files": {"__0_0.distcp": {"bytes": 1234, "xxh3_128": "..."}, ...},
     "tensors": {"model.head.weight": {"shape": [7, 5], "dtype": "float32", "digest": "..."}, ...}}

It is made before a checkpoint is published: a checkpoint without one is of another program, or older.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from mindspeed_mm.errors import UserError

NAME = "manifest.json"
_FORMAT = 1
_HEAD = b'{"checksum": "'
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """A file's size and the XXH3 checksum of its content, in hexadecimal."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class TensorRecord:
    """A tensor's full shape, its dtype (``"float32"``) and its `digest.digest`, in hexadecimal."""

    shape: list[int]
    dtype: str
    digest: str


@dataclass(frozen=True)
class Part:
    """What one rank has put into a checkpoint.

    Attributes:
        files: the files it wrote, by name.
        digests: of the parts of tensors it wrote.
        tensors: full shape and dtype of every tensor that the rank holds, or a part of it.
    """

    files: dict[str, FileRecord]
    digests: dict[str, int]
    tensors: dict[str, tuple[list[int], str]]


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``; validation_loss is that of the evaluation at this iteration, if any."""

    iteration: int
    world_size: int
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    validation_loss: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def digests(self) -> dict[str, int]:
        """The tensors' digests as numbers."""
        return {name: int(record.digest, 16) for name, record in self.tensors.items()}

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(record.bytes for record in self.files.values())


def merge(parts: Iterable[Part], *, iteration: int, world_size: int, validation_loss: float | None = None) -> Manifest:
    """Return the manifest of a checkpoint that consists of these parts."""
    parts = list(parts)
    tensors = {
        name: TensorRecord(shape, dtype, f"{sum(part.digests.get(name, 0) for part in parts) % (1 << 64):016x}")
        for name, (shape, dtype) in sorted({n: t for part in parts for n, t in part.tensors.items()}.items())
    }
    files = {name: record for part in parts for name, record in part.files.items()}
    versions = {name: _version(name) for name in ("mindspeed_mm", "torch", "transformers")}
    return Manifest(iteration, world_size, dict(sorted(files.items())), tensors, validation_loss, versions)


def describe(tensor: Any) -> tuple[list[int], str]:
    """Return a tensor's full shape and dtype as a manifest holds them."""
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def write(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` and flush it to the disk."""
    body = json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1)
    tail = ('", ' + body.removeprefix("{").lstrip()).encode()
    with open(folder / NAME, "wb") as file:
        file.write(_HEAD + xxhash.xxh3_128_hexdigest(tail).encode() + tail)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Manifest | None:
    """Return a checkpoint's manifest, or None if it has none.

    Raises:
        UserError: ``manifest.json`` is damaged, or of a later version.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    data = path.read_bytes()
    checksum, tail = data[len(_HEAD) : len(_HEAD) + 32], data[len(_HEAD) + 32 :]
    if not data.startswith(_HEAD) or checksum != xxhash.xxh3_128_hexdigest(tail).encode():
        raise UserError(f"{path} is damaged: its checksum is not that of its content")
    content = json.loads(data)
    del content["checksum"]
    if (found := content.pop("format")) != _FORMAT:
        raise UserError(f"{path}: format {found} is of a later version of mindspeed-mm; update it")
    content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
    content["tensors"] = {name: TensorRecord(**record) for name, record in content["tensors"].items()}
    return Manifest(**content)


def record_file(path: Path) -> FileRecord:
    """Return a file's size and checksum."""
    checksum, size = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            checksum.update(block)
            size += len(block)
    return FileRecord(size, checksum.hexdigest())


def what_changed(path: Path, record: FileRecord, sizes_only: bool = False) -> str | None:
    """Return what is wrong with a file of a checkpoint, or None if nothing is."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path.name} has {size} bytes, {record.bytes} were saved"
        if not sizes_only and record_file(path) != record:
            return f"{path.name} is not what was saved: its checksum differs"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
