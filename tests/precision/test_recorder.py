"""A record of somebody else's loop: plain PyTorch and Hugging Face's Trainer, against our own run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_mm.precision.record import Record
from tests.precision.runs import distances, record, worst
from tests.ranks import RankPool
from tests.training.job import Job


def batches(job: Job, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the samples of the job's first step in two micro-batches, as its own loader makes them."""
    from mindspeed_mm.data import build_mm_dataset

    monkeypatch.chdir(job.folder)
    job.command()
    dataset = build_mm_dataset(job.data["dataset_param"])
    collate = PaddingCollator(pad_token_id=0)
    return [collate([dataset[i] for i in part]) for part in (range(4), range(4, 8))]


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
    missing = [str(key) for key in ours.step(0).entries if key not in found]
    assert missing == [], missing
    assert [sample.id for sample in plain.step(0).samples] == [sample.id for sample in ours.step(0).samples]
