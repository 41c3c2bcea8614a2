"""What the framework costs: our step time, and HF Trainer's, over that of a bare PyTorch loop.

The three train the same model on the same batch with the same optimizer, clipping and log interval, in one process.
A baton passes between them at every request for a batch, so that they take turns step by step and whatever else the
machine does falls on all of them alike. The medians of their step times are compared.

    python benchmarks/framework_tax.py                  # on a CPU: 2 threads, fp32, a few million parameters
    python benchmarks/framework_tax.py --preset 0.6b    # on an accelerator: bf16, 0.6 B parameters
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "config": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 4096,
        },
        "batch": (8, 512),
        "bf16": False,
    },
    "0.6b": {
        "config": {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
        },
        "batch": (4, 2048),
        "bf16": True,
    },
}
OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
WARM_UP, LOG_EVERY = 5, 10


class Turns:
    """Lets the contestants run one step each, in turn, and times the steps."""

    def __init__(self, names: list[str], steps: int, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._names, self._steps, self._synchronize = names, steps, synchronize
        self._turn, self._changed = 0, threading.Condition()

    def batches(self, name: str, batch: dict[str, Any], spare: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the batch once for each step; the time between two requests is a step.

        ``spare`` batches come after the last timed one, for a loop that fetches ahead.
        """
        place = self._names.index(name)
        for step in range(self._steps + spare):
            if step < self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._turn % len(self._names) == place)
                self._synchronize()
                start = time.perf_counter()
            yield dict(batch)
            if step < self._steps:
                self._synchronize()
                self.seconds[name].append(time.perf_counter() - start)
                with self._changed:
                    self._turn += 1
                    self._changed.notify_all()


def build(preset: dict[str, Any]) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**preset["config"], tie_word_embeddings=True, max_position_embeddings=4096)
    config.use_cache = False
    return Qwen3ForCausalLM(config)


def bare_loop(preset: dict[str, Any], device: Any, batches: Iterator[dict[str, Any]]) -> None:
    import torch

    model = build(preset).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)
    for step, batch in enumerate(batches):
        batch = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=preset["bf16"]):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            print(f"bare loop: step {step} loss {loss.item():.6f}", flush=True)


def hf_trainer(preset: dict[str, Any], device: Any, batches: Iterator[dict[str, Any]], steps: int) -> None:
    from torch.utils.data import IterableDataset
    from transformers import Trainer, TrainingArguments

    from mindspeed_mm import accelerator

    class Turn(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return batches

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps + 2,
            per_device_train_batch_size=preset["batch"][0],
            learning_rate=OPTIMIZER["lr"],
            weight_decay=OPTIMIZER["weight_decay"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            bf16=preset["bf16"],
            use_cpu=accelerator.is_cpu(),
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=build(preset),
            args=arguments,
            train_dataset=Turn(),
            data_collator=lambda rows: rows[0],
        )
        trainer.get_train_dataloader = lambda: batches  # the batch as it is: no collation is measured
        trainer.train()


def ours(preset: dict[str, Any], batches: Iterator[dict[str, Any]], steps: int) -> None:
    from mindspeed_mm import accelerator
    from mindspeed_mm.training import pretrain

    with tempfile.TemporaryDirectory() as folder:
        config = {"sharding_size": "auto", "reshard_after_forward": False}
        if preset["bf16"]:
            config |= {"param_dtype": "bf16", "reduce_dtype": "fp32"}
        yaml = Path(folder) / "fsdp2_config.yaml"
        yaml.write_text(json.dumps(config))
        flags = {
            "--micro-batch-size": preset["batch"][0],
            "--train-iters": steps + 1,  # the last timed step ends when the next one asks for its batch
            "--lr": OPTIMIZER["lr"],
            "--lr-decay-style": "constant",
            "--weight-decay": OPTIMIZER["weight_decay"],
            "--clip-grad": 1.0,
            "--log-interval": LOG_EVERY,
            "--eval-iters": 0,
            "--optimizer-selection": "fused_torch_adamw",
            "--fsdp2-config-path": yaml,
        }
        sys.argv = ["framework_tax", "--use-torch-fsdp2", *(str(x) for pair in flags.items() for x in pair)]

        def forward_step(iterator: Any, model: Any) -> Any:
            batch = {key: value.to(accelerator.device()) for key, value in next(iterator).items()}
            return model(**batch).loss, lambda loss: loss

        pretrain(lambda: (batches, None, None), lambda: build(preset), None, forward_step)


def start(function: Callable[..., None], *args: Any) -> threading.Thread:
    """Run a contestant in a thread; if it fails the others would wait for their turn for ever."""

    def run() -> None:
        try:
            function(*args)
        except BaseException:  # noqa: BLE001 - shown, then the process ends
            traceback.print_exc()
            os._exit(1)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def main() -> None:
    """Run the three and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each contestant")
    options = parser.parse_args()
    preset, steps = PRESETS[options.preset], options.steps + WARM_UP
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch

    from mindspeed_mm import accelerator

    device = accelerator.device()
    vocabulary = preset["config"]["vocab_size"]
    ids = torch.randint(vocabulary, preset["batch"], generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    names = ["bare loop", "ours", "HF Trainer"]
    turns = Turns(names, steps, accelerator.synchronize)
    # Imported before there are threads: transformers resolves names when they are first asked for.
    from transformers import Qwen3ForCausalLM, Trainer, TrainingArguments  # noqa: F401

    rivals = [
        start(bare_loop, preset, device, turns.batches("bare loop", batch)),
        start(hf_trainer, preset, device, turns.batches("HF Trainer", batch, spare=2), steps),
    ]
    ours(preset, turns.batches("ours", batch, spare=1), steps)  # in the main thread: it handles signals
    for rival in rivals:
        rival.join()

    medians = {name: statistics.median(turns.seconds[name][WARM_UP:]) for name in names}
    print(f"\n{options.steps} steps each, {options.preset} model on {device.type}, torch {torch.__version__}")
    for name, median in medians.items():
        print(f"{name:>12}: {median * 1000:8.1f} ms  {median / medians['bare loop']:.3f} x the bare loop")


if __name__ == "__main__":
    main()
