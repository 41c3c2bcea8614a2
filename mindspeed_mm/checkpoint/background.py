"""Saving beside the training: a copy of the tensors in host memory, and a thread that does one job at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint.boxes import BoxedTensor
from mindspeed_mm.checkpoint.tensors import local_blocks


class HostCopy:
    """Copies tensors into host memory, into the same buffers every time."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return copies on the CPU of this rank's parts; they change with the next call.

        Sharded tensors come back as sharded ones, placed alike. Returns when the copies are made.
        """
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            for copy, part in zip(local_blocks(self._buffers[name]), local_blocks(tensor), strict=True):
                copy.tensor.copy_(part.tensor, non_blocking=True)
        accelerator.synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        known = self._buffers.get(name)
        if known is not None and known.dtype == tensor.dtype and _sizes(known) == _sizes(tensor):
            return known
        pin = not accelerator.is_cpu()  # copies from pageable memory would make the host wait for each
        if isinstance(tensor, BoxedTensor):
            return tensor.host_copy(pin)
        return torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=pin)


def _sizes(tensor: torch.Tensor) -> list[torch.Size]:
    return [block.tensor.shape for block in local_blocks(tensor)]


class Background:
    """Runs one job at a time in a thread of its own.

    The process does not end before the job has: the thread is none of those that die with it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], Any]) -> None:
        """Run ``job``; the one before must have been waited for."""

        def work() -> None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - DCP raises BaseException; `wait` raises it where it is seen
                self._error = error

        assert self._thread is None
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the job.

        Raises:
            BaseException: what the job raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
