"""How full packed sequences are, what planning them costs, and how fast samples come out of the pipeline.

    python benchmarks/packing.py                # plans: 1,000,000 log-normal lengths, any machine
    python benchmarks/packing.py --pipeline     # samples/s: ours, ours packed, and plain `datasets` + `DataLoader`

Plans are made of lengths that a generator draws, so that all there is in memory is what the planner holds; it is
measured with tracemalloc, in a run apart from the one that is timed. Every position is checked to come out once.

The pipelines read the same JSONL rows, decode the same JPEG files, render and label them with the same processor and
pad to the longest of a batch; ours checks every row and image besides, and computes positions and vision metadata.
The plain one takes its labels from the processor's assistant mask, which costs it much of its time; without labels it
is measured as well. "Kept" has ``cache_samples``: processed samples, pixels included, come from the disk; they are
prepared before the clock runs, as are the lengths that packs are planned with; a stream finds them while it runs. The
pipelines take turns, each time with fresh workers, and the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

CAPACITIES = (4096, 8192, 32768)
PICTURE = 384  # pixels, width and height of a picture
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}\
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ '<|im_end|>' }}{% endgeneration %}\
{%- elif message.content is string %}{{ message.content + '<|im_end|>' }}\
{%- else %}{% for part in message.content %}\
{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}\
{%- endfor %}{{ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def log_normal(count: int, capacity: int, seed: int = 0) -> Iterator[int]:
    """Yield lengths with median 400 and a long tail, cut at ``capacity``, a few at a time."""
    generator = np.random.default_rng(seed)
    for start in range(0, count, 1000):
        lengths = generator.lognormal(6.0, 0.9, min(1000, count - start))
        yield from lengths.astype(int).clip(1, capacity).tolist()


def next_fit(lengths: Iterable[int], capacity: int) -> int:
    """Return the packs it takes to fill one after the other in the order of the samples."""
    packs, left = 0, 0
    for length in lengths:
        if length > left:
            packs, left = packs + 1, capacity
        left -= length
    return packs


def compare_plans(count: int, window: int | None) -> None:
    from mindspeed_mm.data.packing import plan_packs

    print(f"{count} lengths, log-normal (median 400, sigma 0.9), cut at the capacity")
    print("| capacity | window | packs | fill | fill in order | samples/s | peak memory, KiB |")
    print("|---|---|---|---|---|---|---|")
    for capacity in CAPACITIES:
        size = window or capacity // 4  # about 150 packs of these lengths
        seen = np.zeros(count, dtype=bool)
        packs = 0
        start = time.perf_counter()
        for pack in plan_packs(log_normal(count, capacity), capacity, size):
            packs += 1
            assert not seen[pack].any()
            seen[pack] = True
        seconds = time.perf_counter() - start
        assert seen.all(), "a sample is missing"
        tracemalloc.start()
        for _ in plan_packs(log_normal(count // 10, capacity), capacity, size):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        tokens = sum(log_normal(count, capacity))
        in_order = next_fit(log_normal(count, capacity), capacity)
        cells = (
            capacity,
            size,
            packs,
            f"{tokens / (packs * capacity):.2%}",
            f"{tokens / (in_order * capacity):.2%}",
            f"{count / seconds:,.0f}",
            f"{peak / 1024:,.0f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def write_files(folder: Path, rows: int) -> None:
    """Write a model folder, crops of two photographs as JPEG files, and conversations about them."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from transformers import Qwen2VLImageProcessorPil

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))
    import prepare

    prepare.write_model_folder(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    Qwen2VLImageProcessorPil(
        patch_size=prepare.PATCH_SIZE,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 4096, "longest_edge": PICTURE * PICTURE},
    ).save_pretrained(folder / "model")
    draw = random.Random(0)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, length in enumerate(log_normal(rows, 2000)):
            photograph = draw.choice(photographs)
            x, y = draw.randrange(photograph.width - PICTURE), draw.randrange(photograph.height - PICTURE)
            photograph.crop((x, y, x + PICTURE, y + PICTURE)).save(folder / f"{number}.jpg", quality=90)
            answer = " ".join(draw.choice(prepare.WORDS) for _ in range(length))
            messages = [
                {"role": "user", "content": f"<image>{prepare.QUESTION}"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"images": [f"{number}.jpg"], "messages": messages}) + "\n")


def our_dataset(folder: Path, **basic: Any) -> Any:
    from mindspeed_mm.data import build_mm_dataset

    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return build_mm_dataset(
        {
            "dataset_type": "huggingface",
            "preprocess_parameters": {"model_name_or_path": str(folder / "model")},
            "basic_parameters": {
                "dataset_dir": str(folder),
                "dataset": str(folder / "rows.jsonl"),
                "cache_dir": str(folder / "prepared"),
                **basic,
            },
            "attr": {"messages": "messages", "images": "images", **tags},
        }
    )


def ours(dataset: Any, folder: Path, batch_size: int, workers: int) -> Iterable[Any]:
    from mindspeed_mm.data import build_mm_dataloader

    return build_mm_dataloader(dataset, {"batch_size": batch_size, "num_workers": workers, "drop_last": False})


def ours_kept(dataset: Any, folder: Path, batch_size: int, workers: int) -> Iterable[Any]:
    return ours(our_dataset(folder, cache_samples=True), folder, batch_size, workers)


def ours_packed(dataset: Any, folder: Path, batch_size: int, workers: int) -> Iterable[Any]:
    from mindspeed_mm.data.collators import PackCollator
    from mindspeed_mm.data.loaders import MultiModalDataLoader
    from mindspeed_mm.data.model_inputs import ModelInputs
    from mindspeed_mm.data.packing import plan_packs

    lengths = dataset.sizes[:, 0].tolist()
    capacity = max(4096, *lengths)
    packs = list(plan_packs(lengths, capacity, len(dataset)))
    collate = PackCollator(capacity, dataset.encoder.tokenizer.pad_token_id, ModelInputs(folder / "model"))
    return MultiModalDataLoader(dataset, packs, collate, num_workers=workers)


def ours_streamed(dataset: Any, folder: Path, batch_size: int, workers: int) -> Iterable[Any]:
    capacity = max(4096, int(dataset.sizes[:, 0].max()))
    stream = our_dataset(folder, streaming=True, packing=True, seq_length=capacity)
    return ours(stream, folder, 1, workers)


def measure_lengths(dataset: Any) -> None:
    """Print how many lengths of rows are found in a second of processor time."""
    encoder, rows = dataset.encoder, list(dataset.rows)
    texts = [{**row, "messages": [{**m, "content": m["content"].removeprefix("<image>")} for m in row["messages"]],
              "images": []} for row in rows]  # fmt: skip
    ways = (("text", texts, False), ("a picture of a known size", rows, False), ("a picture of a new size", rows, True))
    for name, part, forget in ways:
        encoder.count_tokens(part[0], "")
        start = time.process_time()
        for row in part:
            if forget:
                encoder._written_for.cache_clear()
            encoder.count_tokens(row, "")
        print(
            f"lengths of rows with {name}: {len(part) / (time.process_time() - start):,.0f} a second of processor time"
        )


class PlainCollator:
    """What a user of `datasets`, a processor and a `DataLoader` would write."""

    def __init__(self, folder: Path, labels: bool) -> None:
        from mindspeed_mm.data.processors import load_processor  # HF's loader needs torchvision

        self.folder, self.labels = folder, labels
        self.processor = load_processor(folder / "model")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        conversations = []
        for row in rows:
            picture = Image.open(self.folder / row["images"][0]).convert("RGB")
            text = row["messages"][0]["content"].removeprefix("<image>")
            parts = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
            conversations.append([{"role": "user", "content": parts}, row["messages"][1]])
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=self.labels,
            processor_kwargs={"padding": True},
        )
        if self.labels:
            batch["labels"] = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        return dict(batch)


def plain(dataset: Any, folder: Path, batch_size: int, workers: int, labels: bool = True) -> Iterable[Any]:
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "cache"))
    return DataLoader(rows, batch_size, shuffle=True, num_workers=workers, collate_fn=PlainCollator(folder, labels))


def compare_pipelines(count: int, batch_size: int, workers: int, repeats: int) -> None:
    import datasets
    import torch

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    ways: dict[str, Callable[..., Iterable[Any]]] = {
        "plain": plain,
        "plain, no labels": partial(plain, labels=False),
        "ours": ours,
        "ours, packed": ours_packed,
        "ours, streamed and packed": ours_streamed,
        "ours, kept": ours_kept,
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    padding, work = {}, set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, count)
        dataset = our_dataset(folder)
        for _ in range(repeats):
            for way, make in ways.items():
                loader = make(dataset, folder, batch_size, workers)
                tokens = real = targets = 0
                start = time.perf_counter()
                for batch in loader:
                    tokens += batch["input_ids"].numel()
                    real += int(batch["attention_mask"].sum())
                    targets += int((batch["labels"] >= 0).sum()) if "labels" in batch else 0
                speeds[way].append(count / (time.perf_counter() - start))
                padding[way] = 1 - real / tokens
                work.add((real, targets or None))
        measure_lengths(dataset)
    assert len({real for real, _ in work}) == len({targets for _, targets in work if targets}) == 1, work
    print(f"{count} conversations with a picture of {PICTURE} x {PICTURE}, {batch_size} a batch, {workers} workers")
    print("| pipeline | samples/s | of plain | padding |\n|---|---|---|---|")
    baseline = statistics.median(speeds["plain"])
    for way, found in speeds.items():
        speed = statistics.median(found)
        print(f"| {way} | {speed:.1f} | {speed / baseline:.2f} | {padding[way]:.1%} |")


def main() -> None:
    """Run one of the comparisons and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="lengths to plan")
    parser.add_argument("--window", type=int, help="samples planned together; by default a quarter of the capacity")
    parser.add_argument("--pipeline", action="store_true", help="measure samples/s of whole pipelines")
    parser.add_argument("--rows", type=int, default=400, help="conversations of --pipeline")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.pipeline:
        compare_pipelines(options.rows, options.batch_size, options.workers, options.repeats)
    else:
        compare_plans(options.samples, options.window)


if __name__ == "__main__":
    main()
