"""Train a class of your own to read handwritten digits; README.md beside this file has the command."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mindspeed_mm import accelerator
from mindspeed_mm.models.common.module import MultiModalModule
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin, WeightInitMixin
from mindspeed_mm.training import get_args, pretrain


class DigitReader(MultiModalModule, FSDP2Mixin, WeightInitMixin):
    def __init__(self, width=128):
        super().__init__(config=None)
        self.embed = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, pixels):
        hidden = self.embed(pixels)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def datasets_provider():
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16).float(), torch.tensor(digits.target))
    sampler = DistributedSampler(data, seed=get_args().seed)  # every rank takes its own share
    return DataLoader(data, batch_size=get_args().micro_batch_size, sampler=sampler, drop_last=True), None, None


def forward_step(data_iterator, model):
    pixels, digits = (tensor.to(accelerator.device()) for tensor in next(data_iterator))
    return model(pixels), lambda logits: nn.functional.cross_entropy(logits, digits)


if __name__ == "__main__":
    pretrain(datasets_provider, DigitReader, None, forward_step)
