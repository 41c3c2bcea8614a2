"""Which rank takes which part of a global batch, so that no rank waits long for another."""

from __future__ import annotations

import numpy as np

_TIE = 1e-6


def balance(work: np.ndarray, micro_batches: int, ranks: int) -> np.ndarray:
    """Spread a global batch over ranks and micro batches.

    Sharded ranks run every micro batch in step, so a step lasts as long as the sum over micro batches of the most
    work that a rank has in each. Units are sorted by the kind of work of which they have the largest share, and cut
    into micro batches of all ranks: what runs at the same time is alike. Within one, the next unit goes to the rank
    with room to which it adds the least square of work, of each kind for itself, and, if several are alike, to the
    one with the least work before.

    Args:
        work: of each unit, (G, K): K kinds (tokens, image patches), each weighed by its share in the global batch.
        micro_batches: of a rank.
        ranks: that share the global batch.

    Returns:
        The units of each micro batch of each rank, (micro_batches, ranks, G / (micro_batches * ranks)) int64.
    """
    work = np.asarray(work, dtype=float)
    work = work / np.maximum(work.sum(axis=0), 1)
    room = len(work) // (micro_batches * ranks)
    before = np.zeros_like(work, shape=(ranks, work.shape[1]))
    result = np.empty((micro_batches, ranks, room), dtype=np.int64)
    order = np.argsort(-work.max(axis=1), kind="stable")
    for number, layer in enumerate(order.reshape(micro_batches, -1)):
        load = before * _TIE  # what came before only decides between ranks that are alike now
        count = np.zeros(ranks, dtype=int)
        for unit in layer:
            added = load @ work[unit]
            added[count == room] = np.inf
            rank = added.argmin()
            result[number, rank, count[rank]] = unit
            count[rank] += 1
            load[rank] += work[unit]
            before[rank] += work[unit]
    return np.sort(result, axis=2)


def slowdown(work: np.ndarray, assignment: np.ndarray) -> float:
    """Return how much longer than with work spread evenly a step lasts whose ranks run every micro batch in step.

    Args:
        work: of each unit, (G,).
        assignment: see `balance`.
    """
    load = work[assignment].sum(axis=2)
    return float(load.max(axis=1).sum() / load.mean(axis=1).sum())
