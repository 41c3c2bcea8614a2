"""Muon against torch.optim.Muon, whole and sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mindspeed_mm.errors import UserError
from mindspeed_mm.optimizer import build_optimizer, build_param_groups, muon_matrices
from tests.ranks import RankPool

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has the first Muon")
OPTIONS: dict[str, Any] = dict(
    lr=0.02, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, momentum=0.9, ema_decay=0.5, selection="fused_adamw"
)


class Net(nn.Module):
    """An embedding, a wide, a tall and an odd matrix, a norm and a head; the sizes do not divide by two ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.wide = nn.Linear(6, 5)
        self.tall = nn.Linear(5, 17)
        self.one = nn.Linear(17, 1, bias=False)
        self.norm = nn.LayerNorm(17)
        self.lm_head = nn.Linear(17, 11, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.tall(self.wide(self.embedding(x)).tanh()))
        return self.lm_head(y) * self.one(y)


MATRICES = ["wide.weight", "tall.weight", "one.weight"]


def muon(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    groups = build_param_groups(model.named_parameters(), muon_matrices=muon_matrices(model))
    return build_optimizer(groups, name="muon", **{**OPTIONS, **options})


def reference(model: Net) -> list[torch.optim.Optimizer]:
    """Two optimizers of torch, with the groups made by hand."""
    parameters = dict(model.named_parameters())
    plain = [p for name, p in parameters.items() if p.ndim == 1]
    tables = [parameters["embedding.weight"], parameters["lm_head.weight"]]
    adam = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "fused": True}
    return [
        torch.optim.Muon(
            [parameters[name] for name in MATRICES], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([{"params": tables, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], **adam),
    ]


def batch(step: int, rows: slice = slice(None)) -> torch.Tensor:
    return torch.randint(11, (4, 3), generator=torch.Generator().manual_seed(step))[rows]


def steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], count: int = 4, rows: slice = slice(None)) -> None:
    for step in range(count):
        (model(batch(step, rows)) ** 2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@needs_muon
def test_the_update_is_torchs_muon_and_adamw_bit_for_bit() -> None:
    ours, theirs = Net(), Net()
    steps(ours, [muon(ours)])
    steps(theirs, reference(theirs))
    for (name, actual), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(actual, expected), name
        assert not torch.equal(actual, Net().get_parameter(name)), f"{name} did not move"


@needs_muon
def test_the_size_of_the_update_is_the_flags() -> None:
    before = Net().tall.weight.detach()
    sizes = []
    for rms in (0.2, 0.4):
        model = Net()
        steps(model, [muon(model, matched_adamw_rms=rms, weight_decay=0.0)], count=1)
        sizes.append((model.tall.weight.detach() - before).square().mean().sqrt().item())
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=1e-4)


def test_matrices_are_those_of_the_hidden_layers() -> None:
    model = Net()
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in muon_matrices(model)] == MATRICES


def test_the_output_embeddings_of_a_hugging_face_model_are_no_matrix() -> None:
    from tests.models.tiny import tiny_model

    model = tiny_model("qwen3")
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)].rpartition(".")[0].rpartition(".")[2] for p in muon_matrices(model)}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(UserError, match=r"torch \S+ has no Muon; install torch 2\.9"):
        muon(Net())


@needs_muon
def test_a_step_with_found_inf_changes_nothing() -> None:
    model = Net()
    optimizer = muon(model)
    steps(model, [optimizer], count=2)
    before = [p.detach().clone() for p in model.parameters()]
    buffer = optimizer.state[model.tall.weight]["momentum_buffer"].clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(optimizer.state[model.tall.weight]["momentum_buffer"], buffer)


def sharded_against_whole() -> dict[str, float]:
    """Give both models the same gradients, so that nothing but the optimizer can differ."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    sharded, whole = Net(), Net()
    fully_shard(sharded)
    optimizer, expected = muon(sharded), reference(whole)
    for step in range(3):
        (whole(batch(step)) ** 2).mean().backward()
        (sharded(batch(step)) ** 2).mean().backward()
        for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
            b.grad = a.grad.full_tensor()
        for each in (optimizer, *expected):
            each.step()
            each.zero_grad()
    dist.barrier()
    pairs = zip(sharded.named_parameters(), whole.parameters(), strict=True)
    return {name: (a.full_tensor() - b).abs().max().item() for (name, a), b in pairs}


@needs_muon
def test_sharded_matrices_are_orthogonalised_as_whole_ones(ranks2: RankPool) -> None:
    for differences in ranks2.run(sharded_against_whole):
        assert [differences.pop(name) for name in MATRICES] == [0.0, 0.0, 0.0]
        assert max(differences.values()) <= 1e-7  # AdamW's kernel rounds the last elements of a block otherwise
