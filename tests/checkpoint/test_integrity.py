"""A damaged checkpoint is found, named and never loaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from mindspeed_mm.checkpoint import manifest, store
from mindspeed_mm.checkpoint.digest import digest
from mindspeed_mm.checkpoint.integrity import inspect
from mindspeed_mm.checkpoint.publish import TRACKER
from mindspeed_mm.errors import UserError
from tests.checkpoint import small
from tests.ranks import RankPool

_MASK = (1 << 64) - 1


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def by_hand(tensor: torch.Tensor) -> int:
    """The digest's definition in Python's own integers."""
    total = 0
    for position, bits in enumerate(tensor.contiguous().view(torch.int32).flatten().tolist()):
        z = (position * 0x9E3779B97F4A7C15 + bits % (1 << 32)) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        total += z
    return total & _MASK


def test_a_digest_is_its_definition() -> None:
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert digest(tensor, tensor.shape, (0, 0)) == by_hand(tensor)
    swapped = tensor.flatten()[[1, 0, *range(2, 35)]].view(7, 5)
    assert digest(swapped, tensor.shape, (0, 0)) == by_hand(swapped) != by_hand(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex128])
def test_digests_of_parts_add_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_mm.checkpoint.digest._CHUNK", 7)
    full = torch.randn(7, 5, 6, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    cuts = [(0, 3, 3, 7), (0, 2, 5), (0, 6), (0, 1, 3)]  # an empty part among them
    total = 0
    for a, b in zip(cuts[0], cuts[0][1:], strict=False):
        for c, d in zip(cuts[1], cuts[1][1:], strict=False):
            for e, f in zip(cuts[3], cuts[3][1:], strict=False):
                total += digest(full[a:b, c:d, :, e:f], full.shape, (a, c, 0, e))
    assert total & _MASK == digest(full, full.shape, (0, 0, 0, 0))


def test_digests_do_not_depend_on_the_world_size(tmp_path: Path, ranks2: RankPool) -> None:
    ranks2.run(small.save_after, tmp_path / "two", 2)
    model, optim = small.build(1)
    store.load(tmp_path / "two", model=model, optimizer=optim)
    store.save(tmp_path / "one", 2, model=model, optimizer=optim, extra={}, rank_state={})
    one, two = (manifest.read(tmp_path / name / "iter_0000002") for name in ("one", "two"))
    assert one and two
    assert (one.world_size, two.world_size, one.iteration) == (1, 2, 2)
    assert one.tensors == two.tensors and len(one.tensors) > 20
    assert one.digests["model.embed.weight"] == by_hand(model.embed.weight.detach())
    assert one.tensors["model.embed.weight"].shape == [7, 5]


def test_a_hundred_flipped_bytes_are_found_and_none_is_loaded(tmp_path: Path) -> None:
    small.save_after(tmp_path, 1)
    path, rng = tmp_path / "iter_0000001", random.Random(0)
    files = sorted(path.iterdir())
    assert len(files) == 5 and inspect(path).good
    model, optim = small.build(1)
    for _ in range(100):
        file = rng.choice(files)
        before = file.read_bytes()
        flip(file, rng)
        (problem,) = inspect(path).problems
        assert file.name in problem
        with pytest.raises(UserError, match=file.name):
            store.load(tmp_path, model=model, optimizer=optim)
        file.write_bytes(before)
    assert store.load(tmp_path, model=model, optimizer=optim).warnings == []


def load_refused(folder: Path) -> str:
    model, optim = small.build(1)
    with pytest.raises(UserError) as error:
        store.load(folder, model=model, optimizer=optim)
    return str(error.value)


def test_ranks_share_the_check_and_all_refuse(tmp_path: Path, ranks2: RankPool) -> None:
    ranks2.run(small.save_after, tmp_path, 1)
    for name in ("__0_0.distcp", "__1_0.distcp", "rank_1.pt", "manifest.json"):
        file = tmp_path / "iter_0000001" / name
        before = file.read_bytes()
        flip(file, random.Random(1))
        one, other = ranks2.run(load_refused, tmp_path)
        assert one == other and name in one and "--load-fallback" in one
        file.write_bytes(before)
    (tmp_path / "iter_0000001" / "rank_0.pt").unlink()
    assert "rank_0.pt is missing" in ranks2.run(load_refused, tmp_path)[1]


def swapped_on_one_rank(folder: Path) -> str:
    from mindspeed_mm.checkpoint.tensors import local_part

    original = store.read_tensors

    def read_wrongly(tensors: dict[str, torch.Tensor], *args: object, **kwargs: object) -> None:
        original(tensors, *args, **kwargs)
        if torch.distributed.get_rank() == 1:
            part = local_part(tensors["model.embed.weight"])
            part.copy_(part.flip(0))

    store.read_tensors = read_wrongly
    try:
        return load_refused(folder)
    finally:
        store.read_tensors = original


def test_what_came_out_wrong_on_one_rank_is_noticed(tmp_path: Path, ranks2: RankPool) -> None:
    ranks2.run(small.save_after, tmp_path, 1)
    for text in ranks2.run(swapped_on_one_rank, tmp_path):
        assert "1 tensors came out other than they were saved" in text and text.endswith("\n  model.embed.weight")


def test_fallback_takes_the_newest_good_one_and_says_so(tmp_path: Path) -> None:
    saved = {step: small.save_after(tmp_path, step) for step in (1, 2, 3, 4)}
    flip(tmp_path / "iter_0000004" / "__0_0.distcp", random.Random(0))
    (tmp_path / "iter_0000003" / "state.pt").unlink()

    def check(step: int | None, expected: int, *refused: int) -> None:
        model, optim = small.build(1)
        loaded = store.load(tmp_path, model=model, optimizer=optim, step=step, fallback=True)
        small.assert_same(saved[expected], small.full_state(model, optim))
        assert loaded.iteration == expected and loaded.path.name == f"iter_{expected:07d}"
        assert all(f"iter_{n:07d}" in line for n, line in zip(refused, loaded.warnings, strict=False))
        assert len(loaded.warnings) == (len(refused) + 1 if refused else 0)
        assert not refused or loaded.warnings[-1] == f"loading {loaded.path} instead"

    check(None, 2, 4, 3)
    check(2, 2)
    check(3, 2, 3)
    (tmp_path / TRACKER).write_text("9")
    check(None, 2, 9, 4, 3)
    check(9, 2, 9, 4, 3)
    (tmp_path / TRACKER).write_bytes(b"\xb4")  # a "4" with a flipped bit
    with pytest.raises(UserError, match="neither an iteration nor"):
        store.load(tmp_path, model=small.build(1)[0], optimizer=None)
    model, optim = small.build(1)
    loaded = store.load(tmp_path, model=model, optimizer=optim, fallback=True)
    assert loaded.iteration == 2 and TRACKER in loaded.warnings[0]
    for file in ("iter_0000001", "iter_0000002"):
        flip(tmp_path / file / "manifest.json", random.Random(0))
    model, optim = small.build(1)
    with pytest.raises(UserError, match="There is no good one before it") as error:
        store.load(tmp_path, model=model, optimizer=optim, fallback=True)
    assert all(f"iter_{step:07d}" in str(error.value) for step in (1, 2, 3, 4))


def test_without_a_manifest_it_loads_with_one_line(tmp_path: Path) -> None:
    saved = small.save_after(tmp_path, 1)
    (tmp_path / "iter_0000001" / manifest.NAME).unlink()
    loaded, info = small.load_into_fresh(tmp_path)
    small.assert_same(saved, loaded)
    (line,) = info.warnings
    assert "has no manifest" in line and "cannot be verified" in line


def test_flips_in_an_index_without_a_manifest_are_problems_of_the_checkpoint(tmp_path: Path) -> None:
    small.save_after(tmp_path, 1)
    path, rng = tmp_path / "iter_0000001", random.Random(0)
    (path / manifest.NAME).unlink()
    before = (path / ".metadata").read_bytes()
    found = set()
    for _ in range(100):
        flip(path / ".metadata", rng)
        found.update(inspect(path).problems)
        (path / ".metadata").write_bytes(before)
    assert any(problem.startswith(".metadata is damaged: ") for problem in found)


def test_a_manifest_of_a_later_version_is_said(tmp_path: Path) -> None:
    small.save_after(tmp_path, 1)
    file = tmp_path / "iter_0000001" / manifest.NAME
    known = manifest.read(file.parent)
    assert known and set(known.versions) == {"mindspeed_mm", "torch", "transformers"}
    assert torch.__version__.startswith(known.versions["torch"])
    content = json.loads(file.read_bytes())
    assert content["format"] == 1 and next(iter(content)) == "checksum"
    manifest._FORMAT, current = 2, manifest._FORMAT
    try:
        manifest.write(file.parent, known)
    finally:
        manifest._FORMAT = current
    assert "later version" in inspect(file.parent).problems[0]
