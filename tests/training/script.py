"""A training script of a user's own: model, data set and plain DataLoader with nothing of ours in them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Noise(Dataset):
    """Twelve random pictures with a label; adds noise to each from torch's global random state."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(12, 6, generator=generator)
        self.labels = torch.randint(3, (12,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.images[index] + 0.1 * torch.randn(6), "y": self.labels[index]}


class Net(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.dropout(layer(x).tanh())
        return nn.functional.cross_entropy(self.head(x), y)


def datasets() -> tuple[Any, Any, Any]:
    """Return a shuffling loader; each rank draws its own order, from its own random state."""
    return DataLoader(Noise(), batch_size=2, shuffle=True), DataLoader(Noise(), batch_size=2), None


def forward_step(data_iterator: Any, model: nn.Module) -> tuple[Any, Any]:
    """Run the model on the next micro-batch."""
    return model(**next(data_iterator)), lambda loss: loss


def arguments(folder: str | Path, *flags: str, steps: int) -> None:
    """Set the command line: ``steps`` iterations with the given extra flags, saving to ``folder``."""
    yaml = Path(folder) / f"fsdp2_config_{os.environ.get('RANK', 0)}.yaml"
    yaml.write_text("sharding_size: auto\nsub_modules_to_wrap: ['layers.{*}']\n")
    sys.argv = [
        *("script.py", "--use-torch-fsdp2", "--fsdp2-config-path", str(yaml), "--micro-batch-size", "2"),
        *("--train-iters", str(steps), "--save", str(folder), "--log-interval", "3"),
        *("--lr", "1e-2", "--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--lr-decay-iters", "20"),
        *("--eval-interval", "4", "--eval-iters", "1"),
        *flags,
    ]


def train(folder: str | Path, *flags: str, steps: int = 10) -> None:
    """Train with that command line."""
    from mindspeed_mm.training import pretrain

    arguments(folder, *flags, steps=steps)
    pretrain(datasets, Net, None, forward_step)
