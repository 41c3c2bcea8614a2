"""data-diff and state-diff: what happened to samples, weights and optimizer states."""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mindspeed_mm.precision.comparing.data_diff import Placed, judge_data
from mindspeed_mm.precision.records.record import Key, RankStep, RecordWriter, SampleFingerprint
from tests.precision.command import run

PER_STEP = 4


def samples(count: int = 40, seed: int = 0) -> list[SampleFingerprint]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        tokens = tuple(rng.randrange(100) for _ in range(20))
        fields = {"input_ids": f"t{hash(tokens)}", "labels": f"l{hash(tokens)}", "pixel_values": f"p{hash(tokens)}"}
        found.append(SampleFingerprint(f"{hash(tokens):x}", fields, tokens=tokens))
    return found


def in_steps(found: list[SampleFingerprint]) -> list[Placed]:
    return [Placed(place // PER_STEP, place, sample) for place, sample in enumerate(found)]


def shuffled_within_steps(found: list[SampleFingerprint]) -> list[SampleFingerprint]:
    return [found[i // PER_STEP * PER_STEP + (i + 1) % PER_STEP] for i in range(len(found))]


def changed_field(name: str) -> Callable[[list[SampleFingerprint]], list[SampleFingerprint]]:
    def change(found: list[SampleFingerprint]) -> list[SampleFingerprint]:
        found = copy.deepcopy(found)
        found[13].fields[name] = "other"
        return found

    return change


def changed_token(found: list[SampleFingerprint]) -> list[SampleFingerprint]:
    old = found[21]
    tokens = (*old.tokens[:7], 99, *old.tokens[8:])
    return [*found[:21], SampleFingerprint("new", {"input_ids": "new"}, tokens=tokens), *found[22:]]


@pytest.mark.parametrize(
    ("change", "site", "step", "words"),
    [
        (lambda found: found, None, None, ""),
        (shuffled_within_steps, None, None, "another order within a global batch"),
        (lambda found: found[3:] + found[:3], "order", 0, "3 samples earlier"),
        (lambda found: [*samples(8, seed=9), *found[:-8]], "order", 0, "8 samples, 2 steps later"),
        (lambda found: [found[0], *reversed(found[1:])], "order", 0, "all samples are there, but in other steps"),
        (lambda found: found[:-5], "missing", 8, "5 samples of the reference are missing, the last ones"),
        (lambda found: [*found[:9], found[2], *found[10:]], "duplicates", 0, "more often"),
        (changed_field("labels"), "labels", 3, "labels of 1 samples differs though their tokens are the same"),
        (changed_field("pixel_values"), "pixel_values", 3, "pixel_values of 1 samples"),
        (changed_token, "samples", 5, "1 of 40 samples are not the reference's"),
    ],
    ids=["same", "reordered", "earlier", "later", "shuffled", "missing", "twice", "labels", "pixels", "token"],
)
def test_what_happened_to_the_samples(
    change: Callable[[list[SampleFingerprint]], list[SampleFingerprint]], site: str | None, step: int, words: str
) -> None:
    reference = samples()
    verdict = judge_data(in_steps(reference), in_steps(change(reference)))
    assert verdict.exit_code == (1 if site else 0)
    assert (verdict.first.site if verdict.first else None) == site
    if verdict.first:
        assert verdict.first.step == step and words in verdict.first.evidence
    else:
        assert words in " ".join(verdict.notes)


def test_the_place_of_a_changed_token_is_shown_as_text() -> None:
    reference = samples()
    other = changed_token(reference)
    verdict = judge_data(in_steps(reference), in_steps(other), lambda ids: "".join(chr(65 + i % 26) for i in ids))
    found = next(finding for finding in verdict.findings if finding.site == "input_ids")
    assert "from number 7 on" in found.evidence
    expected = "".join(chr(65 + i % 26) for i in other[21].tokens[:15])
    assert repr(expected) in found.evidence


def write_record(folder: Path, found: list[SampleFingerprint]) -> Path:
    writer = RecordWriter(folder)
    writer.start({})
    for step in range(len(found) // PER_STEP):
        writer.write(step, RankStep(samples=found[step * PER_STEP : (step + 1) * PER_STEP]))
    return folder


def test_the_command_compares_records(tmp_path: Path) -> None:
    reference = write_record(tmp_path / "a", samples())
    other = write_record(tmp_path / "b", samples()[4:])
    assert run("data-diff", reference, reference)[0] == 0
    code, text = run("data-diff", reference, other)
    assert code == 1 and "4 samples, 1 steps earlier" in text
    assert run("data-diff", reference, tmp_path / "none")[0] == 2
    assert run("data-diff", reference, write_record(tmp_path / "empty", []))[0] == 2


# Weights as Megatron saves them, cut by hand.

LAYERS, HIDDEN, FFN = 4, 8, 12


def whole(layers: range) -> dict[str, torch.Tensor]:
    tensors = {}
    for number, layer in enumerate(layers):
        rng = torch.Generator().manual_seed(layer)
        prefix = f"decoder.layers.{number}."
        shapes = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attention.linear_qkv.weight": (3 * HIDDEN, HIDDEN),
            "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
            "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
            "mlp.linear_fc2.weight": (HIDDEN, FFN),
        }
        tensors |= {prefix + name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    if layers.start == 0:
        tensors["embedding.word_embeddings.weight"] = torch.randn(
            16, HIDDEN, generator=torch.Generator().manual_seed(9)
        )
    return tensors


def cut(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    if "norm" in name:
        return tensor
    if "linear_proj" in name or "linear_fc2" in name:
        return tensor.chunk(ranks, dim=1)[rank].clone()
    if "linear_fc1" in name:
        gate, up = tensor[:FFN], tensor[FFN:]
        return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    return tensor.chunk(ranks)[rank].clone()


def save_megatron(
    folder: Path, tensor_ranks: int, stages: int, change: Callable[[dict], None] = lambda _: None
) -> Path:
    each = LAYERS // stages
    for stage in range(stages):
        full = whole(range(stage * each, (stage + 1) * each))
        for rank in range(tensor_ranks):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
            model = {key: cut(key, value, rank, tensor_ranks) for key, value in full.items()}
            if rank == 0 and stage == 0:
                change(model)
            content = {"model": model, "args": argparse.Namespace(swiglu=True), "iteration": 7}
            content["optimizer"] = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
            target = folder / "iter_0000007" / name
            target.mkdir(parents=True)
            torch.save(content, target / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


@pytest.mark.parametrize(("tensor_ranks", "stages"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_megatron_folders_of_any_layout_hold_the_same_weights(tensor_ranks: int, stages: int, tmp_path: Path) -> None:
    one = save_megatron(tmp_path / "one", 1, 1)
    other = save_megatron(tmp_path / "other", tensor_ranks, stages)
    code, text = run("state-diff", one, other, "--weights-only")
    assert code == 0 and "21 of 21 tensors are equal" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.pop("decoder.layers.1.mlp.linear_fc2.weight"), "only in"),
        (lambda model: model.update(extra=torch.ones(2)), "only in"),
        (lambda model: model["decoder.layers.1.input_layernorm.weight"].mul_(1.5), "relative L2 0.5"),
        (lambda model: model.update({k: v.half() for k, v in model.items() if "qkv" in k}), "torch.float16"),
    ],
    ids=["missing", "extra", "scaled", "dtype"],
)
def test_what_differs_in_weights_is_named(change: Callable[[dict], None], words: str, tmp_path: Path) -> None:
    one = save_megatron(tmp_path / "one", 1, 1)
    other = save_megatron(tmp_path / "other", 1, 1, change)
    code, text = run("state-diff", one, other)
    assert code == 1 and words in text


def test_optimizer_states_are_compared_too_and_a_tolerance_can_be_allowed(tmp_path: Path) -> None:
    one = save_megatron(tmp_path / "one", 1, 1)
    other = save_megatron(tmp_path / "other", 1, 1)
    file = other / "iter_0000007/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["optimizer"]["optimizer"]["state"][0]["exp_avg"] *= 1.001
    torch.save(content, file)
    code, text = run("state-diff", one, other)
    assert code == 1 and "optimizer.optimizer.state.0.exp_avg" in text
    assert run("state-diff", one, other, "--weights-only")[0] == 0
    assert run("state-diff", one, other, "--tolerance", 0.01)[0] == 0
    assert run("state-diff", one, tmp_path / "none")[0] == 2


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = save_megatron(tmp_path / "one", 1, 1)
    torch.save({"model": {}, "code": print}, folder / "iter_0000007/mp_rank_00/model_optim_rng.pt")
    code, text = run("state-diff", folder, folder)
    assert code == 2 and "without running code" in text


def test_records_are_compared_by_what_they_hold_of_the_weights(tmp_path: Path) -> None:
    from tests.precision.test_msprobe import sketch_of

    def write(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        writer = RecordWriter(tmp_path / name)
        writer.start({})
        entries = {Key("weights", site, "parameter"): sketch_of(tensor) for site, tensor in tensors.items()}
        writer.write(0, RankStep(entries=entries))
        return tmp_path / name

    weights = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(5)}
    reference = write("reference", weights)
    assert run("state-diff", reference, write("same", weights))[0] == 0
    code, text = run("state-diff", reference, write("scaled", {**weights, "b.weight": weights["b.weight"] * 1.1}))
    assert code == 1 and "weights, b.weight: parameter: relative distance" in text
    code, text = run("state-diff", reference, write("less", {"a.weight": weights["a.weight"]}))
    assert code == 1 and "only in the reference" in text


def test_samples_with_the_same_tokens_are_told_apart_by_their_pictures() -> None:
    """Ten digits have ten answers: most samples of a batch have the tokens of another."""
    found = [
        SampleFingerprint(f"{i % 3}", {"input_ids": f"{i % 3}", "labels": f"{i % 3}", "pixel_values": f"{i}"})
        for i in range(24)
    ]
    assert judge_data(in_steps(found), in_steps(found)).exit_code == 0
    assert "4 samples, 1 steps earlier" in str(judge_data(in_steps(found), in_steps(found[4:])).first)
    changed = copy.deepcopy(found)
    changed[6].fields["pixel_values"] = "other"
    first = judge_data(in_steps(found), in_steps(changed)).first
    assert first is not None and first.site == "pixel_values" and first.step == 1
    all_changed = copy.deepcopy(found)
    for sample in all_changed:
        sample.fields["pixel_values"] += "x"
    first = judge_data(in_steps(found), in_steps(all_changed)).first
    assert first is not None and first.site == "pixel_values"
