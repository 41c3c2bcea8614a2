"""A record of somebody else's loop: plain PyTorch and Hugging Face's Trainer, against our own run."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.precision.records.record import Record
from tests.precision.runs import comparable, distances, record, worst
from tests.ranks import RankPool
from tests.training.job import Job


def batches(job: Job, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the samples of the job's first step in two micro-batches, as its own loader makes them."""
    from mindspeed_mm.data import build_mm_dataset
    from mindspeed_mm.data.collators import PaddingCollator

    monkeypatch.chdir(job.folder)
    job.command()
    dataset = build_mm_dataset(job.data["dataset_param"])
    collate = PaddingCollator(pad_token_id=0)
    return [collate([dataset[i] for i in part]) for part in (range(4), range(4, 8))]


def split(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the samples of a padded batch, without what belongs to images."""
    found = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        found.append({name: batch[name][row][mask] for name in ("input_ids", "attention_mask", "labels")})
    return [{name: value % 200 if name == "input_ids" else value for name, value in one.items()} for one in found]


def test_plain_pytorch_records_what_our_run_does(
    job: Job, hf_folder: Path, ranks1: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    from mindspeed_mm.precision import Recorder

    parts = batches(job, monkeypatch)
    ours = record(ranks1, job, tmp_path / "ours", micro_batch_size=2, train_iters=1, precision_capture="steps=0")
    model = AutoModelForImageTextToText.from_pretrained(hf_folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    Recorder(tmp_path / "plain", model, optimizer, steps=[0])
    targets = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    for part in parts:
        model(**part, num_items_in_batch=targets, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert not model._forward_hooks and not model._forward_pre_hooks, "the recorder has left"
    plain = Record.open(tmp_path / "plain")
    found = distances(plain, ours)
    for phases in ("data weights", "forward loss", "backward", "grad_local", "grad_reduced grad_clipped"):
        assert worst(found, phases)[0] <= 1e-5, worst(found, phases)
    for name in ("loss", "grad_norm"):
        assert plain.step(0).scalars[name] == pytest.approx(ours.step(0).scalars[name], rel=1e-6)
    missing = [str(key) for key in comparable(ours.step(0)) if key not in found]
    assert missing == [], missing
    assert [sample.id for sample in plain.step(0).samples] == [sample.id for sample in ours.step(0).samples]


class WithLoss(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layers(pixels).square().mean()}


def test_nothing_of_a_recorded_step_stays_in_memory(tmp_path: Path) -> None:
    """A hook that holds its own tensor keeps all that the step has computed; Python does not see that circle."""
    from mindspeed_mm.precision import Recorder

    def live() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    counts = []
    for run in range(2):
        model = WithLoss()
        optimizer = torch.optim.AdamW(model.parameters())
        recorder = Recorder(tmp_path / str(run), model, optimizer, steps=range(3))
        for _ in range(3):
            model(pixels=torch.randn(2, 3))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(Record.open(tmp_path / str(run)).steps) == 3
        del model, optimizer, recorder
        counts.append(live())
    assert counts[0] == counts[1]


def test_hugging_faces_trainer_records_in_three_lines(
    job: Job, hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

    from mindspeed_mm.data.collators import PaddingCollator

    parts = batches(job, monkeypatch)
    rows = [sample for part in parts for sample in split(part)]
    records = []
    for name, size in (("small", 1), ("large", 4)):
        model = AutoModelForImageTextToText.from_pretrained(hf_folder, dtype=torch.float32)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=2,
            learning_rate=1e-3,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, data_collator=PaddingCollator(pad_token_id=0), train_dataset=rows)
        from mindspeed_mm.precision import Recorder

        recorder = Recorder(tmp_path / name)
        trainer.add_callback(recorder.callback())
        trainer.train()
        assert not model._forward_hooks and not trainer.optimizer.optimizer._optimizer_step_pre_hooks
        records.append(Record.open(tmp_path / name))
    small, large = records
    assert small.steps == [0, 1] and small.manifest["training_arguments"]["per_device_train_batch_size"] == 1
    found = distances(small, large)
    assert comparable(small.step(0)).keys() == comparable(large.step(0)).keys() == found.keys()
    for phases in ("data weights", "forward loss", "backward", "grad_local", "grad_reduced grad_clipped"):
        assert worst(found, phases)[0] <= 1e-5, worst(found, phases)
    assert small.step(0).scalars == pytest.approx(large.step(0).scalars, rel=1e-5)
