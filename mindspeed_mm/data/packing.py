"""Which samples share a sequence, so that little of it is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import islice


def plan_packs(lengths: Iterable[int], capacity: int, window: int) -> Iterator[list[int]]:
    """Yield packs: positions in ``lengths`` whose lengths add up to at most ``capacity``.

    The lengths are cut into windows, and each window is packed for itself by best fit decreasing (D. S. Johnson,
    1973: at most 11/9 of the fewest packs, and nearly all packs full when samples are short). So the plan of a
    window is known without those before it, no more than one window is held, and a sample moves by less than two
    windows from its place. Every position is in exactly one pack. Packs come in the order of their first samples,
    and samples in their own order, so that nothing is sorted by length.

    One pack of a window is half empty on average: a window should have a hundred packs' worth of samples.

    Args:
        lengths: tokens of each sample, read lazily.
        capacity: tokens of a pack.
        window: samples that are planned together.

    Raises:
        ValueError: a length is not within 1 and ``capacity``.
    """
    if window < 1:
        raise ValueError(f"a window of {window} samples")
    source, start = iter(lengths), 0
    while part := [int(length) for length in islice(source, window)]:
        for position, length in enumerate(part, start):
            if not 1 <= length <= capacity:
                raise ValueError(f"sample {position} has {length} tokens, a pack has {capacity}")
        for pack in _best_fit_decreasing(part, capacity):
            yield [start + position for position in pack]
        start += len(part)


def _best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left in a pack, and which; ascending
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[position]
        at = bisect_left(room, (length, -1))
        if at == len(room):
            left, pack = capacity, len(packs)
            packs.append([])
        else:
            left, pack = room.pop(at)
        packs[pack].append(position)
        if left > length:
            insort(room, (left - length, pack))
    return sorted(sorted(pack) for pack in packs)
