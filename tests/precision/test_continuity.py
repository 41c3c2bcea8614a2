"""What steps start from and hand on, in a plain loop: writes between steps, lost state, stopped gradients, padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_mm.precision import Recorder
from mindspeed_mm.precision.comparing.compare import compare
from mindspeed_mm.precision.finding import Finding
from mindspeed_mm.precision.records.record import Record
from tests.models.tiny import tiny_batch, tiny_model

STEPS, LENGTH, PADDING = 3, 12, 4
UP = "model.layers.0.mlp.up_proj"


def batch_of(step: int, left: bool) -> dict[str, Tensor]:
    """Return two samples, one of them padded on the left or on the right."""
    batch = tiny_batch("qwen3", [0, 0], length=LENGTH, seed=step)
    batch["labels"][:, 0] = -100  # nothing comes before it
    for name, value in batch.items():
        value[1, -PADDING:] = -100 if name == "labels" else 0
        value[1] = value[1].roll(PADDING) if left else value[1]
    return batch


def train(
    folder: Path,
    *,
    model: Callable[[Any], Any] = lambda model: None,
    behind: Callable[[int, Any, Any], Any] = lambda step, model, optimizer: None,
    optimizer: Any = torch.optim.AdamW,
    left: bool = False,
    tensors: tuple[str, ...] = (),
    begins: tuple[int, Any] | None = None,
) -> tuple[Record, Any]:
    """Train with an accident and return the record, and the state with which it ends.

    Args:
        folder: of the record.
        model: changes the model.
        behind: called behind each step.
        optimizer: its class.
        left: where to pad.
        tensors: to keep.
        begins: step and state to resume from.
    """
    net = tiny_model("qwen3", layers=1)
    model(net)
    made = optimizer(net.parameters(), lr=1e-2, betas=(0.9, 0.95))
    recorder = Recorder(folder, steps=range(STEPS), tensors=tensors)
    first = 0
    if begins is not None:
        first, (weights, state) = begins
        net.load_state_dict(weights)
        made.load_state_dict(state)
    recorder.attach(net, made, first)
    for step in range(first, STEPS):
        net(**batch_of(step, left), use_cache=False).loss.backward()
        made.step()
        made.zero_grad()
        behind(step, net, made)
    return Record.open(folder), (net.state_dict(), made.state_dict())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Record]:
    @cache
    def get(*tensors: str) -> Record:
        return train(tmp_path_factory.mktemp("reference"), tensors=tensors)[0]

    return get


def place(found: Finding | None) -> tuple[int | None, str, str] | None:
    return found and (found.step, found.phase, found.site)


class Child(torch.optim.AdamW):
    """Hooks of a step run for each class whose ``step`` is called."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Skips(Child):
    """Leaves its last parameter as it is."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        last = self.param_groups[0]["params"][-1]
        before = last.clone()
        super().step()
        last.copy_(before)


def test_the_step_of_a_class_that_calls_its_parents_is_one(reference: Any, tmp_path: Path) -> None:
    found, _ = train(tmp_path, optimizer=Child)
    assert found.steps == [0, 1, 2]
    assert compare(reference(), found).first is None


def test_a_write_between_two_steps_is_no_matter_of_modules(reference: Any, tmp_path: Path) -> None:
    @torch.no_grad()
    def average(step: int, net: Any, optimizer: Any) -> None:
        if step == 0:
            net.get_submodule(UP).weight.mul_(0.99)

    verdict = compare(reference(), train(tmp_path, behind=average)[0])
    assert place(verdict.first) == (1, "weights", f"{UP}.weight")


@pytest.mark.parametrize("tensors", [(), ("*",)])
def test_a_parameter_that_is_not_updated_is_named(tensors: tuple[str, ...], reference: Any, tmp_path: Path) -> None:
    verdict = compare(reference(*tensors), train(tmp_path, optimizer=Skips, tensors=tensors)[0])
    assert place(verdict.first) == (0, "optimizer", "update of lm_head.weight")


@pytest.mark.parametrize("tensors", [(), ("*",)])
def test_a_state_that_is_lost_is_named_where_it_is_lost(
    tensors: tuple[str, ...], reference: Any, tmp_path: Path
) -> None:
    def lose(step: int, net: Any, optimizer: Any) -> None:
        if step == 0:
            optimizer.state[net.get_submodule(UP).weight]["exp_avg"].zero_()

    verdict = compare(reference(*tensors), train(tmp_path, behind=lose, tensors=tensors)[0])
    assert place(verdict.first) == (1, "optimizer", f"exp_avg of {UP}.weight")


def test_a_resume_starts_with_the_state_that_was_saved(reference: Any, tmp_path: Path) -> None:
    saved: list[Any] = []

    def save(step: int, net: Any, optimizer: Any) -> None:
        if step == 0:
            torch.save((net.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")

    train(tmp_path / "whole", behind=save)
    for name in ("kept", "one lost", "all lost"):
        weights, state = torch.load(tmp_path / "saved.pt")
        if name == "one lost":
            state["state"][0]["exp_avg_sq"].mul_(4)
        elif name == "all lost":
            state["state"] = {}
        verdict = compare(reference(), train(tmp_path / name, begins=(1, (weights, state)))[0])
        saved.append(place(verdict.first))
    embedding = "exp_avg_sq of model.embed_tokens.weight"
    assert saved == [None, (1, "optimizer", embedding), (1, "optimizer", "step")]


def test_the_place_where_a_gradient_stops_is_named(reference: Any, tmp_path: Path) -> None:
    def cut(net: Any) -> None:
        up = net.get_submodule(UP)
        original = up.forward
        up.forward = lambda x: original(x.detach())

    verdict = compare(reference(), train(tmp_path, model=cut)[0])
    assert place(verdict.first) == (0, "backward", UP)
    assert verdict.first is not None and "no gradient arrives" in verdict.first.evidence


def test_padding_on_the_other_side_is_no_finding(reference: Any, tmp_path: Path) -> None:
    """All positions of a sample are shifted, and so are its rotary angles; attention sees differences only."""
    verdict = compare(reference(), train(tmp_path / "left", left=True)[0])
    assert verdict.first is None
    assert any("rotary_emb" in note for note in verdict.notes)


def test_padding_on_the_other_side_hides_nothing(reference: Any, tmp_path: Path) -> None:
    def scaled(net: Any) -> None:
        down = net.model.layers[0].mlp.down_proj
        original = down.forward
        down.forward = lambda x: original(x) * 1.01

    verdict = compare(reference(), train(tmp_path / "left", left=True, model=scaled)[0])
    assert place(verdict.first) == (0, "forward", "model.layers.0.mlp.down_proj")
