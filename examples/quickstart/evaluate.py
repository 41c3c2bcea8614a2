"""Let the exported model read digits it has never seen, and draw what happened.

Usage: ``python examples/quickstart/evaluate.py [--out runs/quickstart] [--target 0.95]``. It loads the folder
``export`` below ``--out`` as any Hugging Face model, answers every row of ``data/heldout.jsonl`` with ``generate()``,
prints the share of answers that match exactly, and writes ``loss.png`` and ``predictions.png``. It exits with 1 if
the share is below the target.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from mindspeed_mm.data.processors import load_processor

BATCH = 60  # pictures
GRID = (4, 10)  # rows and columns of predictions.png


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(model: Any, processor: Any, rows: list[dict[str, Any]], data: Path) -> list[str]:
    """Return what ``model`` generates for the user turn of every row."""
    answers: list[str] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        prompts = []
        for row in batch:
            question = row["messages"][0]["content"].removeprefix("<image>")
            parts = [{"type": "image"}, {"type": "text", "text": question}]
            prompts.append([{"role": "user", "content": parts}])
        texts = processor.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
        pictures = [Image.open(data / row["images"][0]) for row in batch]
        inputs = processor(images=pictures, text=texts, return_tensors="pt")  # all prompts are equally long
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draw the training loss of every iteration in ``metrics``, on a logarithmic axis."""
    rows = [row for row in read_jsonl(metrics) if "loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy([row["iteration"] for row in rows], [row["loss"] for row in rows], linewidth=1)
    axes.set(xlabel="iteration", ylabel="training loss", title="From random weights")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def draw_predictions(rows: list[dict[str, Any]], answers: list[str], data: Path, picture: Path) -> None:
    """Draw held-out pictures with their answers: first, in red, the wrong ones with the truth, then right ones."""
    truths = [row["messages"][1]["content"] for row in rows]
    wrong = [answer != truth for truth, answer in zip(truths, answers, strict=True)]
    order = sorted(range(len(rows)), key=lambda index: not wrong[index])
    figure = Figure(figsize=(GRID[1] * 1.1, GRID[0] * 1.35), layout="constrained")
    for axes, index in zip(figure.subplots(*GRID).flat, order, strict=False):
        axes.imshow(Image.open(data / rows[index]["images"][0]))
        title = f"{answers[index]}\n(is {truths[index]})" if wrong[index] else answers[index]
        axes.set_title(title, fontsize=9, color="crimson" if wrong[index] else "black")
        axes.set_axis_off()
    figure.suptitle(f"{len(rows)} held-out digits, {sum(wrong)} wrong (in red)")
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Evaluate, draw, and exit with 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the quickstart")
    parser.add_argument("--target", type=float, default=0.95, help="share of exact matches to reach")
    args = parser.parse_args()
    data, export = args.out / "data", args.out / "export"

    rows = read_jsonl(data / "heldout.jsonl")
    disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    answers = answer(model, load_processor(export), rows, data)
    right = sum(answer == row["messages"][1]["content"] for row, answer in zip(rows, answers, strict=True))

    draw_loss(args.out / "ckpt" / "metrics.jsonl", args.out / "loss.png")
    draw_predictions(rows, answers, data, args.out / "predictions.png")
    share = right / len(rows)
    verdict = "reached" if share >= args.target else "MISSED"
    print(f"exact match on held-out digits: {right} of {len(rows)} = {share:.1%}; target {args.target:.0%} {verdict}")
    print(f"pictures: {args.out / 'loss.png'}, {args.out / 'predictions.png'}")
    if share < args.target:
        sys.exit(1)


if __name__ == "__main__":
    main()
