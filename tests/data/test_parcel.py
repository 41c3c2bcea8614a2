from __future__ import annotations

import pickle

import torch

from mindspeed_mm.data.loaders import MultiModalDataLoader
from mindspeed_mm.data.parcel import Parcel


def nested() -> dict:
    return {
        "ids": torch.arange(15).reshape(3, 5),
        "transposed": torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T,
        "half": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "list": [torch.ones(2, dtype=torch.uint8), {"deep": torch.tensor([3.0])}, "text"],
        "tuple": (torch.zeros(1), None),
        "number": 5,
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_batch_comes_out_as_it_went_in() -> None:
    out = pickle.loads(pickle.dumps(Parcel(nested()))).unpack()
    assert same(nested(), out)
    out["ids"].zero_()
    out["list"][1]["deep"] += 1
    assert same({key: value for key, value in nested().items() if key not in ("ids", "list")},
                {key: value for key, value in out.items() if key not in ("ids", "list")})  # fmt: skip


def test_batches_of_workers_are_those_of_the_process_itself() -> None:
    samples = [{"x": torch.full((3,), i), "y": [torch.tensor(i / 7)]} for i in range(4)]

    def collate(rows: list[dict]) -> dict:
        return {"x": torch.stack([row["x"] for row in rows]), "y": [row["y"][0] for row in rows], "n": len(rows)}

    batches = [[0, 1], [2, 3]]
    own, from_worker = (list(MultiModalDataLoader(samples, batches, collate, num_workers=n)) for n in (0, 1))
    assert same(own, from_worker)
    storages = {from_worker[0]["x"].untyped_storage().data_ptr(), from_worker[0]["y"][1].untyped_storage().data_ptr()}
    assert len(storages) == 1, "they were sent one by one"
