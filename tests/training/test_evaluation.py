"""Evaluation: exact means over every sample, on ranks with unequal shares, and without effect on training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
from mindspeed_mm.data.iterators import CyclicIterator
from mindspeed_mm.data.samplers import DistributedBatchSampler
from tests.data.tiny import write_jsonl
from tests.ranks import RankPool
from tests.training.job import Job, Outcome, run_here
from tests.training.script import train
from tests.training.test_resume import tensors


def run(pool: RankPool, job: Job, **flags: Any) -> Outcome:
    job.flags |= {name.replace("_", "-"): value for name, value in flags.items()}
    return pool.run(run_here, job.command(), job.folder, timeout=240)[-1]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def uneven_rows(job: Job, count: int) -> list[Any]:
    """Rows whose answers differ in length."""
    rows = [json.loads(json.dumps(row)) for row in job.rows[:count]]
    for i, row in enumerate(rows):
        row["messages"][1]["content"] += " Surely." * i
    return rows


def batches(job: Job, micro_batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Every validation sample once, in order, on one rank."""
    loader = {**job.data["dataloader_param"], "batch_size": micro_batch_size}
    job.command()  # writes the files
    param = json.loads(json.dumps(job.data["dataset_param"]))
    param["basic_parameters"]["dataset"] = str(job.folder / "train.jsonl")
    _, valid = build_mm_dataset(param)
    dataset = build_mm_dataloader(valid, {**loader, "drop_last": False}).dataset
    collate = build_mm_dataloader(valid, {**loader, "drop_last": False}).collate_fn
    for start in range(0, len(valid), micro_batch_size):
        yield collate([dataset[i] for i in range(start, min(start + micro_batch_size, len(valid)))])


def by_hand(job: Job, hf_folder: Path, micro_batch_size: int) -> dict[str, float]:
    """The three losses over all validation samples, from the logits of Hugging Face's model."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(hf_folder, dtype=torch.float32).eval()
    sums, counts, micro_batches = [], [], []
    for batch in batches(job, micro_batch_size):
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
        tokens = (labels != -100).sum(1)
        sums += losses.tolist()
        counts += tokens.tolist()
        micro_batches.append((len(labels), (losses.sum() / tokens.sum()).item()))
    return {
        "per_token": sum(sums) / sum(counts),
        "per_sample": sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums),
        "default": sum(n * loss for n, loss in micro_batches) / len(sums),
    }


@pytest.mark.parametrize("count", [1, 5])
def test_a_full_pass_is_the_mean_over_every_sample(
    job: Job, hf_folder: Path, ranks2: RankPool, tmp_path: Path, count: int
) -> None:
    write_jsonl(tmp_path / "valid.jsonl", uneven_rows(job, count))
    job.data["dataset_param"]["basic_parameters"]["val_dataset"] = str(tmp_path / "valid.jsonl")
    expected = by_hand(job, hf_folder, 2)
    flags = {"per_token": "calculate-per-token-loss", "per_sample": "calculate-per-sample-loss", "default": None}
    for mode, flag in flags.items() if count > 1 else [("default", None)]:
        job.flags |= {name: True if name == flag else None for name in flags.values() if name}
        save = tmp_path / mode
        outcome = run(
            ranks2, job, save=save, lr="0", train_iters=1, eval_iters=-1, micro_batch_size=2, global_batch_size=4
        )
        row = next(row for row in metrics(save) if "validation loss" in row)
        assert row["validation loss"] == pytest.approx(expected[mode], rel=1e-6), (mode, outcome.text)
        assert row["validation loss PPL"] == pytest.approx(math.exp(expected[mode]), rel=1e-5)


def test_several_validation_sets(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    for name, count in (("short", 3), ("long", 5)):
        write_jsonl(tmp_path / f"{name}.jsonl", uneven_rows(job, count))
    sets = {name: str(tmp_path / f"{name}.jsonl") for name in ("short", "long")}
    job.data["dataset_param"]["basic_parameters"]["val_dataset"] = sets
    save = tmp_path / "ckpt"
    outcome = run(ranks2, job, save=save, lr="0", eval_iters=-1, eval_interval=2, tensorboard_dir=tmp_path / "tb")
    (first, *_) = rows = [row for row in metrics(save) if "validation loss/short" in row]
    assert [row["iteration"] for row in rows] == [2, 4, 4]
    assert first["validation loss/short"] != first["validation loss/long"]
    assert f"loss/long value: {first['validation loss/long']:.6E} | loss/long PPL: " in outcome.text
    assert {"loss/short validation", "loss/long validation ppl"} <= set(events(tmp_path / "tb").Tags()["scalars"])
    # A set alone gives what it gives among others, and global batches are taken of each in turn.
    job.data["dataset_param"]["basic_parameters"]["val_dataset"] = sets["long"]
    run(ranks2, job, save=tmp_path / "alone", tensorboard_dir=None)
    alone = next(row for row in metrics(tmp_path / "alone") if "validation loss" in row)
    assert alone["validation loss"] == first["validation loss/long"]


def test_evaluation_changes_nothing_of_the_training(ranks2: RankPool, tmp_path: Path) -> None:
    """Dropout, and samples that draw from the global random state: one number more or less would show."""
    for name, flags in (
        ("without", ["--eval-iters", "0"]),
        ("steps", ["--eval-iters", "2", "--eval-interval", "2"]),
        ("pass", ["--eval-iters", "-1", "--eval-interval", "3"]),
    ):
        (tmp_path / name).mkdir()
        ranks2.run(train, str(tmp_path / name), *flags, steps=7)
    expected = tensors(tmp_path / "without/iter_0000007")
    for name in ("steps", "pass"):
        assert any("validation loss" in row for row in metrics(tmp_path / name))
        actual = tensors(tmp_path / name / "iter_0000007")
        assert not [key for key, value in expected.items() if not torch.equal(value, actual[key])], name


def test_modules_keep_their_own_modes() -> None:
    from mindspeed_mm.training.evaluation import undisturbed

    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with undisturbed(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == [True, True, False]


def test_a_full_pass_over_an_iterator_is_an_error() -> None:
    from mindspeed_mm.errors import UserError
    from mindspeed_mm.training.evaluation import check_full_pass

    with pytest.raises(UserError, match=r"--eval-iters -1: the validation data is an iterator"):
        check_full_pass({"": iter([])}, "validation")


def own_loaders(folder: str) -> None:
    """Rank 0 has two batches more than rank 1."""
    import torch.distributed as dist

    from mindspeed_mm.training import pretrain
    from tests.training.script import Net, Noise, arguments, forward_step

    class Still(Noise):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"x": self.images[index], "y": self.labels[index]}

    share = torch.utils.data.Subset(Still(), range(9) if dist.get_rank() == 0 else range(9, 12))
    loader = torch.utils.data.DataLoader(share, batch_size=2)
    arguments(folder, "--eval-iters", "-1", "--lr", "0", steps=1)
    pretrain(lambda: (torch.utils.data.DataLoader(Still(), batch_size=2), loader, None), Net, None, forward_step)


def test_loaders_of_unequal_length_do_not_hang(ranks2: RankPool, tmp_path: Path) -> None:
    """Pain 18: ranks with other numbers of batches (torchtitan #1618)."""
    from tests.training.script import Net, Noise

    ranks2.run(own_loaders, str(tmp_path), timeout=60)
    found = next(row["validation loss"] for row in metrics(tmp_path) if "validation loss" in row)
    net, data = Net().eval(), Noise()
    saved = tensors(tmp_path / "iter_0000001")
    net.load_state_dict({name: saved[f"model.{name}"] for name in net.state_dict()})
    assert found == pytest.approx(net(data.images, data.labels).item(), rel=1e-6)


def accuracy_first(folder: str) -> None:
    from mindspeed_mm.training import pretrain
    from tests.training.script import Net, arguments, datasets

    def forward_step(iterator: Iterator[Any], model: torch.nn.Module) -> Any:
        return model(**next(iterator)), lambda loss: (loss, {"accuracy": 0.25, "loss": loss})

    arguments(folder, "--save-interval", "4", "--keep-best", "1", steps=4)
    pretrain(datasets, Net, None, forward_step)


def test_the_best_checkpoint_has_the_lowest_loss_whatever_else_is_reported(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(accuracy_first, str(tmp_path))
    rows = [row for row in metrics(tmp_path) if "validation loss" in row]
    manifest = json.loads((tmp_path / "iter_0000004" / "manifest.json").read_text())
    assert manifest["validation_loss"] == rows[0]["validation loss"] != rows[0]["validation accuracy"]


def full_pass_over_nothing(folder: str) -> None:
    from mindspeed_mm.distributed import state
    from mindspeed_mm.errors import UserError
    from mindspeed_mm.training.evaluation import evaluate
    from tests.training.script import Net, forward_step

    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    engine = SimpleNamespace(module=Net())
    with pytest.raises(UserError, match="--eval-iters -1: the validation data gave no batch on any rank"):
        evaluate(engine, forward_step, {"": CyclicIterator([])}, steps=-1, num_microbatches=1, name="validation")


def test_a_full_pass_over_nothing_is_an_error(ranks2: RankPool, tmp_path: Path) -> None:
    ranks2.run(full_pass_over_nothing, str(tmp_path))


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def test_generated_answers_are_hugging_faces_and_are_shown(
    job: Job, hf_folder: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    write_jsonl(tmp_path / "valid.jsonl", [*uneven_rows(job, 2), {**job.rows[2], "images": [], "messages": [
        {"role": "user", "content": "What?"}, {"role": "assistant", "content": "The answer is 1."}]}])  # fmt: skip
    job.data["dataset_param"]["basic_parameters"]["val_dataset"] = str(tmp_path / "valid.jsonl")
    outcome = run(
        ranks2, job, save=tmp_path / "ckpt", lr="0", train_iters=1, eval_iters=1, eval_generate=3,
        tensorboard_dir=tmp_path / "tb",
    )  # fmt: skip
    assert " generation at iteration 1 | exact match: 0 of 3" in outcome.text
    shown = events(tmp_path / "tb")
    assert shown.Tags()["images"] == [f"validation sample {i}/picture 0" for i in (0, 1)]
    model = AutoModelForImageTextToText.from_pretrained(hf_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf_folder)
    for i, batch in enumerate(batches(job, 1)):
        batch = {key: v for key, v in batch.items() if key not in ("position_ids", "vision_metadata")}
        target = (batch.pop("labels")[0] != -100).nonzero().flatten()
        prompt = {key: v[:, : target[0]] if v.shape[0] == 1 and v.ndim == 2 and key != "image_grid_thw" else v
                  for key, v in batch.items()}  # fmt: skip
        length = prompt["input_ids"].shape[1]
        eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
        output = model.generate(**prompt, do_sample=False, max_new_tokens=len(target) + 8, eos_token_id=eos)
        expected = tokenizer.decode(output[0, length:], skip_special_tokens=True).strip()
        text = shown.Tensors(f"validation sample {i}/text_summary")[0].tensor_proto.string_val[0].decode()
        assert text.endswith(f"**generated** {expected}"), text


def test_answers_that_were_learnt_match_exactly(job: Job, ranks2: RankPool, tmp_path: Path) -> None:
    job.rows = job.rows[:2]
    for row in job.rows:
        row["messages"][1]["content"] = "The answer."
    job.data["dataset_param"]["basic_parameters"]["val_dataset"] = "train.jsonl"
    run(ranks2, job, save=tmp_path / "ckpt", lr="1e-2", train_iters=30, eval_iters=1, eval_generate=9)
    assert metrics(tmp_path / "ckpt")[-1] == {"iteration": 30, "validation exact match": 1.0}


@pytest.mark.parametrize(("samples", "size", "ranks"), [(7, 2, 2), (5, 2, 3), (1, 4, 2), (8, 2, 2)])
def test_a_pass_gives_every_sample_once_in_the_same_batches_for_every_number_of_ranks(
    samples: int, size: int, ranks: int
) -> None:
    def one_pass(rank: int, of: int) -> list[list[int]]:
        return list(DistributedBatchSampler(samples, size, rank=rank, num_ranks=of).one_pass())

    split = [batch for rank in range(ranks) for batch in one_pass(rank, ranks)]
    assert sorted(index for batch in split for index in batch) == list(range(samples))
    assert sorted(split) == one_pass(0, 1)
