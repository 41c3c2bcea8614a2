"""``pretrain_transformers.py`` on rows of which some have audio, on ranks of which some hear nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from mindspeed_mm.data import build_mm_dataset
from tests.data.test_audio import save_wav, tone
from tests.ranks import RankPool
from tests.training.job import Job, save_tiny_hf_folder
from tests.training.test_resume import losses
from tests.training.test_transformers_road import run


def row(question: str, answer: str, **media: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **media}


def hugging_face(folder: Path, data: dict[str, Any], steps: int) -> list[float]:
    """Train an unmodified model on pairs of samples with torch's AdamW; return the loss per token of each step."""
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    samples, found = build_mm_dataset(data), []
    for step in range(steps):
        total, count = torch.zeros(()), 0
        for number in (2 * step, 2 * step + 1):
            sample = dict(samples[number % len(samples)])
            labels = sample.pop("labels")[1:]
            length = len(sample["input_ids"])
            logits = model(**{k: v[None] if v.shape == (length,) else v for k, v in sample.items()}).logits[0, :-1]
            total = total + F.cross_entropy(logits, labels, reduction="sum")
            count += int((labels >= 0).sum())
        (total / count).backward()
        for parameter in model.parameters():  # a step without audio: no gradient there is a gradient of zero
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        adam.step()
        adam.zero_grad()
        found.append(float(total.detach() / count))
    return found


def test_ranks_with_and_without_audio_train_as_hugging_face_does(ranks2: RankPool, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, save_tiny_hf_folder("qwen2_audio", tmp_path / "hf"))
    for number in range(3):
        save_wav(tmp_path / f"{number}.wav", [tone(0.2 + 0.3 * number, 16000, 300 * (number + 1))])
    low, none, high = (
        row("<audio>?", "low", audios=["0.wav"]),
        row("hi", "hello"),
        row("<audio>?", "hi", audios=["2.wav"]),
    )
    both = row("<audio> and <audio>?", "low, middle", audios=["0.wav", "1.wav"])
    job.rows = [low, none, none, high, none, none, both, low]  # heard by: the first, the second, nobody, both
    job.data["dataset_param"]["attr"]["audios"] = "audios"
    del job.data["dataloader_param"]["collate_param"]
    job.model = {"init_from_hf_path": str(tmp_path / "hf")}
    job.yaml = {
        "sharding_size": "auto",
        "sub_modules_to_wrap": ["model.audio_tower.layers.{*}", "model.language_model.layers.{*}"],
    }
    job.flags |= {"calculate-per-token-loss": True, "lr-decay-style": "constant", "weight-decay": 0, "clip-grad": 0,
                  "adam-beta2": 0.999, "adam-eps": "1e-8", "train-iters": 6}  # fmt: skip
    run(ranks2, job, save=tmp_path / "save")
    expected = hugging_face(tmp_path / "hf", job.data["dataset_param"], 6)
    assert [loss for loss, *_ in losses(tmp_path / "save").values()] == pytest.approx(expected, rel=1e-5)
