"""A run goes on with another number of ranks and another sharding: the state is the same, the losses are."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from mindspeed_mm.checkpoint import manifest, store
from mindspeed_mm.errors import UserError
from tests.checkpoint import small
from tests.ranks import RankPool

STEPS, MORE = 3, 3


def save(folder: Path, replicas: int = 0) -> None:
    model, optim = small.build(0, replicas=replicas)
    small.train(model, optim, range(STEPS))
    store.save(folder, STEPS, model=model, optimizer=optim, extra={}, rank_state={})


def go_on(folder: Path, again: Path, replicas: int = 0) -> list[float]:
    """Load, save at once under another name, go on and return the losses."""
    model, optim = small.build(1, replicas=replicas)
    loaded = store.load(folder, model=model, optimizer=optim)
    store.save(again, loaded.iteration, model=model, optimizer=optim, extra=loaded.extra, rank_state={})
    return small.train(model, optim, range(STEPS, STEPS + MORE))


def alone() -> list[float]:
    """The losses of the steps after the save, of plain PyTorch in one process that never stopped."""
    model, optim = small.build(0)
    return small.train(model, optim, range(STEPS + MORE))[STEPS:]


def check(folder: Path, again: Path, losses: list[float]) -> None:
    before, after = (manifest.read(path / f"iter_{STEPS:07d}") for path in (folder, again))
    assert before and after and before.tensors == after.tensors
    assert losses == pytest.approx(alone(), abs=1e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("saved_by", "replicas", "loaded_by", "other_replicas"),
    [(2, 0, 1, 0), (1, 0, 2, 0), (2, 0, 2, 2), (2, 2, 2, 0), (2, 2, 1, 0)],
    ids=["2-to-1", "1-to-2", "fsdp-to-hsdp", "hsdp-to-fsdp", "hsdp-to-1"],
)
def test_another_layout(
    saved_by: int,
    replicas: int,
    loaded_by: int,
    other_replicas: int,
    ranks1: RankPool,
    ranks2: RankPool,
    tmp_path: Path,
) -> None:
    pools = {1: ranks1, 2: ranks2}
    pools[saved_by].run(save, tmp_path / "a", replicas)
    for losses in pools[loaded_by].run(go_on, tmp_path / "a", tmp_path / "b", other_replicas):
        check(tmp_path / "a", tmp_path / "b", losses)


@pytest.mark.slow
def test_four_ranks(ranks2: RankPool, tmp_path: Path) -> None:
    four = RankPool(4)
    try:
        four.run(save, tmp_path / "four")
        four.run(save, tmp_path / "twice two", 2)
        four.run(go_on, tmp_path / "four", tmp_path / "to twice two", 2)
    finally:
        four.stop()
    for name in ("four", "twice two", "to twice two"):
        for losses in ranks2.run(go_on, tmp_path / name, tmp_path / f"{name} by two"):
            check(tmp_path / name, tmp_path / f"{name} by two", losses)


class Wrapped(nn.Module):
    """As `TransformersModel` does, keeps a model with a language model in its attribute ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.model = small.Small()
        self.model.lm_head = nn.Linear(5, 7, bias=False)
        self.model.lm_head.weight = self.model.model.embed.weight


def test_a_checkpoint_of_the_documented_layout_that_is_not_ours(tmp_path: Path) -> None:
    """Both names of tied weights, an ``_extra_state``, optimizer and arguments beside them, and no file of ours."""
    torch.manual_seed(0)
    theirs = Wrapped()
    optim = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad])
    theirs.model.model(torch.arange(6).view(2, 3)).mean().backward()
    optim.step()
    state = {
        "model": {**theirs.state_dict(), "model.lm_head._extra_state": b"x"},
        "optimizer": get_optimizer_state_dict(theirs, optim),
        "args": Namespace(lr=1.0),
        "checkpoint_version": 3.0,
        "iteration": 100,
    }
    dcp.save(state, checkpoint_id=tmp_path / "iter_0000100")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    names = dcp.FileSystemReader(tmp_path / "iter_0000100").read_metadata().state_dict_metadata
    assert {"model.model.model.embed.weight", "model.model.lm_head.weight"} <= names.keys()

    ours = Wrapped()
    loaded = store.load(tmp_path, model=ours, optimizer=None, finetune=True)
    assert loaded.iteration == 0 and len(loaded.warnings) == 1 and "cannot be verified" in loaded.warnings[0]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    with pytest.raises(UserError, match="pass --finetune"):
        store.load(tmp_path, model=Wrapped(), optimizer=None)
    with pytest.raises(UserError, match=r"weights missing from the checkpoint:\n  unused"):
        store.load(tmp_path, model=small.Small(), optimizer=None, finetune=True)
