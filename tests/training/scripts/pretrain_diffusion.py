"""The shape of the guide's tutorial: frozen encoders, one trained predictor, the loss computed by the model itself."""

from __future__ import annotations

import torch
from megatron.core.enums import ModelType
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mindspeed_mm.configs.config import mm_extra_args_provider
from mindspeed_mm.data.data_utils.utils import build_iterations
from mindspeed_mm.models.common.module import MultiModalModule
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin, WeightInitMixin
from mindspeed_mm.training import average_losses_across_data_parallel_group, get_args, pretrain, unwrap_model


class CustomVAE(MultiModalModule):
    def __init__(self, latent):
        super().__init__(config=None)
        self.project = nn.Linear(64, latent)
        self.norm = nn.BatchNorm1d(latent)  # its statistics would move if train() reached it

    def encode(self, x):
        return self.norm(self.project(x))


class CustomTextEncoder(MultiModalModule):
    def __init__(self, width):
        super().__init__(config=None)
        self.embedding = nn.Embedding(10, width)

    def encode(self, tokens):
        return self.embedding(tokens)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x, condition):
        return x + self.mlp(self.norm(x + condition))


class CustomDiT(MultiModalModule):
    def __init__(self, latent, width, depth):
        super().__init__(config=None)
        self.proj_in = nn.Linear(latent, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.proj_out = nn.Linear(width, latent)

    def forward(self, noisy, time, prompt):
        x, condition = self.proj_in(noisy), self.time(time) + prompt
        for block in self.blocks:
            x = block(x, condition)
        return self.proj_out(x)


class CustomModel(nn.Module, FSDP2Mixin, WeightInitMixin):
    def __init__(self, config):
        super().__init__()
        self.config = None
        self.ae = CustomVAE(config.latent).eval().requires_grad_(False)
        self.text_encoder = CustomTextEncoder(config.width).eval().requires_grad_(False)
        self.predictor = CustomDiT(config.latent, config.width, config.depth)
        self.train()

    def set_input_tensor(self, input_tensor):
        self.input_tensor = input_tensor

    def train(self, mode=True):
        self.predictor.train(mode)
        return self

    def state_dict(self, prefix="", keep_vars=False):
        return self.predictor.state_dict(prefix=prefix, keep_vars=keep_vars)

    def forward(self, video, prompt):
        with torch.no_grad():
            latents, prompt = self.ae.encode(video), self.text_encoder.encode(prompt)
        noise, time = torch.randn_like(latents), torch.rand(len(latents), 1)
        target = noise - latents
        return (self.predictor((1 - time) * latents + time * noise, time, prompt) - target).square().mean()


def model_provider(pre_process=True, post_process=True):
    return CustomModel(get_args().mm.model.custom)


def get_batch(data_iterator):
    video, prompt = next(data_iterator)
    return {"video": video, "prompt": prompt}


def loss_func(output):
    loss = output.mean()
    averaged = average_losses_across_data_parallel_group([loss])
    return loss.unsqueeze(0), {"loss": averaged[0]}


def forward_step(data_iterator, model):
    assert not unwrap_model(model).ae.training
    return model(**get_batch(data_iterator)), loss_func


def train_valid_test_datasets_provider(train_val_test_num_samples):
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    loader = DataLoader(TensorDataset(pixels, torch.tensor(digits.target)), get_args().micro_batch_size, shuffle=True)
    train, _, _ = build_iterations(loader)
    return train, None, None


if __name__ == "__main__":
    train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        extra_args_provider=mm_extra_args_provider,
        args_defaults={"dataloader_type": "external", "vision_pretraining": False, "curr_forward_iteration": 0},
    )
