"""What cross entropy over a large vocabulary costs: on whole logits, in chunks, and by Liger's kernel where it runs.

    python benchmarks/loss_memory.py                             # on a laptop: 2,048 tokens
    python benchmarks/loss_memory.py --tokens 4096 8192 16384 32768    # on an accelerator
    python benchmarks/loss_memory.py --model --tokens 4096 8192 16384 32768    # memory only, any machine

``chunked`` computes the gradients of a chunk with its loss; ``again`` makes its logits again in the backward pass,
which only a head with LoRA does. Where whole logits need more memory than there is, as few pieces of the tokens as fit
take their turn one after the other, each with whole logits; their times and peaks are added up.

The first two forms run the output head of a 0.5 B model (hidden size 896, vocabulary 151,936) with its loss, forward
and backward, each case in a fresh process, and the processes of one size take turns. They print the median time and
the peak above what hidden states, weight and their gradients take: the allocator's on an accelerator; on a CPU the
high-water mark of resident memory that the kernel keeps for a process (VmHWM), reset before the step.

``--model`` is about forward and backward of a 0.5 B model as ``pretrain_transformers.py`` trains it in bf16: sharded by
FSDP2 over so many devices, fp32 weights and AdamW's state, gradients reduced in fp32. Nothing is computed or sent:
under FakeTensorMode PyTorch's FSDPMemTracker adds up the storage of every tensor of a real step on the first device
while it lives, which is exact about tensors and knows nothing of an allocator.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

HIDDEN, VOCABULARY = 896, 151_936
WAYS = ("whole", "chunked", "again", "liger")
DOES_NOT_FIT = 3  # exit code
GIB = 2**30


def chunk_size(tokens: int) -> int:
    """Return the default of ``loss_cfg.chunk_size``, but a quarter of few tokens: a laptop sees the same picture."""
    return min(1024, tokens // 4)


def head_case(way: str, tokens: int, dtype_name: str, pieces: int = 1) -> dict[str, float]:
    """Return seconds and peak bytes of one forward and backward of head and loss, or their sums over pieces."""
    import torch
    from torch import nn

    from mindspeed_mm import accelerator
    from mindspeed_mm.losses import cross_entropy_sums, head_returns_loss_sums, linear_cross_entropy

    device, dtype = accelerator.device(), getattr(torch, dtype_name)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (1, tokens), device=device)
    hidden.grad, head.weight.grad = torch.zeros_like(hidden), torch.zeros_like(head.weight)
    in_one_pass = partial(linear_cross_entropy, chunk_size=chunk_size(tokens))
    kernel = {"chunked": in_one_pass, "liger": accelerator.fused_linear_cross_entropy()}.get(way)
    if accelerator.is_cpu():  # then an allocation fails, instead of the machine
        resource.setrlimit(resource.RLIMIT_DATA, (proc("meminfo", "MemAvailable"), resource.RLIM_INFINITY))

    def loss_sums(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if way == "whole":
            return cross_entropy_sums(head(hidden), targets)
        with head_returns_loss_sums(head, targets, chunk_size(tokens), kernel):
            return head(hidden)

    def step() -> None:
        for piece in zip(hidden.chunk(pieces, dim=1), targets.chunk(pieces, dim=1), strict=True):
            (loss_sums(*piece).sum() / tokens).backward()
        accelerator.synchronize()

    if not accelerator.is_cpu():
        step()  # builds kernels
    before = reset_peak(accelerator)
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": pieces * (read_peak(accelerator) - before)}


def reset_peak(accelerator: Any) -> int:
    """Start measuring the peak anew and return what is in use now."""
    import torch

    if not accelerator.is_cpu():
        torch.accelerator.reset_peak_memory_stats()
        return int(accelerator.memory_stats()["allocated"])
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return proc("self/status", "VmRSS")


def read_peak(accelerator: Any) -> int:
    return proc("self/status", "VmHWM") if accelerator.is_cpu() else int(accelerator.memory_stats()["max_allocated"])


def proc(file: str, field: str) -> int:
    """Return a field of a file of /proc in bytes."""
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def model_case(way: str, tokens: int, recomputed: bool, devices: int) -> dict[str, float]:
    """Return the peak bytes of a training step of a 0.5 B model on the first of ``devices``, without computing it."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mindspeed_mm.configs.fsdp2 import Fsdp2Config
    from mindspeed_mm.distributed.fsdp2 import apply_fsdp2
    from mindspeed_mm.losses import cross_entropy_sums, head_returns_loss_sums, linear_cross_entropy, mean_token_loss

    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    layers = ["model.layers.{*}"]
    sharding = Fsdp2Config(
        sharding_size="auto",
        sub_modules_to_wrap=layers,
        recompute_modules=layers if recomputed else None,
        param_dtype="bf16",
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)  # type: ignore[no-untyped-call]
    with torch.device("meta"):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.float32).train()
    apply_fsdp2(model, sharding)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for parameter in model.parameters():
            optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # Plain causal attention needs no mask; left to itself the model would write out all of it under FakeTensorMode.
        inputs = {"input_ids": ids, "attention_mask": {"full_attention": None}, "use_cache": False}
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((ids,))
        with tracker:
            if way == "whole":
                sums = cross_entropy_sums(model(**inputs).logits, ids)
            else:
                kernel = partial(linear_cross_entropy, chunk_size=chunk_size(tokens))
                with head_returns_loss_sums(model.lm_head, ids, chunk_size(tokens), kernel):
                    sums = model(**inputs).logits
            mean_token_loss(sums, torch.tensor([tokens])).backward()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    return {"bytes": peak["Total"]}


def fresh(case: str, **options: Any) -> dict[str, float] | None:
    """Run one case in a process of its own; return None if there is not enough memory."""
    command = [sys.executable, __file__, "--case", json.dumps({"case": case, **options})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == DOES_NOT_FIT:
        return None
    if done.returncode:
        sys.exit(f"{case} {options} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare_heads(sizes: list[int], repeats: int, dtype: str, asked: list[str]) -> None:
    from mindspeed_mm import accelerator

    ways = [way for way in asked if way != "liger" or accelerator.fused_linear_cross_entropy()]
    print(f"head and loss, hidden {HIDDEN}, vocabulary {VOCABULARY}, {dtype} on {accelerator.device_type()}")
    print("| tokens | cross entropy | peak, GiB | of whole | time, s | of whole |\n|---|---|---|---|---|---|")
    for tokens in sizes:
        pieces = dict.fromkeys(ways, 1)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way in list(runs):
                case = {"way": way, "tokens": tokens, "dtype_name": dtype}
                found = fresh("head", **case, pieces=pieces[way])
                while found is None and way == "whole" and pieces[way] < tokens:
                    pieces[way] *= 2
                    found = fresh("head", **case, pieces=pieces[way])
                if found is None:
                    del runs[way]
                    print(f"| {tokens} | {way} | does not fit | | | |", flush=True)
                else:
                    runs[way].append(found)
        whole = None
        for way, done in runs.items():
            size, seconds = (statistics.median(run[key] for run in done) for key in ("bytes", "seconds"))
            whole = (size, seconds) if way == "whole" else whole
            shares = (f"{size / whole[0]:.0%}", f"{seconds / whole[1]:.2f}") if whole else ("", "")
            name = way if pieces[way] == 1 else f"{way}, sum of {pieces[way]} pieces"
            cells = (tokens, name, f"{size / GIB:.2f}", shares[0], f"{seconds:.2f}", shares[1])
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def compare_models(sizes: list[int], devices: list[int]) -> None:
    print(f"training step of a 0.5 B model in bf16, vocabulary {VOCABULARY}; tensors of one device counted, not run")
    columns = [f"of {number} device(s): whole, chunked, GiB" for number in devices]
    print("| tokens | layers | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(devices))
    for tokens, recomputed in product(sizes, (False, True)):
        cells = [str(tokens), "recomputed" if recomputed else "kept"]
        for number in devices:
            case = {"tokens": tokens, "recomputed": recomputed, "devices": number}
            whole, chunked = (fresh("model", way=way, **case)["bytes"] / GIB for way in WAYS[:2])
            cells.append(f"{whole:.1f}, {chunked:.1f}: {1 - chunked / whole:.0%} lower")
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each case")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of computing the loss of the head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--model", action="store_true", help="count the memory of a training step of a 0.5 B model")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 8], help="that the model is sharded over")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case = json.loads(options.case)
        run = {"head": head_case, "model": model_case}[case.pop("case")]
        try:
            print(json.dumps(run(**case)))
        except RuntimeError as error:  # torch.OutOfMemoryError is one; what the CPU's allocator raises has no name
            if "memory" not in str(error):
                raise
            sys.exit(DOES_NOT_FIT)
    elif options.model:
        compare_models(options.tokens, options.devices)
    else:
        compare_heads(options.tokens, options.repeats, options.dtype, options.ways)


if __name__ == "__main__":
    main()
