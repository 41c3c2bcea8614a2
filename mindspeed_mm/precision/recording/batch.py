"""One micro-batch on the host: its samples, which of its tokens are theirs, and what each of them holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from mindspeed_mm.precision.records.record import SampleFingerprint

# Media come in the order of their placeholders: pixels, the grid of each, and the config's names of the placeholder.
_MEDIA = (
    ("image", "pixel_values", "image_grid_thw", ("image_token_id", "image_token_index")),
    ("video", "pixel_values_videos", "video_grid_thw", ("video_token_id", "video_token_index")),
)
_BOUNDS = ("attention_mask", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")  # how samples lie, not what they hold
DERIVED = (*_BOUNDS, "position_ids", "image_grid_thw", "video_grid_thw")
"""Fields that follow from others, or are few numbers for each image."""


@dataclass(frozen=True)
class Media:
    """The images, or the videos, of a micro-batch.

    Attributes:
        kind: ``image`` or ``video``.
        key: of the batch, that holds the pixels.
        sizes: rows of the pixels that belong to each; 1 where each is a row.
        owners: sample of each, -1 where nobody knows.
        places: number of each among the media of its kind of its sample.
        ratio: patches behind one token of the text; 1 where nobody knows.
    """

    kind: str
    key: str
    sizes: np.ndarray
    owners: np.ndarray
    places: np.ndarray
    ratio: int

    @property
    def rows(self) -> int:
        """Rows of the pixels."""
        return int(self.sizes.sum())


@dataclass(frozen=True)
class Samples:
    """The samples of a micro-batch and where they lie.

    Attributes:
        keys: (N,) uint64 hash of each sample's ``input_ids``, or of all that it holds where there are none. Samples
            that are alike have the same: which of them is which makes no difference to what is computed.
        shape: (B, S) of the tokens; None without tokens, then the batch has one row for each sample.
        owners: (B, S) sample of each token, -1 for padding; None without tokens.
        places: (B, S) number of each token in its sample; None without tokens.
        media: images and videos.
        fingerprints: of all samples; positions and names are filled in by who knows them.
    """

    keys: np.ndarray
    shape: tuple[int, int] | None
    owners: np.ndarray | None
    places: np.ndarray | None
    media: tuple[Media, ...]
    fingerprints: list[SampleFingerprint]

    def at(self, positions: np.ndarray) -> Samples:
        """Return what is left when every row of tokens has these positions only; -1 stands for padding."""
        assert self.owners is not None and self.places is not None and self.shape is not None
        owners = np.where(positions >= 0, self.owners[:, positions], -1)
        shape = (self.shape[0], len(positions))
        return replace(self, owners=owners, places=self.places[:, positions], shape=shape, media=())


def read_batch(batch: Any, config: Any = None) -> Samples | None:
    """Return what a micro-batch holds; None where no sample can be told apart in it.

    Tokens are ``input_ids`` (B, S). Padding is what ``attention_mask`` (B, S) leaves out, on either side, or what lies
    behind ``cu_seqlens`` of a packed row. Without ``cu_seqlens``, position ids that start anew at 0 tell the samples of
    a packed row apart. A batch without ``input_ids`` has a sample in each row of its tensors.

    Args:
        batch: a mapping, or tensors in a tuple or alone. Tensors that are not in host memory are copied there.
        config: of the Hugging Face model, for the ids of images and videos among the tokens.
    """
    fields = {name: value.detach().cpu() for name, value in _tensors(batch).items()}
    ids = fields.get("input_ids")
    if ids is not None and ids.ndim == 2 and not ids.is_floating_point():
        return _read_tokens(fields, ids.numpy().astype(np.int64), config)
    rows = [name for name, value in fields.items() if value.ndim]
    if not rows:
        return None
    first = next((fields[name] for name in ("labels",) if name in rows), fields[rows[0]])
    count = len(first)
    held = {name: value for name, value in fields.items() if value.ndim and len(value) == count}
    contents = [{name: _hash(value[i]) for name, value in held.items()} for i in range(count)]
    keys = [
        xxhash.xxh64("".join(f"{name}{content[name]}" for name in sorted(content)).encode()) for content in contents
    ]
    prints = [SampleFingerprint(key.hexdigest(), content) for key, content in zip(keys, contents, strict=True)]
    return Samples(np.array([key.intdigest() for key in keys], np.uint64), None, None, None, (), prints)


def _tensors(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, Mapping):
        items = [(str(name), value) for name, value in batch.items()]
    else:
        values = batch if isinstance(batch, (tuple, list)) else [batch]
        items = [(str(index), value) for index, value in enumerate(values)]
    return {name: value for name, value in items if isinstance(value, Tensor)}


def _read_tokens(fields: dict[str, Tensor], ids: np.ndarray, config: Any) -> Samples:
    owners = _owners(fields, ids.shape)
    count = int(owners.max(initial=-1)) + 1
    flat = owners.reshape(-1)
    order = np.argsort(flat, kind="stable")  # tokens by sample, in their order
    bounds = np.searchsorted(flat[order], np.arange(count + 1))
    spans = [order[begin:end] for begin, end in pairwise(bounds.tolist())]
    places = np.zeros(flat.shape, np.int64)
    for span in spans:
        places[span] = np.arange(len(span))
    tokens = [ids.reshape(-1)[span] for span in spans]
    keys = [xxhash.xxh64(part.tobytes()) for part in tokens]
    media = _media(fields, ids, owners, count, config)
    prints = [
        SampleFingerprint(
            id=key.hexdigest(),
            fields=_contents(fields, ids.shape, span, sample, count, media),
            tokens=tuple(part.tolist()),
        )
        for sample, (key, span, part) in enumerate(zip(keys, spans, tokens, strict=True))
    ]
    return Samples(
        keys=np.array([key.intdigest() for key in keys], np.uint64),
        shape=(ids.shape[0], ids.shape[1]),
        owners=owners,
        places=places.reshape(ids.shape),
        media=media,
        fingerprints=prints,
    )


def _owners(fields: Mapping[str, Tensor], shape: tuple[int, ...]) -> np.ndarray:
    """Return the sample of each token, (B, S), -1 for padding."""
    ends = fields.get("cu_seqlens", fields.get("cu_seq_lens_q"))
    if ends is not None and shape[0] == 1:
        bounds = ends.numpy()
        place = np.arange(shape[1])
        owners = np.searchsorted(bounds[1:], place, side="right")
        owners[place >= bounds[-1]] = -1
        return owners[None]
    mask = fields.get("attention_mask")
    valid = np.ones(shape, bool)
    if mask is not None and tuple(mask.shape) == tuple(shape):
        valid = mask.numpy() != 0
    positions = fields.get("position_ids")
    begins = np.zeros(shape, bool)
    if positions is not None and tuple(positions.shape[-2:]) == tuple(shape):
        restart = positions.reshape(-1, *shape).abs().amax(0).numpy() == 0
        # Padding may have any position, and a sample behind padding begins with its first token.
        begins = restart & valid
    begins[np.arange(shape[0]), np.argmax(valid, axis=1)] = True
    numbers = np.cumsum((begins & valid).reshape(-1)) - 1
    return np.where(valid, numbers.reshape(shape), -1)


def _media(
    fields: Mapping[str, Tensor], ids: np.ndarray, owners: np.ndarray, count: int, config: Any
) -> tuple[Media, ...]:
    found = []
    for kind, key, grid_key, id_names in _MEDIA:
        pixels, grid = fields.get(key), fields.get(grid_key)
        if pixels is None or not len(pixels):
            continue
        sizes = np.ones(len(pixels), np.int64) if grid is None else grid.numpy().prod(axis=1).astype(np.int64)
        if int(sizes.sum()) != len(pixels):
            continue
        token = next((value for name in id_names if isinstance(value := getattr(config, name, None), int)), None)
        holders = owners[(ids == token) & (owners >= 0)] if token is not None else np.zeros(0, np.int64)
        wanted = np.bincount(holders, minlength=count) if len(holders) else np.zeros(count, np.int64)
        media_of = _share(sizes, wanted)
        places = np.zeros(len(sizes), np.int64)
        for sample in set(media_of.tolist()) - {-1}:
            places[media_of == sample] = np.arange((media_of == sample).sum())
        ratio = max(1, int(sizes.sum()) // max(1, len(holders)))
        found.append(Media(kind, key, sizes, media_of, places, ratio))
    return tuple(found)


def _share(sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the sample of each medium: each has as many tokens, in proportion to its size, as it fills."""
    total, tokens = int(sizes.sum()), int(wanted.sum())
    if not tokens:
        return np.full(len(sizes), 0 if len(wanted) == 1 else -1)
    middles = (np.cumsum(sizes) - sizes / 2) * (tokens / total)
    return np.searchsorted(np.cumsum(wanted), middles, side="right")


def _contents(
    fields: Mapping[str, Tensor],
    shape: tuple[int, ...],
    span: np.ndarray,
    sample: int,
    count: int,
    media: Sequence[Media],
) -> dict[str, str]:
    """Return the hash of each field of one sample."""
    contents = {}
    parts = torch.from_numpy(span)
    for name, value in fields.items():
        if name in _BOUNDS:
            continue
        medium = next((m for m in media if name in (m.key, f"{m.kind}_grid_thw")), None)
        if medium is not None:
            own = medium.owners == sample
            if not own.any():
                continue
            if name == medium.key:
                own = np.repeat(own, medium.sizes)
            contents[name] = _hash(value[torch.from_numpy(own)])
        elif tuple(value.shape[:2]) == tuple(shape):
            contents[name] = _hash(value.flatten(0, 1)[parts])
        elif value.ndim >= 2 and tuple(value.shape[-2:]) == tuple(shape):
            contents[name] = _hash(value.flatten(-2, -1)[..., parts])
        elif value.ndim and len(value) == count:
            contents[name] = _hash(value[sample])
    return contents


def _hash(value: Tensor) -> str:
    """Return the hash of a tensor's values and the shape of what a row of it is; integers count as int64."""
    wide = value.to(torch.float32 if value.is_floating_point() else torch.int64).contiguous()
    return xxhash.xxh64(wide.numpy().tobytes()).hexdigest()
