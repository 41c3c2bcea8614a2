"""What the framework costs: our step time, and HF Trainer's, over that of a bare PyTorch loop.

The three train the same model on the same batch with the same optimizer, clipping and log interval, each in a process
of its own. A baton passes between them at every request for a batch, so that they take turns step by step and whatever
else the machine does falls on all of them alike. The medians of their step times are compared.

    python benchmarks/framework_tax.py                  # on a CPU: 2 threads, fp32, a few million parameters
    python benchmarks/framework_tax.py --preset 0.6b    # on an accelerator: bf16, 0.6 B parameters
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
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
    """Lets this contestant run one step whenever it has the baton, and times its steps.

    Args:
        baton: is released when it is this contestant's turn.
        pass_on: is released to give the turn to the next one.
        steps: number of timed steps.
    """

    def __init__(self, baton: Any, pass_on: Any, steps: int) -> None:
        self.seconds: list[float] = []
        self._baton, self._pass_on, self._steps = baton, pass_on, steps

    def batches(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the batch for ever; the time between two requests is a step."""
        from mindspeed_mm import accelerator

        for _ in range(self._steps):
            self._baton.acquire()
            accelerator.synchronize()
            start = time.perf_counter()
            yield dict(batch)
            accelerator.synchronize()
            self.seconds.append(time.perf_counter() - start)
            self._pass_on.release()
        while True:  # for a loop that fetches ahead
            yield dict(batch)


def build(preset: dict[str, Any]) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**preset["config"], tie_word_embeddings=True, max_position_embeddings=4096)
    config.use_cache = False
    return Qwen3ForCausalLM(config)


def bare_loop(preset: dict[str, Any], batches: Iterator[dict[str, Any]], steps: int) -> None:
    import torch

    from mindspeed_mm import accelerator

    device = accelerator.device()
    model = build(preset).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)
    for step, batch in enumerate(islice(batches, steps + 1)):
        batch = {key: value.to(device) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=preset["bf16"]):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            print(f"bare loop: step {step} loss {loss.item():.6f}", flush=True)


def hf_trainer(preset: dict[str, Any], batches: Iterator[dict[str, Any]], steps: int) -> None:
    from torch.utils.data import IterableDataset
    from transformers import Trainer, TrainingArguments

    from mindspeed_mm import accelerator

    class Turn(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return batches

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps + 1,
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


CONTESTANTS = {"bare loop": bare_loop, "ours": ours, "HF Trainer": hf_trainer}


def contest(name: str, preset: dict[str, Any], baton: Any, pass_on: Any, steps: int, results: Any) -> None:
    """Run one contestant; each has a process of its own, so that they share nothing but the machine."""
    import torch

    ids = torch.randint(preset["config"]["vocab_size"], preset["batch"], generator=torch.Generator().manual_seed(0))
    turns = Turns(baton, pass_on, steps)
    CONTESTANTS[name](preset, turns.batches({"input_ids": ids, "labels": ids.clone()}), steps)
    results.put((name, turns.seconds))


def main() -> None:
    """Run the three and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each contestant")
    options = parser.parse_args()
    preset, steps = PRESETS[options.preset], options.steps + WARM_UP
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    context = multiprocessing.get_context("spawn")
    batons = [context.Semaphore(int(place == 0)) for place in range(len(CONTESTANTS))]
    results = context.Queue()
    processes = [
        context.Process(target=contest, args=(name, preset, batons[i], batons[(i + 1) % len(batons)], steps, results))
        for i, name in enumerate(CONTESTANTS)
    ]
    for process in processes:
        process.start()
    seconds: dict[str, list[float]] = {}
    while len(seconds) < len(processes):
        try:
            name, seconds[name] = results.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):  # the others would wait for their turn for ever
                for process in processes:
                    process.kill()
                sys.exit("a contestant failed; its traceback is above")

    import torch

    from mindspeed_mm import accelerator

    medians = {name: statistics.median(seconds[name][WARM_UP:]) for name in CONTESTANTS}
    where = f"{accelerator.device_type()}, torch {torch.__version__}"
    print(f"\n{options.steps} steps each, {options.preset} model on {where}")
    for name, median in medians.items():
        print(f"{name:>12}: {median * 1000:8.1f} ms  {median / medians['bare loop']:.3f} x the bare loop")


if __name__ == "__main__":
    main()
