"""The host does not wait for the device on steps that do not log."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import RankPool

READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "nonzero", "equal"}


class Reads(TorchFunctionMode):
    """Counts where Python reads a tensor's value. ``.numpy()`` is none: it is refused for device tensors."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            type(self).count += 1
        return func(*args, **(kwargs or {}))


class InnerReads(TorchDispatchMode):
    """Counts the reads that torch's own code makes below Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            Reads.count += 1
        return func(*args, **(kwargs or {}))


def reads_per_step(folder: str, *flags: str) -> list[int]:
    """Train six steps, the fourth of which logs, and count the reads between the batches."""
    import torch.distributed as dist

    from mindspeed_mm.training import pretrain
    from tests.training.script import Net, arguments

    Reads.count = 0
    marks: list[int] = []

    class Batches:
        def __iter__(self) -> Any:
            return self

        def __next__(self) -> dict[str, torch.Tensor]:
            marks.append(Reads.count)
            return {"x": torch.ones(2, 6), "y": torch.tensor([0, dist.get_rank()])}

    def forward_step(iterator: Any, model: Any) -> Any:
        return model(**next(iterator)), lambda loss: (loss, {"loss": loss.detach(), "constant": 2.5})

    arguments(folder, "--log-interval", "4", "--clip-grad", "0.1", *flags, steps=7)
    with Reads(), InnerReads():
        pretrain(lambda: (Batches(), None, None), Net, None, forward_step)
    return [after - before for before, after in pairwise(marks)]


def test_only_logging_steps_read_values(ranks2: RankPool, tmp_path: Path) -> None:
    for counts in ranks2.run(reads_per_step, str(tmp_path)):
        assert counts[3] > 0, "the fourth step logs, so the count would see a read"
        assert counts[:3] + counts[4:] == [0] * 5
