"""What cross entropy over a large vocabulary costs: on whole logits, in chunks, and by Liger's kernel where it runs.

    python benchmarks/loss_memory.py                             # on a laptop: 2,048 tokens
    python benchmarks/loss_memory.py --tokens 4096 8192 16384 32768    # on an accelerator
    python benchmarks/loss_memory.py --model --tokens 4096 8192 16384 32768    # memory only, any machine

``chunked`` computes the gradients of a chunk with its loss; ``again`` makes its logits again in the backward pass,
which only a head with LoRA does. A way that needs more memory than there is does not fit.

The first two forms run the output head of a 0.5 B model (hidden size 896, vocabulary 151,936) with its loss, forward
and backward, each case in a fresh process, and the processes of one size take turns. They print the median time and
the peak above what hidden states, weight and their gradients take: the allocator's on an accelerator; on a CPU the
high-water mark of resident memory that the kernel keeps for a process (VmHWM), reset before the step.

``--model`` is about forward and backward of a 0.5 B model in bf16, with the fp32 weights, gradients and AdamW's state
that its optimizer keeps. Nothing is computed: under FakeTensorMode the storage of every tensor of a real step is added
up while it lives, which is exact about tensors and knows nothing of an allocator.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

HIDDEN, VOCABULARY = 896, 151_936
WAYS = ("whole", "chunked", "again", "liger")
DOES_NOT_FIT = 3  # exit code
GIB = 2**30


def chunk_size(tokens: int) -> int:
    """Return the default of ``loss_cfg.chunk_size``, but an eighth of few tokens: a laptop sees the same picture."""
    return min(1024, tokens // 8)


def head_case(way: str, tokens: int, dtype_name: str) -> dict[str, float]:
    """Return seconds and peak bytes of one forward and backward of head and loss, after one to warm up."""
    import torch
    from torch import nn

    from mindspeed_mm import accelerator
    from mindspeed_mm.losses import cross_entropy_sums, head_returns_loss_sums, linear_cross_entropy, mean_token_loss

    device, dtype = accelerator.device(), getattr(torch, dtype_name)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (1, tokens), device=device)
    counts = torch.tensor([tokens], device=device)
    hidden.grad, head.weight.grad = torch.zeros_like(hidden), torch.zeros_like(head.weight)
    in_one_pass = partial(linear_cross_entropy, chunk_size=chunk_size(tokens))
    kernel = {"chunked": in_one_pass, "liger": accelerator.fused_linear_cross_entropy()}.get(way)
    if accelerator.is_cpu():  # then an allocation fails, instead of the machine
        resource.setrlimit(resource.RLIMIT_DATA, (proc("meminfo", "MemAvailable"), resource.RLIM_INFINITY))

    def step() -> None:
        if way == "whole":
            sums = cross_entropy_sums(head(hidden), targets)
        else:
            with head_returns_loss_sums(head, targets, chunk_size(tokens), kernel):
                sums = head(hidden)
        mean_token_loss(sums, counts).backward()
        accelerator.synchronize()

    if not accelerator.is_cpu():
        step()  # builds kernels
    before = reset_peak(accelerator)
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": read_peak(accelerator) - before}


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


def model_case(way: str, tokens: int, recomputed: bool) -> dict[str, float]:
    """Return the peak bytes of a training step of a 0.5 B model in bf16, without computing it.

    ``state`` of them are there before: weights in bf16, and in fp32 weights, gradients and AdamW's two moments.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from mindspeed_mm.distributed.recompute import recompute
    from mindspeed_mm.losses import cross_entropy_sums, head_returns_loss_sums, linear_cross_entropy, mean_token_loss

    class LiveBytes(TorchDispatchMode):
        """Counts the storage that the operations make, for as long as it lives."""

        now = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self._known: set[int] = set()

        def add(self, value: Any) -> None:
            for tensor in tree_leaves(value):
                if (
                    isinstance(tensor, torch.Tensor)
                    and (key := id(storage := tensor.untyped_storage())) not in self._known
                ):
                    self._known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, storage.nbytes())

        def _free(self, key: int, size: int) -> None:
            self._known.discard(key)
            self.now -= size

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.add(result)
            return result

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
    with FakeTensorMode():
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).train()
        if recomputed:
            for layer in model.model.layers:
                recompute(layer)
        optimizer = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters() for _ in range(4)]
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # Plain causal attention needs no mask; left to itself the model would write out all of it under FakeTensorMode.
        inputs = {"input_ids": ids, "attention_mask": {"full_attention": None}, "use_cache": False}
        with LiveBytes() as live:
            live.add([list(model.parameters()), list(model.buffers()), optimizer])
            state = live.now
            if way == "whole":
                sums = cross_entropy_sums(model(**inputs).logits, ids)
            else:
                kernel = partial(linear_cross_entropy, chunk_size=chunk_size(tokens))
                with head_returns_loss_sums(model.lm_head, ids, chunk_size(tokens), kernel):
                    sums = model(**inputs).logits
            mean_token_loss(sums, torch.tensor([tokens])).backward()
    return {"bytes": live.peak, "state": state}


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
        runs: dict[str, list[dict[str, float] | None]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way in ways:
                if None not in runs[way]:
                    runs[way].append(fresh("head", way=way, tokens=tokens, dtype_name=dtype))
        whole = None
        for way, found in runs.items():
            done = [run for run in found if run is not None]
            if len(done) < repeats:
                print(f"| {tokens} | {way} | does not fit | | | |", flush=True)
                continue
            size, seconds = (statistics.median(run[key] for run in done) for key in ("bytes", "seconds"))
            whole = (size, seconds) if way == "whole" else whole
            shares = (f"{size / whole[0]:.0%}", f"{seconds / whole[1]:.2f}") if whole else ("", "")
            cells = (tokens, way, f"{size / GIB:.2f}", shares[0], f"{seconds:.2f}", shares[1])
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def compare_models(sizes: list[int]) -> None:
    print(f"training step of a 0.5 B model in bf16, vocabulary {VOCABULARY}; tensors counted, not run")
    print("| tokens | layers | whole, GiB | chunked, GiB | lower by | without the state |\n|---|---|---|---|---|---|")
    for tokens in sizes:
        for recomputed in (False, True):
            whole, chunked = (fresh("model", way=way, tokens=tokens, recomputed=recomputed) for way in WAYS[:2])
            layers = "recomputed" if recomputed else "kept"
            peaks = [found["bytes"] / GIB for found in (whole, chunked)]
            saved = [1 - (chunked["bytes"] - kept) / (whole["bytes"] - kept) for kept in (0, whole["state"])]
            cells = (tokens, layers, *(f"{peak:.1f}" for peak in peaks), *(f"{share:.0%}" for share in saved))
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each case")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of computing the loss of the head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--model", action="store_true", help="count the memory of a training step of a 0.5 B model")
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
        compare_models(options.tokens)
    else:
        compare_heads(options.tokens, options.repeats, options.dtype, options.ways)


if __name__ == "__main__":
    main()
