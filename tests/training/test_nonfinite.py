"""--nan-policy: a step that is not finite changes nothing, is always seen, and the run does as asked."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.optimizer.skipping import step_if_finite
from tests.ranks import RankPool
from tests.training.fragile import Net, Samples, train
from tests.training.test_resume import tensors

# Batches of 2 on 2 ranks, 2 micro-batches: step k trains on samples 8(k-1) to 8k-1, rank r on 8(k-1)+2r and the next,
# then 8(k-1)+4+2r and the next. Sample 22 is in step 3, micro-batch 2, on rank 1.
BAD, BAD_STEP, BATCH = 22, 3, 8
ACCUMULATE = ("--global-batch-size", str(BATCH))
OF_BAD_STEP = tuple(range(BATCH * (BAD_STEP - 1), BATCH * BAD_STEP))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_state(one: Path, other: Path) -> None:
    expected, actual = tensors(one), tensors(other)
    assert expected.keys() == actual.keys() and any(key.startswith("optimizer.state.") for key in expected)
    assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])]


@pytest.mark.parametrize("interval", ["1", "5"])
def test_pain_16_nan_is_neither_hidden_nor_fatal(ranks2: RankPool, tmp_path: Path, interval: str) -> None:
    flags = (*ACCUMULATE, "--nan-policy", "skip", "--log-interval", interval)
    answers = ranks2.run(train, tmp_path, *flags, steps=5, bad=(BAD,))
    assert [message for _, message in answers] == ["", ""]
    seen = rows(tmp_path)
    assert [math.isfinite(row["loss"]) for row in seen] == [True, True, False, True, True]
    assert [(row["skipped"], row["nan"]) for row in seen] == [(row["iteration"] == BAD_STEP,) * 2 for row in seen]
    # The schedule does not move for a step that was not made: step 4 has the rate that step 3 would have had.
    rates = [row["learning_rate"] for row in seen]
    assert rates[2] == rates[3] and len(set(rates)) == 4
    assert [row["consumed_samples"] for row in seen] == [8, 16, 24, 32, 40]
    assert re.search(r"warning: iteration 3: loss: nan \| grad norm: nan .*\(skipped, 1 in a row\)", answers[0][0])
    lines = [line for line in answers[1][0].splitlines() if " iteration  " in line]
    columns = [re.findall(r"number of (?:skipped|nan) iterations: +(\d)", line) for line in lines]
    if interval == "1":
        assert columns == [["0", "0"]] * 2 + [["1", "1"]] + [["0", "0"]] * 2
        assert "| loss: NAN |" in lines[2] and "grad norm: nan" in lines[2]
    else:
        assert columns == [["1", "1"]]


def plain_loop(steps: int) -> list[torch.Tensor]:
    """The same training by hand in one process: fused AdamW, warm-up of 2 steps, then a cosine to step 20."""
    from mindspeed_mm import accelerator

    accelerator.seed_all(1234)
    model, data, good = Net("forward", 0.0, 0.0), Samples(), 0
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for step in range(steps):
        if step + 1 == BAD_STEP:
            continue
        rate = 1e-2 * good / 2 if good <= 2 else 1e-2 * 0.5 * (math.cos(math.pi * (good - 2) / 18) + 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for start in range(BATCH * step, BATCH * (step + 1), 2):
            part = [data[i] for i in range(start, start + 2)]
            (model(**{key: torch.stack([item[key] for item in part]) for key in part[0]}) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        good += 1
    return [p.detach() for p in model.parameters()]


def test_skip_is_a_plain_loop_that_leaves_the_step_out(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(train, tmp_path, *ACCUMULATE, "--nan-policy", "skip", steps=5, bad=(BAD,))
    trained = tensors(tmp_path / "iter_0000005")
    names = [name for name, _ in Net("forward", 0.0, 0.0).named_parameters()]
    for name, expected in zip(names, plain_loop(5), strict=True):
        torch.testing.assert_close(trained[f"model.{name}"], expected, rtol=1e-6, atol=1e-7)
    assert trained["optimizer.state.head.weight.step"] == 4


@pytest.mark.parametrize("breaks", ["backward", "loss"])
@pytest.mark.parametrize("optimizer", ["fused_adamw", "fused_ema_adamw", "sgd", "muon"])
def test_a_skipped_step_leaves_no_trace(ranks2: RankPool, tmp_path: Path, breaks: str, optimizer: str) -> None:
    """Wherever the number comes from, and whether or not the optimizer can skip by itself. The first step is bad."""
    flags = ("--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--log-interval", "9")
    flags += ("--optimizer" if optimizer in ("sgd", "muon") else "--optimizer-selection", optimizer)
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    bad, first = (2, 9), (0, 1, 2, 3, 8, 9, 10, 11)  # samples of steps 1 and 3, without accumulation
    ranks2.run(train, tmp_path / "a", *flags, "--nan-policy", "skip", steps=6, bad=bad, breaks=breaks)
    ranks2.run(train, tmp_path / "b", *flags, steps=4, without=first, breaks=breaks)
    assert_same_state(tmp_path / "a" / "iter_0000006", tmp_path / "b" / "iter_0000004")
    losses = [row["loss"] for row in rows(tmp_path / "a") if not row["skipped"]]
    assert losses == [row["loss"] for row in rows(tmp_path / "b")] and len(losses) == 4


def test_skip_stops_after_too_many(ranks2: RankPool, tmp_path: Path) -> None:
    flags = ("--nan-policy", "skip", "--nan-limit", "2")
    (_, message), _ = ranks2.run(train, tmp_path, *flags, steps=8, bad=(4, 12, 16, 20))  # steps 2, 4, 5 and 6
    assert message.startswith("iteration 6: not finite: loss: nan")
    assert "--nan-limit 2: that many steps in a row were skipped before" in message


def test_stop_names_rank_samples_and_module(ranks2: RankPool, tmp_path: Path) -> None:
    flags = (*ACCUMULATE, "--save-interval", "1", "--log-interval", "1")
    answers = ranks2.run(train, tmp_path, *flags, steps=5, bad=(BAD,))
    (_, message), (output, other) = answers
    assert message == other
    assert message.startswith("iteration 3: not finite: loss: nan | grad norm: nan")
    assert "rank 1, micro-batch 2 of 2: loss nan, samples samples.csv:23, samples.csv:24\n" in message
    assert "first module whose output is not finite: ratio (Ratio; its input is finite)" in message
    assert "those after iteration 2" in message and f"resume from iteration 2: --load {tmp_path}" in message
    assert "rank 0" not in message
    assert "| loss: NAN |" in output, "the log line of the step comes before the message"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert not math.isfinite(rows(tmp_path)[-1]["loss"]) and rows(tmp_path)[-1]["iteration"] == 3


def test_stop_seen_a_step_later_is_the_same(ranks2: RankPool, tmp_path: Path) -> None:
    """Without a log line the host learns of step 3 in step 4, and runs the batches of step 3 again."""
    (_, message), _ = ranks2.run(train, tmp_path, *ACCUMULATE, "--log-interval", "9", steps=9, bad=(BAD,))
    assert "rank 1, micro-batch 2 of 2: loss nan, samples samples.csv:23, samples.csv:24\n" in message
    assert "ratio (Ratio; its input is finite)" in message
    assert "no checkpoint was saved before it" in message and not list(tmp_path.glob("iter*"))


def test_stop_where_only_the_gradient_or_the_loss_breaks(ranks2: RankPool, tmp_path: Path) -> None:
    (_, message), _ = ranks2.run(train, tmp_path, *ACCUMULATE, steps=5, bad=(BAD,), breaks="backward")
    assert "all losses are finite; the gradient of 'layers.0.bias' is not, and of none after it" in message
    assert "all modules' outputs are finite" in message
    (_, message), _ = ranks2.run(train, tmp_path, *ACCUMULATE, steps=5, bad=(BAD,), breaks="norm")
    assert re.search(r"all losses and gradients are finite, the largest value .* is \d\.\de\+2[0-9]: the sum", message)
    assert "hardware" not in message and "grad norm: inf" in message
    plain = {"breaks": "loss", "plain_loader": True}  # a user's own loader, in which both ranks read the same
    (_, message), _ = ranks2.run(train, tmp_path, *ACCUMULATE, steps=5, bad=(6,), **plain)
    assert "rank 0, micro-batch 2 of 2: loss inf, samples of consumed samples 12 to 15\n" in message
    assert "rank 1, micro-batch 2 of 2: loss inf" in message
    assert "the model (Net; its input is finite)" in message


def test_bad_luck_is_found_again(ranks2: RankPool, tmp_path: Path) -> None:
    """What goes wrong by chance goes wrong again: the batches get the random numbers they had."""
    (_, message), _ = ranks2.run(train, tmp_path, *ACCUMULATE, "--log-interval", "9", steps=50, chance=0.05)
    assert "first module whose output is not finite: ratio" in message


def test_rollback_is_a_run_without_those_samples(ranks2: RankPool, tmp_path: Path) -> None:
    flags = (*ACCUMULATE, "--save-interval", "1", "--log-interval", "2")
    once = ("--nan-policy", "rollback", "--save-interval", "2")
    answers = ranks2.run(train, tmp_path / "a", *flags, *once, steps=6, bad=(BAD,), dropout=0.3)
    assert [message for _, message in answers] == ["", ""]
    ranks2.run(train, tmp_path / "b", *flags, steps=6, without=OF_BAD_STEP, dropout=0.3)
    assert_same_state(tmp_path / "a" / "iter_0000006", tmp_path / "b" / "iter_0000006")
    steps = {row["iteration"]: row["loss"] for row in rows(tmp_path / "a") if "loss" in row}
    assert steps == {row["iteration"]: row["loss"] for row in rows(tmp_path / "b")} and len(steps) == 6
    # The position in the data counts what was left out; the reason stays in the file.
    assert rows(tmp_path / "a")[-1]["consumed_samples"] == 7 * BATCH
    (cause,) = [row for row in rows(tmp_path / "a") if "rolled_back" in row]
    assert (cause["iteration"], cause["left_out_samples"]) == (2, [[16, 24]])
    assert cause["rolled_back"]["iteration"] == 3 and math.isnan(cause["rolled_back"]["loss"])
    # A run resumed from before that step leaves the samples out at once, even if its policy is to stop.
    again = ("--load", str(tmp_path / "a"), "--ckpt-step", "2")
    (output, message), _ = ranks2.run(train, tmp_path / "a", *flags, *again, steps=6, bad=(BAD,), dropout=0.3)
    assert message == "" and "warning: iteration" not in output
    assert_same_state(tmp_path / "a" / "iter_0000006", tmp_path / "b" / "iter_0000006")


def test_rollback_from_the_start_and_its_limit(ranks2: RankPool, tmp_path: Path) -> None:
    """Without a checkpoint one is saved before the first step; two bad steps are two rollbacks, a third is too many."""
    flags = ("--nan-policy", "rollback", "--nan-limit", "2", "--log-interval", "3")
    (output, message), _ = ranks2.run(train, tmp_path / "a", *flags, steps=5, bad=(1, 13))
    assert message == "" and output.count("going back to checkpoint") == 2
    ranks2.run(train, tmp_path / "b", steps=5, without=(0, 1, 2, 3, 12, 13, 14, 15))
    assert_same_state(tmp_path / "a" / "iter_0000005", tmp_path / "b" / "iter_0000005")
    (_, message), _ = ranks2.run(train, tmp_path / "c", *flags, steps=5, bad=(1, 5, 13))
    assert "--nan-limit 2: that many rollbacks were made before" in message


def test_what_is_left_out_is_left_out_in_another_folder_too(ranks2: RankPool, tmp_path: Path) -> None:
    """A run that dies between a rollback and the next checkpoint is resumed with another --save."""
    a, b, c = (tmp_path / name for name in "abc")
    flags = (*ACCUMULATE, "--save-interval", "2")
    ranks2.run(train, a, *flags, "--nan-policy", "rollback", steps=4, bad=(BAD,))
    ranks2.run(train, b, *flags, steps=4, without=OF_BAD_STEP)
    for _ in range(2):  # and once more, from a checkpoint of that one
        (_, message), _ = ranks2.run(train, c, *flags, "--load", str(a), "--ckpt-step", "2", steps=4, bad=(BAD,))
        assert message == ""
        assert_same_state(c / "iter_0000004", b / "iter_0000004")
        a, c = c, tmp_path / "d"
        (a / "iter_0000002").symlink_to(tmp_path / "a" / "iter_0000002")


def test_rollback_goes_back_to_what_was_there_not_to_what_was_not_loaded(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(train, tmp_path / "start", *ACCUMULATE, steps=2)
    flags = (*ACCUMULATE, "--load", str(tmp_path / "start"), "--no-load-optim", "--no-load-rng")
    rollback = ("--nan-policy", "rollback")
    ranks2.run(train, tmp_path / "a", *flags, *rollback, steps=5, bad=(BAD,), dropout=0.3)
    ranks2.run(train, tmp_path / "b", *flags, steps=5, without=OF_BAD_STEP, dropout=0.3)
    assert_same_state(tmp_path / "a" / "iter_0000005", tmp_path / "b" / "iter_0000005")
    assert tensors(tmp_path / "a" / "iter_0000005")["optimizer.state.head.weight.step"] == 3
    (_, message), _ = ranks2.run(train, tmp_path / "start", *flags, *rollback, steps=5)
    assert re.search(r"would go back to \S+/start/iter_0000002, of which --no-load-optim.* a part only", message)


def test_a_good_step_is_torchs_own() -> None:
    """Bit for bit, and a bad one is none, whatever the optimizer."""
    for make in (lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        weights = [torch.nn.Parameter(torch.arange(4.0)) for _ in range(2)]
        ours, theirs = make([weights[0]]), make([weights[1]])
        for norm in (math.nan, 1.0, math.inf, 2.0):
            for weight in weights:
                weight.grad = torch.full((4,), norm)
            step_if_finite(ours, torch.tensor(norm))
            if math.isfinite(norm):
                theirs.step()
            assert torch.equal(*weights)
