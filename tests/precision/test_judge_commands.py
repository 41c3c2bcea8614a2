"""The verbs that compare records, on the command line: what they print, the files they write, the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mindspeed_mm.precision.comparing.replays import replay_modules
from mindspeed_mm.precision.records.record import Record
from mindspeed_mm.precision.replaying.loss_replay import RULES, MicroBatch, explain_loss, logit_gradients
from mindspeed_mm.precision.selftest.faults import FAULTS
from mindspeed_mm.precision.selftest.model import Recipe, build, train
from tests.precision.command import run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference with two perturbed runs, and runs with another eps and another beta2."""
    root = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, recipe in {
        "reference": Recipe(),
        "noise1": Recipe(noise=1),
        "noise2": Recipe(noise=2),
        "eps": Recipe(**FAULTS["norm eps"].recipe),
        "beta2": Recipe(**FAULTS["beta2"].recipe),
        "means": Recipe(**FAULTS["mean of micro-batch means"].recipe),
        "no_tensors": Recipe(kept=()),
        "no_tensors_beta2": Recipe(**FAULTS["beta2"].recipe, kept=()),
    }.items():
        train(root / name, recipe)
    torch.set_num_threads(threads)
    return root


def test_band_and_compare(runs: Path, tmp_path: Path) -> None:
    reference, band = runs / "reference", tmp_path / "band.json"
    code, text = run("band", reference, runs / "noise1", runs / "noise2", "-o", band)
    assert code == 0 and "3 runs" in text
    code, text = run("compare", reference, runs / "eps", "--band", band, "--out", tmp_path)
    assert code == 1 and "step 0, forward, language_model.layers.0.input_layernorm: RMSNorm" in text
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["verdict"] == "not aligned" and verdict["findings"][0]["phase"] == "forward"
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert any(not row["in_band"] for row in rows) and rows[0]["in_band"]
    assert run("compare", reference, runs / "noise1", "--band", band)[0] == 0


def test_without_a_band_the_answer_says_so(runs: Path) -> None:
    code, text = run("compare", runs / "reference", runs / "noise1")
    assert code == 0 and text.startswith("aligned") and "note: no --band" in text


def test_what_cannot_be_judged(runs: Path, tmp_path: Path) -> None:
    assert run("compare", runs / "reference", tmp_path)[0] == 2
    assert run("band", runs / "reference")[0] == 2
    assert run("compare", runs / "reference", runs / "eps", "--band", tmp_path / "none.json")[0] == 2
    code, _ = run("replay", "module", runs / "no_tensors", runs / "eps", "--site", "*.norm")
    assert code == 2


def test_replay_of_the_optimizer(runs: Path) -> None:
    code, text = run("replay", "optimizer", runs / "reference", runs / "beta2")
    assert code == 1 and "beta2 is 0.999, in the reference 0.95" in text
    code, text = run("replay", "optimizer", runs / "reference", runs / "noise1", "--step", 1)
    assert code == 0 and "bit for bit" in text


def test_replay_of_the_loss(runs: Path) -> None:
    code, text = run("replay", "loss", runs / "reference", runs / "means")
    assert code == 1 and f"is the {RULES[1]} of the reference's logits" in text and f"is the {RULES[0]}" in text
    assert run("replay", "loss", runs / "reference", runs / "beta2")[0] == 0
    assert run("replay", "loss", runs / "no_tensors", runs / "means")[0] == 2


def test_the_optimizer_without_tensors(runs: Path) -> None:
    code, text = run("compare", runs / "no_tensors", runs / "no_tensors_beta2")
    assert code == 1 and "optimizer, beta2: beta2 is 0.999, in the reference 0.95" in text
    assert run("compare", runs / "no_tensors", runs / "reference")[0] == 0


def test_invariants_and_doctor(runs: Path) -> None:
    code, text = run("invariants", runs / "reference")
    assert code == 0 and text.startswith("aligned")
    code, text = run("doctor", runs / "reference", runs / "eps")
    assert code == 1 and "step 1 loss: Does the forward pass give the same loss? FAILS" in text
    assert "local norms" not in text


def test_replay_of_modules(runs: Path) -> None:
    step = Record.open(runs / "reference").step(0)
    sites = ["language_model.layers.0.input_layernorm", "language_model.layers.1.mlp", "visual.blocks.0"]
    verdict = replay_modules(build(), step, sites)
    assert not verdict.findings and len(verdict.table) >= 6
    wrong = build()
    FAULTS["norm eps"].recipe["change"](wrong)
    verdict = replay_modules(wrong, step, [*sites, "language_model.layers.0"])
    assert verdict.first is not None and verdict.first.site == sites[0]


@pytest.mark.slow
def test_selftest_of_one_fault() -> None:
    code, text = run("selftest", "--faults", "reordered")
    assert code == 0 and "1 of 1 answers are right" in text


def test_the_rule_of_a_loss_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (5, 9):
        logits = torch.randn(2, 12, 17, generator=generator)
        labels = torch.randint(0, 17, (2, 12), generator=generator)
        labels[:, length:] = -100
        labels[0, 3] = -100
        batches.append(MicroBatch(logits, labels))
    losses = [
        torch.nn.functional.cross_entropy(b.logits[:, :-1].flatten(0, 1), b.labels[:, 1:].flatten()) for b in batches
    ]
    means = float(torch.stack(losses).mean())
    assert [str(rule) for rule in explain_loss(batches, means)] == [RULES[1]]
    logits = torch.cat([b.logits for b in batches]).requires_grad_(True)
    labels = torch.cat([b.labels for b in batches])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert str(explain_loss(batches, float(loss.detach()))[0]) == RULES[0]
    unshifted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert "labels shifted by 0" in str(explain_loss(batches, float(unshifted.detach()))[0])
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(torch.cat(logit_gradients(batches)).float(), logits.grad, rtol=1e-5, atol=1e-7)
