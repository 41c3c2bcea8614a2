"""An activation has one sketch, however its samples lie in the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_mm.precision.recording.batch import read_batch
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.rows import BatchRows
from mindspeed_mm.precision.records.record import Key
from mindspeed_mm.precision.records.sketch import Sketch, distance

KEY = Key("forward", "m", "output.0")
CONFIG = SimpleNamespace(image_token_id=99)
WIDTH = 24
LENGTHS = (5, 16, 9, 12)
CPU = torch.device("cpu")


def samples() -> tuple[list[Tensor], list[Tensor]]:
    """Return the tokens of four samples and a row of numbers for each token."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 50, (length,), generator=generator) for length in LENGTHS]
    return ids, [torch.randn(length, WIDTH, generator=generator) for length in LENGTHS]


def add(pool: StepPool, batch: Any, value: Tensor, vision: bool = False) -> str:
    rows = BatchRows(read_batch(batch, CONFIG), CPU)
    found = rows.of(value.shape, vision=vision)
    pool.add(KEY, value, rows, found)
    return found.kind if found else "index"


def padded(order: list[int], side: str = "right", length: int = 18) -> tuple[dict[str, Tensor], Tensor]:
    ids, rows = samples()
    batch = {name: torch.zeros(len(order), length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    value = torch.full((len(order), length, WIDTH), float("nan"))  # what padding holds is nobody's business
    for row, sample in enumerate(order):
        count = LENGTHS[sample]
        place = slice(0, count) if side == "right" else slice(length - count, length)
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids[sample], 1
        value[row, place] = rows[sample]
    return batch, value


def packed(order: list[int], *, how: str) -> tuple[dict[str, Tensor], Tensor]:
    ids, rows = samples()
    batch = {"input_ids": torch.cat([*(ids[i] for i in order), torch.zeros(3, dtype=torch.long)])[None]}
    lengths = [LENGTHS[i] for i in order]
    if how == "cu_seqlens":
        batch["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    else:
        batch["position_ids"] = torch.cat([torch.arange(length) for length in [*lengths, 3]])[None]
        batch["attention_mask"] = torch.tensor([1] * sum(lengths) + [0] * 3)[None]
        if how == "three positions":
            batch["position_ids"] = batch["position_ids"].expand(3, 1, -1)
    return batch, torch.cat([*(rows[i] for i in order), torch.full((3, WIDTH), 7.0)])[None]


def reference() -> Sketch:
    pool = StepPool()
    ids, rows = samples()
    for tokens, value in zip(ids, rows, strict=True):
        assert add(pool, {"input_ids": tokens[None]}, value[None]) == "token"
    return pool.read()[KEY]


def transposed(batch: dict[str, Tensor], value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return batch, value.transpose(0, 1)


def flat(batch: dict[str, Tensor], value: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return batch, value.flatten(0, 1)


LAYOUTS = {
    "padded": [padded([0, 1, 2, 3])],
    "padded on the left": [padded([0, 1, 2, 3], "left")],
    "two micro-batches in another order": [padded([2, 0]), padded([3, 1], "left", 20)],
    "sequence first": [transposed(*padded([3, 2, 1, 0]))],
    "flat": [flat(*padded([3, 2, 1, 0]))],
    "packed": [packed([2, 3, 0, 1], how="cu_seqlens")],
    "packed in two": [packed([2, 3], how="cu_seqlens"), packed([1, 0], how="cu_seqlens")],
    "packed by positions": [packed([2, 3, 0, 1], how="positions")],
    "packed by three positions": [packed([2, 3, 0, 1], how="three positions")],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_are_told_apart_by_sample_and_place(name: str) -> None:
    pool = StepPool()
    for batch, value in LAYOUTS[name]:
        assert add(pool, batch, value) == "token"
    found, expected = pool.read()[KEY], reference()
    assert distance(found, expected).relative < 1e-6 and distance(found, expected).norm_gap < 1e-6
    assert found.shape == (sum(LENGTHS), WIDTH) and found.count == expected.count and not found.nonfinite
    assert found.maximum == expected.maximum


def test_two_tokens_in_each_others_place_show() -> None:
    batch, value = padded([0, 1, 2, 3])
    value[1, [3, 4]] = value[1, [4, 3]]
    pool = StepPool()
    add(pool, batch, value)
    assert distance(pool.read()[KEY], reference()).relative > 0.1


def test_what_all_samples_share_counts_for_each() -> None:
    """Cosines of (1, S, D) in a batch of four are those of (4, S, D)."""
    batch, value = padded([0, 1, 2, 3])
    shared = torch.randn(1, value.shape[1], 8, generator=torch.Generator().manual_seed(3))
    found = []
    for tensor in (shared, shared.expand(4, -1, -1).clone()):
        pool = StepPool()
        add(pool, batch, tensor)
        found.append(pool.read()[KEY])
    assert distance(*found).relative < 1e-6 and found[0].count == found[1].count


def with_images(parts: list[list[int]]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return samples with images of 16, 4 and 16 patches, and patches and merged patches of width 6."""
    tokens = {0: [7, 99, 99, 99, 99, 8, 99], 1: [5, 6], 2: [99, 99, 99, 99, 3]}
    sizes, grids = {0: [16, 4], 1: [], 2: [16]}, {16: [1, 4, 4], 4: [1, 2, 2]}
    generator = torch.Generator().manual_seed(0)
    pixels = {key: torch.randn(sum(size), 6, generator=generator) for key, size in sizes.items()}
    (part,) = parts
    length = 8
    ids = torch.zeros(len(part), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(part):
        ids[row, : len(tokens[sample])], mask[row, : len(tokens[sample])] = torch.tensor(tokens[sample]), 1
    value = torch.cat([pixels[sample] for sample in part])
    grid = torch.tensor([grids[size] for sample in part for size in sizes[sample]]).reshape(-1, 3)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": value, "image_grid_thw": grid}
    return batch, value, value.unflatten(0, (-1, 4)).sum(1)


@pytest.mark.parametrize("merged", [False, True])
def test_patches_are_told_apart_by_sample_and_image(merged: bool) -> None:
    sketches = []
    for split in ([[0, 1, 2]], [[2], [1, 0]]):
        pool = StepPool()
        for part in split:
            batch, patches, tokens = with_images([part])
            assert add(pool, batch, tokens if merged else patches, vision=True) == "patch"
        sketches.append(pool.read()[KEY])
    assert distance(*sketches).relative < 1e-6 and sketches[0].count == sketches[1].count
    batch, patches, tokens = with_images([[0, 1, 2]])
    pool = StepPool()
    add(pool, batch, (tokens if merged else patches).flip(0), vision=True)
    assert distance(pool.read()[KEY], sketches[0]).relative > 0.5


def test_a_batch_of_unknown_names_has_a_sample_in_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, label, value = (torch.randn(4, n, generator=generator) for n in (3, 1, 10))
    sketches = []
    for split in ([[0, 1, 2, 3]], [[3, 1], [0], [2]]):
        pool = StepPool()
        for part in split:
            assert add(pool, {"noise": noise[part], "label": label[part]}, value[part]) == "sample"
        sketches.append(pool.read()[KEY])
    assert distance(*sketches).relative < 1e-6
