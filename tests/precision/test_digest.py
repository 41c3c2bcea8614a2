"""Sketches: what they add up to, and how far two tensors are apart by them. The oracles are loops and torch's norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mindspeed_mm.precision.recording.digest import digest, hashes, mix, unnoticed
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.records.record import Key, RankStep, Record, RecordWriter
from mindspeed_mm.precision.records.sketch import SIZE, Sketch, distance
from tests.ranks import RankPool

KEY = Key("weights", "w", "parameter")


def sketch(value: Tensor, offset: Sequence[int] | None = None) -> Tensor:
    with unnoticed(value.device):
        return digest(value, None, offset)


def by_hand(value: Tensor) -> np.ndarray:
    """Return the sketch's vector as its definition says, element by element, in float64."""
    signs = [hashes(int(mix(np.array(value.ndim - i))), np.arange(size)) for i, size in enumerate(value.shape)]
    vector = np.zeros(SIZE)
    for index in np.ndindex(*value.shape):
        bits = 0
        for dimension, place in enumerate(index):
            bits ^= int(signs[dimension][place])
        vector += float(value[index]) * np.array([1 - 2 * (bits >> j & 1) for j in range(SIZE)])
    return vector


@pytest.mark.parametrize("shape", [(), (7,), (3, 200), (200, 3), (5, 4, 3), (2, 3, 2, 5), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_digest_is_what_its_definition_says(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 5).to(dtype)
    found = sketch(value)
    exact = value.double()
    assert found[:SIZE].numpy() == pytest.approx(by_hand(value), abs=1e-5 * float(exact.norm()) + 1e-12)
    if value.numel():
        facts = [exact.sum(), exact.square().sum(), exact.max(), exact.min()]
        assert found[SIZE:-1].tolist() == pytest.approx([float(fact) for fact in facts], rel=1e-5, abs=1e-4)


def test_parts_add_up_and_an_exchange_of_rows_shows() -> None:
    value = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    whole = sketch(value)
    parts = sketch(value[:23], [0, 0]) + sketch(value[23:, :7], [23, 0]) + sketch(value[23:, 7:], [23, 7])
    assert float((parts - whole)[:SIZE].norm() / whole[:SIZE].norm()) < 1e-6
    exchanged = sketch(value[torch.randperm(64, generator=torch.Generator().manual_seed(2))])
    assert float((exchanged - whole)[:SIZE].norm() / whole[:SIZE].norm()) > 1


def test_autocast_and_lower_precision_do_not_reach_a_digest() -> None:
    value = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = sketch(value)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sketch(value), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_noticed(bad: float) -> None:
    value = torch.zeros(6, 256)
    assert sketch(value)[-1] == 0
    value[1, 2], value[1, 3], value[4, 0] = bad, 1.0, bad
    assert sketch(value)[-1] >= 2
    assert distance(of(value), of(torch.zeros(6, 256))).relative == float("inf")


def of(value: Tensor) -> Sketch:
    pool = StepPool()
    pool.add_whole(KEY, value)
    return pool.read()[KEY]


def test_the_distance_estimates_that_of_the_tensors() -> None:
    ratios = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(40, 30, generator=generator)
        b = a + 1e-3 * torch.randn(40, 30, generator=generator)
        apart = distance(of(a), of(b))
        ratios.append(apart.relative / float((a - b).norm() / b.norm()))
        assert apart.norm_gap == pytest.approx(abs(float(a.norm() - b.norm())) / float(b.norm()), abs=3e-7)
    assert np.quantile(ratios, 0.05) > 0.7 and np.quantile(ratios, 0.95) < 1.35
    assert np.mean(np.square(ratios)) == pytest.approx(1, abs=0.15)
    assert distance(of(torch.ones(3)), of(torch.zeros(3))).relative == float("inf")
    assert distance(of(torch.zeros(3)), of(torch.zeros(3))).relative == 0


def write_placed(folder: str) -> None:
    """Write one step with a tensor in every placement, each rank its part."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("all",))
    pool = StepPool()
    value = torch.randn(7, 9, 5, generator=torch.Generator().manual_seed(0))
    placements: dict[str, Any] = {f"shard {dim}": Shard(dim) for dim in range(3)} | {"replicate": Replicate()}
    for name, placement in placements.items():
        pool.add_whole(Key("weights", name, "parameter"), distribute_tensor(value, mesh, [placement]))
    part = torch.randn(7, 9, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    partial = DTensor.from_local(part, mesh, [Partial()])
    pool.add_whole(Key("grad_local", "partial", "gradient"), partial, summed=True)
    if world % 2 == 0:
        grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        both = distribute_tensor(value, grid, [Replicate(), Shard(0)])
        pool.add_whole(Key("weights", "hsdp", "parameter"), both)
        pool.add_whole(Key("weights", "grid", "parameter"), distribute_tensor(value, grid, [Shard(1), Shard(0)]))
    pool.add_whole(Key("weights", "plain", "parameter"), value)
    RecordWriter(folder, dist.get_rank(), world).write(0, RankStep(entries=pool.read()))


def test_what_collectives_bring_is_told_apart_though_it_has_no_address() -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    pool = StepPool()
    values = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    wrapped = [AsyncCollectiveTensor(value) for value in values]
    assert {tensor.data_ptr() for tensor in wrapped} == {0}
    for name, tensor in zip("ab", wrapped, strict=True):
        pool.add(Key("forward", name, "output.0"), tensor)
    entries = pool.read()
    for name, value in zip("ab", values, strict=True):
        assert distance(entries[Key("forward", name, "output.0")], of(value)).relative < 1e-6


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_placement_has_the_sketch_of_the_full_tensor(world: int, tmp_path: Any, ranks2: RankPool) -> None:
    RecordWriter(tmp_path, 0, world).start({})
    pool = ranks2 if world == 2 else RankPool(world)
    pool.run(write_placed, str(tmp_path))
    if world != 2:
        pool.stop()
    value = torch.randn(7, 9, 5, generator=torch.Generator().manual_seed(0))
    total = sum(torch.randn(7, 9, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(world))
    assert isinstance(total, Tensor)
    entries = Record.open(tmp_path).step(0).entries
    assert len(entries) == 8
    for key, found in entries.items():
        expected = of(total if key.site == "partial" else value)
        apart = distance(found, expected)
        assert apart.relative < 1e-6, key
        assert found.shape == expected.shape == (7, 9, 5), key
        if not found.estimated:
            assert apart.norm_gap < 1e-6, key
            assert (found.count, found.maximum, found.minimum) == (315, expected.maximum, expected.minimum)
