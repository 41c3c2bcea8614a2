"""A training job with samples on which the model's numbers are not finite, run in pool ranks."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

SAMPLES, WIDTH = 64, 6


class Samples(Dataset):
    """Numbered samples; those of ``bad`` carry a flag, those of ``without`` are not there."""

    def __init__(self, bad: tuple[int, ...] = (), without: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(SAMPLES, WIDTH, generator=generator)
        self.y = torch.randint(3, (SAMPLES,), generator=generator)
        self.bad = torch.zeros(SAMPLES)
        self.bad[list(bad)] = 1
        self.kept = [i for i in range(SAMPLES) if i not in without]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        i = self.kept[index]
        torch.rand(3)  # as an augmentation would, between the batches of a step
        return {"x": self.x[i], "y": self.y[i], "bad": self.bad[i]}

    def where(self, index: int) -> str:
        return f"samples.csv:{self.kept[index] + 1}"


class Ratio(nn.Module):
    """Is 1, and divides by zero where a sample is bad; or everywhere, by chance, when a seed of it is drawn."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, x: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
        luck = (torch.rand(()) >= self.chance).float() if self.chance else torch.ones(())
        return x * (luck * (1 - bad) / (luck * (1 - bad)))[:, None]


class Net(nn.Module):
    """Two layers; ``breaks`` is what a bad sample makes not finite: ``forward``, ``backward``, ``loss`` or ``norm``."""

    def __init__(self, breaks: str, dropout: float, chance: float) -> None:
        super().__init__()
        self.breaks = breaks
        self.layers = nn.ModuleList([nn.Linear(WIDTH, 5), nn.Linear(5, 5)])
        self.ratio = Ratio(chance)
        self.head = nn.Linear(5, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.layers[0](x).tanh())
        if self.breaks == "backward":
            zero = x.sum() * (1 - bad.max())  # sqrt has no slope at 0
            x = x + torch.sqrt(zero.pow(2)) * bad.max()
        x = self.ratio(x, bad if self.breaks == "forward" else torch.zeros_like(bad))
        x = self.dropout(self.layers[1](x).tanh())
        loss = nn.functional.cross_entropy(self.head(x), y)
        if self.breaks == "norm":
            return loss * torch.where(bad.max() > 0, 1e25, 1.0)
        return loss + torch.where(bad.max() > 0, torch.inf, 0.0) if self.breaks == "loss" else loss


def train(
    folder: str | Path,
    *flags: str,
    steps: int,
    bad: tuple[int, ...] = (),
    without: tuple[int, ...] = (),
    breaks: str = "forward",
    dropout: float = 0.0,
    chance: float = 0.0,
    plain_loader: bool = False,
) -> tuple[str, str]:
    """Train on batches of 2 samples; return everything printed and the message of the error that ended it."""
    from torch.utils.data import DataLoader

    from mindspeed_mm.data import build_mm_dataloader
    from mindspeed_mm.distributed.state import data_parallel_group
    from mindspeed_mm.errors import UserError
    from mindspeed_mm.training.failures import StoreSlot
    from mindspeed_mm.training.run import run
    from tests.training.script import arguments

    def datasets() -> Any:
        data = Samples(bad, without)
        if plain_loader:
            return DataLoader(data, batch_size=2), None, None
        param = {"dataloader_mode": "sampler", "shuffle": False, "batch_size": 2, "num_workers": 0}
        return build_mm_dataloader(data, param, data_parallel_group()), None, None

    def forward_step(iterator: Any, model: nn.Module) -> Any:
        return model(**next(iterator)), lambda loss: loss

    Path(folder).mkdir(exist_ok=True)
    arguments(folder, "--clip-grad", "0", *flags, steps=steps)
    output, message = io.StringIO(), ""
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            run(datasets, lambda: Net(breaks, dropout, chance), forward_step, None, {}, StoreSlot())
        except UserError as error:
            message = str(error)
    return output.getvalue(), message
