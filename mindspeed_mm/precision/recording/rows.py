"""Telling the rows of an activation apart by what they are, not by where they lie.

A row is a token of a sample, a patch of one of its images, an image or a sample; its signs are a function of the
sample's content and the place in it. So the sketch of an activation is the same for every order of the samples, split
into micro-batches and ranks, padding and packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.precision.recording.batch import Media, Samples
from mindspeed_mm.precision.recording.digest import RowSigns, hashes, mix

_SALTS = {"image": 0x1DEA, "video": 0x7E1E, "sample": 0x5A5A}


@dataclass(frozen=True)
class Table:
    """The rows of a micro-batch, in the order in which they lie.

    Attributes:
        hashes: (N,) uint64, of those that count.
        chosen: (N,) their places.
        total: all rows, with those that do not count.
    """

    hashes: np.ndarray
    chosen: np.ndarray
    total: int

    def within(self, shape: Sequence[int], box: Sequence[tuple[int, int]]) -> Table:
        """Return the rows inside of a box, ``(offset, size)`` in each of the dimensions ``shape`` of rows."""
        place = np.full(self.total, -1)
        place[self.chosen] = np.arange(len(self.chosen))
        inside = place.reshape(shape)[tuple(slice(start, start + size) for start, size in box)].reshape(-1)
        chosen = np.flatnonzero(inside >= 0)
        return Table(self.hashes[inside[chosen]], chosen, len(inside))


@dataclass(frozen=True)
class Rows:
    """Which rows of a tensor count, and what tells them apart.

    Attributes:
        kind: see :attr:`mindspeed_mm.precision.records.sketch.Sketch.rows`.
        axes: the dimensions that are rows.
        table: the rows, those of the last of ``axes`` fastest.
        spread: size to expand these dimensions to, for a tensor that is the same for all samples; None otherwise.
        label: distinguishes calls that are about other things, the video call of a vision tower.
    """

    kind: str
    axes: tuple[int, ...]
    table: Table
    spread: tuple[int, ...] | None = None
    label: str = ""


class BatchRows:
    """Finds the rows of the activations of one micro-batch.

    Args:
        samples: what it holds; None where nothing can be told.
        device: of the activations.
    """

    def __init__(self, samples: Samples | None, device: torch.device) -> None:
        self.samples = samples
        self._device = device
        self._tables: dict[tuple[str, ...], Table] = {}
        self._on_device: dict[int, tuple[Table, RowSigns, Tensor | None]] = {}

    def of(self, shape: Sequence[int], *, vision: bool) -> Rows | None:
        """Return what the rows of a tensor of this shape are; None where only their index tells them apart.

        Args:
            shape: of the tensor.
            vision: it belongs to a vision tower or what projects its output, where dimensions are patches rather than
                tokens.
        """
        if self.samples is None or not len(shape):
            return None
        if vision:
            return self._patches(shape)
        return self._tokens(shape) or self._samples(shape) or self._patches(shape)

    def of_positions(self, shape: Sequence[int]) -> Rows | None:
        """Return what the rows of a tensor are whose first dimensions are positions and samples, (S, B, ...)."""
        if self.samples is None or self.samples.shape is None or tuple(shape[1::-1]) != self.samples.shape:
            return None
        return Rows("token", (1, 0), self._token_table())

    def at(self, positions: np.ndarray) -> BatchRows:
        """Return the rows of a rank that has these positions of every row of tokens only; -1 stands for padding."""
        samples = self.samples if self.samples is None or self.samples.shape is None else self.samples.at(positions)
        return BatchRows(samples, self._device)

    @property
    def knows_tokens(self) -> bool:
        """Whether the samples are made of tokens."""
        return self.samples is not None and self.samples.shape is not None

    def are_masks(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape relates tokens to tokens, as attention masks and weights do."""
        if self.samples is None or self.samples.shape is None or len(shape) != 4:
            return False
        return shape[-1] == shape[-2] == self.samples.shape[1] != 1

    def _tokens(self, shape: Sequence[int]) -> Rows | None:
        assert self.samples is not None
        if self.samples.shape is None:
            return None
        batch, length = self.samples.shape
        table = self._token_table()
        for axis in range(len(shape) - 1):
            if tuple(shape[axis : axis + 2]) == (batch, length):
                return Rows("token", (axis, axis + 1), table)
        if shape[0] == batch and length in shape[1:]:
            return Rows("token", (0, list(shape).index(length, 1)), table)
        if tuple(shape[:2]) == (length, batch):
            return Rows("token", (1, 0), table)
        if shape[0] == batch * length:
            return Rows("token", (0,), table)
        for axis in range(len(shape) - 1):
            if tuple(shape[axis : axis + 2]) == (1, length):
                return Rows("token", (axis, axis + 1), table, (batch, length))
        return None

    def _samples(self, shape: Sequence[int]) -> Rows | None:
        assert self.samples is not None
        count, packed = len(self.samples.keys), self.samples.shape is not None
        if shape[0] == count:
            return Rows("sample", (0,), self._sample_table(1))
        # Without tokens, a first dimension of several rows for each sample, such as the frames of a video.
        if not packed and shape[0] % count == 0 and shape[0]:
            return Rows("sample", (0,), self._sample_table(shape[0] // count))
        return None

    def _patches(self, shape: Sequence[int]) -> Rows | None:
        assert self.samples is not None
        axis = next((i for i, size in enumerate(shape) if size != 1), 0)
        for medium in self.samples.media:
            label = "video" if medium.kind == "video" else ""
            if len(medium.sizes) == medium.rows == shape[0]:
                return Rows("image", (0,), self._patch_table(medium, 1), label=label)
            for ratio in {1, medium.ratio}:
                if shape[axis] * ratio == medium.rows and not (medium.sizes % ratio).any():
                    return Rows("patch", (axis,), self._patch_table(medium, ratio), label=label)
        return None

    def on_device(self, table: Table) -> tuple[RowSigns, Tensor | None]:
        """Return a table's signs, and its places unless they are all."""
        if id(table) not in self._on_device:
            chosen = None
            if len(table.chosen) < table.total:
                chosen = torch.from_numpy(table.chosen).to(self._device, non_blocking=True)
            self._on_device[id(table)] = (table, RowSigns.of(table.hashes, self._device), chosen)
        return self._on_device[id(table)][1:]

    def _token_table(self) -> Table:
        if ("token",) not in self._tables:
            samples = self.samples
            assert samples is not None and samples.owners is not None and samples.places is not None
            owners, places = samples.owners.reshape(-1), samples.places.reshape(-1)
            own = np.flatnonzero(owners >= 0)
            self._tables[("token",)] = Table(hashes(samples.keys[owners[own]], places[own]), own, len(owners))
        return self._tables[("token",)]

    def _sample_table(self, times: int) -> Table:
        key = ("sample", str(times))
        if key not in self._tables:
            assert self.samples is not None
            keys = mix(np.repeat(self.samples.keys, times) ^ np.uint64(_SALTS["sample"]))
            places = np.tile(np.arange(times), len(self.samples.keys))
            self._tables[key] = Table(hashes(keys, places), np.arange(len(keys)), len(keys))
        return self._tables[key]

    def _patch_table(self, medium: Media, ratio: int) -> Table:
        key = (medium.kind, str(ratio))
        if key not in self._tables:
            assert self.samples is not None
            counts = medium.sizes // ratio
            owners = np.repeat(medium.owners, counts)
            of_medium = hashes(self.samples.keys[medium.owners] ^ np.uint64(_SALTS[medium.kind]), medium.places)
            places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            own = np.flatnonzero(owners >= 0)
            self._tables[key] = Table(hashes(np.repeat(mix(of_medium), counts)[own], places[own]), own, len(owners))
        return self._tables[key]
