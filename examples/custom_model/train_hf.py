"""Train an unmodified Hugging Face class to read handwritten digits; README.md beside this file has the command."""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from mindspeed_mm import accelerator
from mindspeed_mm.training import get_args, pretrain


def model_provider():
    # Random weights; ViTForImageClassification.from_pretrained(folder) starts from published ones.
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(initializer_range=0.125, **images, **size))  # 0.02 suits wide models


def datasets_provider():
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images / 16).float().unsqueeze(1), torch.tensor(digits.target))
    sampler = DistributedSampler(data, seed=get_args().seed)  # every rank takes its own share
    return DataLoader(data, batch_size=get_args().micro_batch_size, sampler=sampler, drop_last=True), None, None


def forward_step(data_iterator, model):
    images, digits = (tensor.to(accelerator.device()) for tensor in next(data_iterator))
    return model(pixel_values=images, labels=digits), lambda output: output.loss


if __name__ == "__main__":
    pretrain(datasets_provider, model_provider, None, forward_step)
