"""What a checkpoint costs: how long a save holds up the training, how long a load takes, and host memory per rank.

A Qwen3 model with AdamW is sharded over the ranks, trained for a step and saved several times, at once and beside the
training (``--async-save``), and loaded into a fresh model. A Hugging Face folder is read into a model that was built on
the meta device. Every part runs in processes of its own, so that the peaks of host memory are apart. A stall is the
time that the call to save takes before the training goes on.

    python benchmarks/checkpoint.py                            # on a CPU: 2 ranks, gloo
    python benchmarks/checkpoint.py --preset 0.6b --ranks 8    # on accelerators
    python benchmarks/checkpoint.py --hf 1 2 4                 # only the Hugging Face folder, on 1, 2 and 4 ranks
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16384},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936},
}
WARM_UP = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
SAVES = 5
MIB = 2**20


def whole_model(preset: dict[str, Any]) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**preset, num_attention_heads=16, num_key_value_heads=8, head_dim=64, use_cache=False)
    return Qwen3ForCausalLM(config)


def shard(model: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from mindspeed_mm import accelerator

    mesh = init_device_mesh(accelerator.device().type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def build(preset: dict[str, Any]) -> tuple[Any, Any]:
    """Return a sharded model after one optimizer step, and its optimizer."""
    import torch

    from mindspeed_mm import accelerator

    model = whole_model(preset).to(accelerator.device())
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    step(model, optimizer)
    return model, optimizer


def step(model: Any, optimizer: Any) -> None:
    import torch

    from mindspeed_mm import accelerator

    tokens = torch.arange(64, device=accelerator.device()).view(1, 64)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    accelerator.synchronize()


class Memory:
    """How much resident memory the process has had at most since now, beyond what it has now."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._start = _status("VmRSS")

    @property
    def peak(self) -> float:
        """The peak so far, in MiB."""
        return _status("VmHWM") - self._start


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def import_hf(preset: dict[str, Any], folder: Path) -> dict[str, float]:
    """Read a Hugging Face folder into a model on meta; return seconds and MiB, all from before the model is built."""
    from mindspeed_mm import accelerator
    from mindspeed_mm.checkpoint.hf_import import load_hf_weights
    from mindspeed_mm.distributed.meta import materialize, meta_init

    def load(preset: dict[str, Any], folder: Path) -> Any:
        with meta_init():
            model = whole_model(preset)
        shard(model)
        materialize(model, accelerator.device())
        load_hf_weights(model, folder)
        return model

    load(WARM_UP, folder / "warm-up")  # what is imported on the way is no weight
    memory, start = Memory(), time.perf_counter()
    model = load(preset, folder / "hf")
    seconds, peak = time.perf_counter() - start, memory.peak
    return {"load": seconds, "memory": peak, "share": sum(t.to_local().nbytes for t in model.parameters()) / MIB}


def measure(what: str, preset: dict[str, Any], folder: Path) -> dict[str, float]:
    """Save or load on this rank; return seconds and MiB."""
    if what == "hf":
        return import_hf(preset, folder)
    from mindspeed_mm.checkpoint import store
    from mindspeed_mm.checkpoint.retention import Retention
    from mindspeed_mm.training.saving import Saver

    model, optimizer = build(preset)
    memory = Memory()
    step(model, optimizer)
    alone = memory.peak
    local = sum(t.to_local().nbytes for t in model.parameters()) * 3 / MIB  # weights and two moments
    if what == "load":
        start = time.perf_counter()
        store.load(folder / "sync", model=model, optimizer=optimizer)
        seconds = time.perf_counter() - start
        return {"load": seconds, "memory": memory.peak - alone, "share": local}
    saver = Saver(folder / what, beside=what == "async", keep=Retention(last=1))
    stalls, whole = [], []
    for iteration in range(SAVES + 1):

        def take(copy: Any, iteration: int = iteration) -> store.Snapshot:
            return store.take_snapshot(
                iteration, model=model, optimizer=optimizer, extra={}, rank_state={}, copy_to=copy
            )

        start = time.perf_counter()
        saver.save(iteration, take)
        stalls.append(time.perf_counter() - start)
        step(model, optimizer)
        saver.wait()
        whole.append(time.perf_counter() - start)
    # The first save also allocates what the later ones use again.
    saves = {"stall": statistics.median(stalls[1:]), "whole": statistics.median(whole[1:])}
    return {**saves, "memory": memory.peak - alone, "share": local}


def rank_main(rank: int, ranks: int, port: int, what: str, preset: str, folder: str, results: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    import torch
    import torch.distributed as dist

    from mindspeed_mm import accelerator

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    accelerator.set_device(rank)
    dist.init_process_group(accelerator.resolve_backend(None)[0])
    results.put((rank, measure(what, PRESETS[preset], Path(folder))))
    dist.destroy_process_group()


def run(what: str, preset: str, ranks: int, folder: str) -> dict[str, float]:
    """Return the largest of the ranks' figures."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (ranks, port, what, preset, folder, results)
    processes = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"{what}: a rank ended with exit code {process.exitcode}")
    figures = [results.get()[1] for _ in processes]
    return {key: max(figure[key] for figure in figures) for key in figures[0]}


def write_hf(preset: str, folder: str) -> None:
    """Write Hugging Face folders, in files of at most 1 GB."""
    whole_model(PRESETS[preset]).save_pretrained(Path(folder, "hf"), max_shard_size="1GB")
    whole_model(WARM_UP).save_pretrained(Path(folder, "warm-up"))


def report_hf(preset: str, counts: list[int], folder: str) -> None:
    """Read a Hugging Face folder on so many ranks, one count after the other."""
    process = multiprocessing.get_context("spawn").Process(target=write_hf, args=(preset, folder))
    process.start()
    process.join()
    size = sum(file.stat().st_size for file in Path(folder, "hf").iterdir()) / MIB
    print(f"Hugging Face folder of {size:.0f} MiB into a model on meta; on a CPU, memory with the weights in it:")
    for ranks in counts:
        figure = run("hf", preset, ranks, folder)
        print(
            f"    {ranks} ranks: {figure['load']:.2f} s, {figure['memory']:.0f} MiB on a rank, "
            f"{figure['memory'] / figure['share']:.2f} of its {figure['share']:.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hf", type=int, nargs="+", metavar="RANKS", help="measure only the Hugging Face folder")
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    args = parser.parse_args()
    if args.hf:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            report_hf(args.preset, args.hf, folder)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report_hf(args.preset, [args.ranks], folder)
        figures = {what: run(what, args.preset, args.ranks, folder) for what in ("sync", "async", "load")}
        size = sum(f.stat().st_size for f in Path(folder, "sync").rglob("*") if f.is_file()) / MIB
    sync, beside, load = figures.values()
    print(f"{args.preset}, {args.ranks} ranks, checkpoint {size:.0f} MiB, {sync['share']:.0f} MiB of it on a rank")
    print(f"save at once:        stall {sync['stall']:.3f} s")
    print(f"save beside:         stall {beside['stall']:.3f} s, {beside['stall'] / sync['stall']:.2f} of that at once")
    print(f"                     on the disk after {beside['whole']:.3f} s, with a training step meanwhile")
    print(f"load and verify:     {load['load']:.3f} s")
    print("host memory on a rank, beyond that of a training step:")
    for name, figure in zip(("save at once", "save beside", "load"), figures.values(), strict=True):
        share = figure["memory"] / figure["share"]
        print(f"    {name + ':':<14} {figure['memory']:.0f} MiB, {share:.2f} of the rank's share")


if __name__ == "__main__":
    main()
