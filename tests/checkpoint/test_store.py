from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mindspeed_mm.checkpoint import store
from mindspeed_mm.checkpoint.publish import TRACKER
from mindspeed_mm.checkpoint.tensor_index import read_index
from mindspeed_mm.errors import UserError
from tests.checkpoint import small
from tests.ranks import RankPool


@pytest.mark.parametrize("optimizer", ["adamw", "fused", "sgd", "ema"])
@pytest.mark.parametrize("steps", [0, 2])
def test_resume_is_bitwise_in_one_process(tmp_path: Path, optimizer: str, steps: int) -> None:
    small.resume(tmp_path, optimizer, steps, more=2)


@pytest.mark.parametrize("optimizer", ["fused", "sgd", "ema"])
def test_resume_is_bitwise_on_two_ranks(tmp_path: Path, ranks2: RankPool, optimizer: str) -> None:
    ranks2.run(small.resume, tmp_path, optimizer, 2, 2)


def test_never_stepped_parameters_stay_without_state(tmp_path: Path) -> None:
    saved = small.save_after(tmp_path, 2)
    assert "unused.step" not in saved and "embed.weight.step" in saved
    loaded, _ = small.load_into_fresh(tmp_path)
    small.assert_same(saved, loaded)


def test_another_world_size_takes_weights_and_optimizer(tmp_path: Path, ranks2: RankPool) -> None:
    on_two = ranks2.run(small.save_after, tmp_path / "two", 2)[0]
    alone, loaded = small.load_into_fresh(tmp_path / "two")
    small.assert_same(on_two, alone)
    assert loaded.iteration == 2 and loaded.rank_state is None

    alone = small.save_after(tmp_path / "one", 2)
    for on_two, loaded in ranks2.run(small.load_into_fresh, tmp_path / "one"):
        small.assert_same(alone, on_two)
        assert loaded.iteration == 2 and loaded.rank_state is None


def test_layout_and_tracker(tmp_path: Path, ranks2: RankPool) -> None:
    ranks2.run(small.save_after, tmp_path, 2)
    assert (tmp_path / TRACKER).read_text() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000002", TRACKER]
    names = sorted(p.name for p in (tmp_path / "iter_0000002").iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "rank_0.pt", "rank_1.pt", "state.pt"]
    keys = read_index(tmp_path / "iter_0000002").state_dict_metadata
    assert "model.embed.weight" in keys and "model.head.weight" not in keys, "a tied weight is saved once"
    assert "optimizer.state.body.0.weight.exp_avg" in keys


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_failed_save_leaves_what_was_there(tmp_path: Path, ranks2: RankPool, failing_rank: int) -> None:
    before = ranks2.run(small.save_after, tmp_path, 1)[0]
    for message in ranks2.run(small.failing_save, tmp_path, failing_rank):
        assert f"failed on rank {failing_rank}: TypeError: rank_{failing_rank}.handle is a object" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", TRACKER]
    small.assert_same(before, ranks2.run(small.load_into_fresh, tmp_path)[0][0])


def test_crash_leftovers(tmp_path: Path) -> None:
    saved = small.save_after(tmp_path, 1)
    (tmp_path / "iter_0000002.staging").mkdir()
    # As if killed while iteration 1 was being saved a second time.
    (tmp_path / "iter_0000001").rename(tmp_path / "iter_0000001.replaced")
    small.assert_same(saved, small.load_into_fresh(tmp_path)[0])
    small.save_after(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", "iter_0000002", TRACKER]
    small.save_after(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", "iter_0000002", TRACKER]


def test_find_says_what_is_there(tmp_path: Path) -> None:
    def message(folder: Path, step: int | None = None) -> str:
        with pytest.raises(UserError) as error:
            store.find(folder, step)
        return str(error.value)

    assert "no such folder" in message(tmp_path / "nowhere")
    assert "The folder is empty" in message(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "without --ckpt-step" in message(tmp_path)

    runs = tmp_path / "runs"
    small.save_after(runs / "a", 1)
    small.save_after(runs / "a", 2)
    assert store.find(runs / "a").name == "iter_0000002"
    assert store.find(runs / "a", step=1).name == "iter_0000001"
    assert store.find(runs / "a" / "iter_0000001").name == "iter_0000001"
    assert "Did you mean its folder a?" in message(runs)
    assert "iter_0000001, iter_0000002" in message(runs / "a", step=3)
    (runs / "a" / TRACKER).write_text("latest")
    assert "'latest' is neither an iteration nor 'release'" in message(runs / "a")
    (runs / "a" / TRACKER).unlink()
    assert "iter_0000001, iter_0000002" in message(runs / "a")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    small.save_after(tmp_path, 1)
    model, _ = small.build(1)
    model.unused = nn.Parameter(torch.ones(4))
    model.added = nn.Parameter(torch.ones(3))
    del model.frozen
    before = model.body[0].weight.clone()
    with pytest.raises(UserError) as error:
        store.load(tmp_path, model=model, optimizer=None)
    text = str(error.value)
    assert "1 weights missing from the checkpoint:\n  added" in text
    assert "2 weights in the checkpoint but not in the model:\n  frozen.bias\n  frozen.weight" in text
    assert "unused: saved (3,), model (4,)" in text and "--load-strict false" in text
    assert torch.equal(before, model.body[0].weight)

    loaded = store.load(tmp_path, model=model, optimizer=None, strict=False)
    assert len(loaded.warnings) == 3
    assert not torch.equal(before, model.body[0].weight)


def test_optimizer_that_does_not_fit(tmp_path: Path) -> None:
    small.save_after(tmp_path, 1)
    model, _ = small.build(1)
    params = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(UserError, match="2 parameter groups were saved, the optimizer has 1"):
        store.load(tmp_path, model=model, optimizer=torch.optim.AdamW(params))
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    with pytest.raises(UserError, match=r"the groups differ in\n  body.0.weight"):
        store.load(tmp_path, model=model, optimizer=torch.optim.AdamW(groups))


def test_weights_only(tmp_path: Path) -> None:
    small.save_after(tmp_path, 2)
    model, optim = small.build(1)
    fresh = small.full_state(model, optim)
    loaded = store.load(tmp_path, model=model, optimizer=optim, finetune=True)
    assert (loaded.iteration, loaded.extra, loaded.rank_state) == (0, {}, None)
    assert not optim.state and small.full_state(model, optim)["groups"] == fresh["groups"]
    assert not torch.equal(model.embed.weight, fresh["embed.weight"])

    store.save(tmp_path, 3, model=model, optimizer=None, extra={}, rank_state={})
    with pytest.raises(UserError, match="saved without optimizer state; pass --no-load-optim"):
        store.load(tmp_path, model=model, optimizer=optim)
    (tmp_path / "iter_0000003" / "manifest.json").unlink()
    (tmp_path / "iter_0000003" / "state.pt").unlink()
    with pytest.raises(UserError, match="another program wrote it; pass --finetune"):
        store.load(tmp_path, model=model, optimizer=None)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.pt"])
def test_without_a_manifest_a_short_file_is_still_named(tmp_path: Path, name: str) -> None:
    small.save_after(tmp_path, 1)
    (tmp_path / "iter_0000001" / "manifest.json").unlink()
    file = tmp_path / "iter_0000001" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    model, optim = small.build(1)
    with pytest.raises(UserError, match=name):
        store.load(tmp_path, model=model, optimizer=optim)


def test_random_state_comes_back_as_it_was(tmp_path: Path) -> None:
    model, _ = small.build(0)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    state = small.rank_state()
    store.save(tmp_path, 1, model=model, optimizer=None, extra={}, rank_state=state)
    expected = (random.random(), np.random.rand(), torch.rand(1))
    back = store.load(tmp_path, model=model, optimizer=None).rank_state
    assert back is not None
    random.setstate(back["python"]), np.random.set_state(back["numpy"]), torch.set_rng_state(back["torch"])
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_recompute_wrappers_do_not_change_names(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    saved = small.save_after(tmp_path, 1)
    model, _ = small.build(1)
    model.body[0] = checkpoint_wrapper(model.body[0])
    groups = [[p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == wide] for wide in (True, False)]
    optim = torch.optim.AdamW([{"params": g} for g in groups])
    store.load(tmp_path, model=model, optimizer=optim)
    assert torch.equal(model.body[0].weight, saved["body.0.weight"])
    shutil.rmtree(tmp_path)
    store.save(tmp_path, 1, model=model, optimizer=optim, extra={}, rank_state={})
    small.assert_same(saved, small.load_into_fresh(tmp_path)[0])
