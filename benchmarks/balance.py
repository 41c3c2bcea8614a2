"""How long ranks wait for one another with and without --use-data-balance, and what planning the batches costs.

    python benchmarks/balance.py

The samples are a log-normal mix: two of three have an image, whose patches count as a quarter of a token each, and
text. Sharded ranks run every micro batch in step, so a step lasts as long as the sum over micro batches of the most
work that a rank has. Printed is that over the work spread evenly, for tokens and for patches; 1 is no waiting. One
sample is never split: no assignment whatever is better than the bound for tokens. It is arithmetic on the host, the
same on every machine; only the times are this machine's.
"""

from __future__ import annotations

import time

import numpy as np

from mindspeed_mm.data.balance import balance, slowdown
from mindspeed_mm.data.samplers import DistributedBatchSampler, Position

BATCHES = 20


def log_normal(samples: int, seed: int = 0) -> np.ndarray:
    """Return tokens and patches of samples, (samples, 2)."""
    generator = np.random.default_rng(seed)
    patches = generator.lognormal(6.5, 0.8, samples) * (generator.random(samples) < 2 / 3)
    return np.stack([generator.lognormal(5.5, 1.0, samples) + patches / 4 + 1, patches], axis=1).round()


def bound(work: np.ndarray, micro_batches: int, ranks: int) -> float:
    """Return what no assignment undercuts: the largest sample of each micro step, if those are as alike as can be."""
    largest = np.sort(work)[::-1].reshape(micro_batches, -1)[:, 0]
    return max(1.0, float(largest.sum() / (work.sum() / ranks)))


def main() -> None:
    """Print both tables."""
    titles = ("ranks", "micro batches", "samples each", "tokens", "balanced", "bound", "patches", "balanced", "ms")
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for ranks, micro_batches, size in ((8, 1, 8), (8, 8, 1), (8, 4, 4), (64, 1, 4), (64, 8, 1)):
        batch = ranks * micro_batches * size
        in_order = np.arange(batch).reshape(micro_batches, ranks, size)
        found, seconds = [], 0.0
        for work in np.split(log_normal(BATCHES * batch), BATCHES):
            start = time.perf_counter()
            spread = balance(work, micro_batches, ranks)
            seconds += time.perf_counter() - start
            tokens, patches = ([slowdown(kind, order) for order in (in_order, spread)] for kind in work.T)
            found.append([*tokens, bound(work[:, 0], micro_batches, ranks), *patches])
        figures = " | ".join(f"{value:.2f}" for value in np.mean(found, axis=0))
        print(f"| {ranks} | {micro_batches} | {size} | {figures} | {seconds / BATCHES * 1e3:.1f} |")

    samples = 10_000_000
    sampler = DistributedBatchSampler(samples, 1, 0, 64, seed=1, global_batch_size=512)
    for place in (0, samples // 2, samples - 1000):
        start = time.perf_counter()
        sampler.start_at(Position(3, *divmod(place, 2**16)))
        next(iter(sampler))
        print(f"to sample {place} of epoch 3 of {samples}: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
