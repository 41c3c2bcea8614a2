"""Train on numbers, and write down which rank took which of them in which step."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mindspeed_mm.data import build_mm_dataloader
from mindspeed_mm.distributed.state import data_parallel_group
from mindspeed_mm.training import get_args, pretrain

UNEVEN = os.environ.get("NUMBERS_UNEVEN")


class Numbers(Dataset):
    """Samples 0 to 21, as floats."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


class Net(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x / 22)


def loaders() -> tuple[Any, Any, Any]:
    """Return the loaders of data.json's kind, or ones that have another number of batches on every rank."""
    args = get_args()
    if UNEVEN:
        mine = [torch.tensor([[10.0 * args.rank + n]]) for n in range(2 + args.rank)]
        return iter(mine) if UNEVEN == "ends" else DataLoader(mine, batch_size=None), mine, None
    keys = {"batch_size": args.micro_batch_size, "global_batch_size": args.global_batch_size, "seed": args.seed}
    keys |= {"num_workers": args.num_workers, "drop_last": False}
    return build_mm_dataloader(Numbers(), keys, data_parallel_group(), args.consumed_train_samples), None, None


def forward_step(data_iterator: Any, model: nn.Module) -> tuple[Any, Any]:
    """Write the numbers down; the reported loss is their mean."""
    args, batch = get_args(), next(data_iterator)
    if model.training:
        with open(f"{args.save}/taken_{args.world_size}_{args.rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([args.iteration, batch.flatten().int().tolist()]) + "\n")
    return model(batch), lambda output: (output.mean(), {"loss": batch.mean()})


if __name__ == "__main__":
    pretrain(loaders, Net, None, forward_step)
