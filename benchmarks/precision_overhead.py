"""What recording costs: the time of a training step with it over that of the same step without.

One process trains one model. The steps take turns: nothing attached, a recorder attached that has nothing to record,
local norms, parameter digests, module digests. So whatever else the machine does falls on all of them alike, and the
medians are compared. The time of a recorded step includes waiting for the device and writing the files.

    python benchmarks/precision_overhead.py                  # on a CPU: 2 threads, fp32, a few million parameters
    python benchmarks/precision_overhead.py --preset 0.6b    # on an accelerator: bf16, 0.6 B parameters
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 768, "layers": 2, "heads": 12, "vocabulary": 4096, "batch": (8, 384), "bf16": False},
    "0.6b": {"hidden": 1024, "layers": 28, "heads": 16, "vocabulary": 151936, "batch": (4, 2048), "bf16": True},
}
LIMITS = {"idle": 1.01, "local norms": 1.02, "parameter digests": 1.3, "module digests": 1.3}
KINDS = ("off", *LIMITS)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a busy machine")
    options = parser.parse_args()
    times = measure(PRESETS[options.preset], options.rounds, options.threads, CLOCKS[options.clock])
    base = statistics.median(times["off"])
    print(f"step without recording: {base * 1000:.0f} ms, {options.rounds} steps of each kind, medians")
    for kind, limit in LIMITS.items():
        ratios = [with_it / without for with_it, without in zip(times[kind], times["off"], strict=True)]
        print(
            f"{kind:18} {statistics.median(times[kind]) / base:6.3f}x  of pairs {statistics.median(ratios):6.3f}x",
            end="",
        )
        print(f"  (limit {limit}x)")


def measure(preset: dict[str, Any], rounds: int, threads: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Return the seconds of the steps of each kind, in order."""
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    import torch
    import torch.distributed as dist

    from mindspeed_mm import accelerator
    from mindspeed_mm.precision.recording.capture import Capture
    from mindspeed_mm.precision.recording.local_norm import LocalNorms
    from mindspeed_mm.precision.recording.plan import CapturePlan
    from mindspeed_mm.precision.recording.view import PlainView
    from mindspeed_mm.precision.records.record import RecordWriter

    torch.set_num_threads(threads)
    accelerator.set_device(0)
    dist.init_process_group(accelerator.default_backend(), store=dist.HashStore(), rank=0, world_size=1)
    engine, batch = build(preset)
    view = PlainView(engine.module)
    every = frozenset(range(10**6))
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        writer = RecordWriter(Path(folder))
        writer.start({})
        capture: dict[str, Any] = {
            kind: Capture(view, engine.optimizer, writer, plan, device=accelerator.device())
            for kind, plan in {
                "idle": CapturePlan(frozenset()),
                "parameter digests": CapturePlan(every, modules=False),
                "module digests": CapturePlan(every),
            }.items()
        }
        listeners = {**capture, "local norms": LocalNorms(view)}
        order = random.Random(0)  # what a step leaves behind in caches and allocators is paid by the next one
        turns = [kind for _ in range(rounds + 2) for kind in order.sample(KINDS, len(KINDS))]
        for step, kind in enumerate(turns, start=-2 * len(KINDS)):
            engine.listeners = [listeners[kind]] if kind in listeners else []
            seconds = timed(clock, lambda: one_step(engine, batch, capture.get(kind), step))  # noqa: B023
            if step >= 0:
                times[kind].append(seconds)
    dist.destroy_process_group()
    return times


def build(preset: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the engine of a language model, and a batch on the host."""
    import torch
    import torch.distributed as dist
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from mindspeed_mm import accelerator
    from mindspeed_mm.distributed.fsdp2 import prepare_model
    from mindspeed_mm.engine.fsdp2 import FSDP2Engine

    config = Qwen3Config(
        hidden_size=preset["hidden"],
        intermediate_size=3 * preset["hidden"],
        num_hidden_layers=preset["layers"],
        num_attention_heads=preset["heads"],
        num_key_value_heads=preset["heads"] // 2,
        head_dim=preset["hidden"] // preset["heads"],
        vocab_size=preset["vocabulary"],
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).train()
    prepare_model(model, dist.group.WORLD, None, param_dtype="bf16" if preset["bf16"] else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=accelerator.has_fused_optimizers() or None)
    engine = FSDP2Engine(model, optimizer, group=dist.group.WORLD, clip_grad=1.0)
    ids = torch.randint(preset["vocabulary"], preset["batch"])
    return engine, {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def one_step(engine: Any, batch: dict[str, Any], capture: Any, step: int) -> None:
    """Train a step, recorded by ``capture`` if there is one."""
    from mindspeed_mm import accelerator

    if capture:
        capture.step_begins(abs(step))
        capture.micro_batch(batch)

    def forward_step(iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        placed = {name: value.to(accelerator.device()) for name, value in batch.items()}
        return model(**placed, use_cache=False).loss, lambda loss: loss

    engine.forward_backward(forward_step, None, 1)
    engine.optimizer_step()
    if capture:
        capture.step_ends()


def timed(clock: Callable[[], float], function: Callable[[], None]) -> float:
    """Return the seconds that ``function`` and what it has queued take."""
    from mindspeed_mm import accelerator

    accelerator.synchronize()
    start = clock()
    function()
    accelerator.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
