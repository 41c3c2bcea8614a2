"""The other machine: Hugging Face Trainer on the digits, with the three lines that record what it computes.

Usage: ``python examples/precision/reference.py [--steps 60]``. It leaves the record and ``trainer_state.json``,
``training_args.bin`` and ``config.json`` in ``runs/precision/reference``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLImageProcessorPil,
    Trainer,
    TrainingArguments,
)

from mindspeed_mm.precision import Recorder  # the first of the three lines

IMAGE = "<|vision_start|>{}<|vision_end|>"


class Digits(torch.utils.data.Dataset):
    """Conversations as tensors; only the answer carries labels."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.pictures = Qwen2VLImageProcessorPil.from_pretrained(model)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        picture = self.pictures(images=[Image.open(self.folder / row["images"][0])], return_tensors="pt")
        tokens = int(picture["image_grid_thw"].prod()) // self.pictures.merge_size**2
        question, answer = (message["content"] for message in row["messages"])
        question = question.replace("<image>", IMAGE.format("<|image_pad|>" * tokens))
        asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = self.tokenizer(asked)["input_ids"]
        spoken = self.tokenizer(f"{answer}<|im_end|>")["input_ids"]
        end = self.tokenizer("\n")["input_ids"]
        ids = torch.tensor(prompt + spoken + end)
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int(),
            "labels": torch.tensor([-100] * len(prompt) + spoken + [-100] * len(end)),
            **picture,
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Put samples of one length side by side."""
    batch = {
        name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels", "mm_token_type_ids")
    }
    media = {name: torch.cat([sample[name] for sample in samples]) for name in ("pixel_values", "image_grid_thw")}
    return {**batch, **media, "attention_mask": torch.ones_like(batch["input_ids"])}


def main() -> None:
    """Train and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"), help="what prepare.py has written")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    out = options.runs / "reference"
    model = AutoModelForImageTextToText.from_pretrained(options.runs / "model", dtype=torch.float32)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.1,
            adam_beta2=0.95,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=Digits(options.runs / "data", options.runs / "model"),
        data_collator=collate,
    )
    recorder = Recorder(out / "precision")  # the second
    trainer.add_callback(recorder.callback())  # the third
    trainer.train()
    trainer.save_state()
    trainer.model.config.save_pretrained(out)
    torch.save(trainer.args, out / "training_args.bin")


if __name__ == "__main__":
    main()
