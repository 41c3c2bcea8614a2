"""Samples as they come from the processor, one after the other in a file, read back without decoding anything."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

_MAX_OPEN = 64


@contextmanager
def write_whole(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Write a file that others see either whole or not at all, also those on other nodes and after a crash.

    Without ``flush``, which takes its time, a power cut may leave it short.
    """
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_sample(file: BinaryIO, sample: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Write a sample at the end of ``file`` and return where it lies: offset and length in bytes."""
    offset = file.tell()
    return offset, file.write(safetensors.torch.save({key: value.contiguous() for key, value in sample.items()}))


class SampleReader:
    """Reads what `append_sample` wrote; processes may share it."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read(self, path: Path, offset: int, length: int) -> dict[str, torch.Tensor]:
        """Return the sample at ``offset``; its tensors are the caller's own. The keys may come in another order."""
        if path not in self._open:
            if len(self._open) == _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY)
        # pread leaves the position of the file alone, which forked workers share.
        return safetensors.torch.load(os.pread(self._open[path], length, offset))

    def __getstate__(self) -> dict[str, object]:
        return {"_open": {}}
