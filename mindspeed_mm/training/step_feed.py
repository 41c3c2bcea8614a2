"""The training data, step by step: what a step took, so that it can be run again, and what no step may take."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint.coordination import gather
from mindspeed_mm.data.loaders import Batch
from mindspeed_mm.losses import IGNORE
from mindspeed_mm.training.feed import Feed

LEFT_OUT_FILE = "left_out_samples.json"


class LeftOut:
    """Ranges ``[first, end)`` of the sample order, all ranks together, that a run does not train on.

    They are kept in a file beside the checkpoints, so that a run that is resumed from any of them leaves the same
    samples out.

    Args:
        folder: of the checkpoints, None to keep no file.
        earlier: the folder of the checkpoint that the run goes on from, whose ranges count here too; None if it starts
            anew. A collective: the disk of one host may be the only one that has the file.
    """

    def __init__(self, folder: Path | None, earlier: Path | None = None) -> None:
        self._file = folder / LEFT_OUT_FILE if folder else None
        self.ranges: list[tuple[int, int]] = max(gather(_read(earlier / LEFT_OUT_FILE) if earlier else []), key=len)
        if folder and not (earlier and earlier.resolve() == folder.resolve()) and dist.get_rank() == 0:
            (folder / LEFT_OUT_FILE).unlink(missing_ok=True)  # another run's
            if self.ranges:
                self._write()

    def add(self, first: int, end: int) -> None:
        """Leave out samples ``first`` to ``end - 1`` from now on. Every rank calls it."""
        if self.ranges and self.ranges[-1][1] == first:
            first = self.ranges.pop()[0]
        self.ranges.append((first, end))
        if dist.get_rank() == 0:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(self.ranges, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._file)

    def touches(self, first: int, end: int) -> bool:
        """Return whether any of the samples ``first`` to ``end - 1`` is left out."""
        return any(first < b and a < end for a, b in self.ranges)


def _read(file: Path) -> list[tuple[int, int]]:
    return [(first, end) for first, end in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


@dataclass(frozen=True)
class TakenBatch:
    """A batch as the model got it: a shallow copy, and the random state at that moment."""

    batch: Any
    random_state: dict[str, Any]
    place: Any
    first_sample: int
    end_sample: int


class StepFeed(Feed):
    """A feed that keeps the batches of the running step, and passes over samples that are left out.

    Args:
        source: the training iterator.
        stride: samples of one micro-batch on all ranks together.
        left_out: what to pass over.
        check: see :class:`Feed`.
    """

    def __init__(
        self, source: Iterator[Any], stride: int, left_out: LeftOut, check: Callable[..., None] | None = None
    ) -> None:
        super().__init__(source, "training", check)
        self.left_out = left_out
        self.stride = stride
        self.position = 0
        self.passed_over = 0
        self.taken: list[TakenBatch] = []
        self.on_batch: Callable[[TakenBatch], None] | None = None
        """Called with every batch before the callbacks get it."""

    def start_step(self, position: int) -> None:
        """Begin a step at sample ``position`` of the order."""
        self.position, self.passed_over, self.taken = position, 0, []

    def __next__(self) -> Any:
        while self.left_out.touches(self.position, self.position + self.stride):
            self._pass_over()
        batch = super().__next__()
        taken = copy(batch) if isinstance(batch, Mapping) else batch  # callbacks may put other tensors into theirs
        first, self.position = self.position, self.position + self.stride
        self.taken.append(TakenBatch(taken, accelerator.rng_state(), self.place, first, self.position))
        if self.on_batch:
            self.on_batch(self.taken[-1])
        return batch

    def _pass_over(self) -> None:
        before = accelerator.rng_state()  # as if the data set did not hold it
        self._fetch()
        accelerator.set_rng_state(before)
        self.position += self.stride
        self.passed_over += self.stride


def replay(taken: list[TakenBatch]) -> Iterator[Any]:
    """Yield the batches again, each with the random state it had."""
    for item in taken:
        accelerator.set_rng_state(item.random_state)
        yield dict(item.batch) if isinstance(item.batch, Mapping) else item.batch


def count_targets(taken: list[TakenBatch]) -> int | None:
    """Return the labels of these batches that are targets.

    None when that says nothing: one has no labels for each of its tokens in host memory, or bad samples were left out
    of it.
    """
    total = 0
    for item in taken:
        if isinstance(item.batch, Batch) or not isinstance(item.batch, Mapping):
            return None
        labels, tokens = item.batch.get("labels"), item.batch.get("input_ids")
        if not (isinstance(labels, Tensor) and labels.is_cpu and isinstance(tokens, Tensor)):
            return None
        if labels.shape != tokens.shape:  # classes, not next tokens
            return None
        total += int((labels[..., 1:] != IGNORE).sum())
    return total
