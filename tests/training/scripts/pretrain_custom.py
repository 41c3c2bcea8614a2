"""A model, a data set and a loss of the user's own, put into the forms that the migration guide shows.

``--model-class`` chooses between the guide's ways of sharding. The module names are those of its yaml.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mindspeed_mm.configs.config import mm_extra_args_provider
from mindspeed_mm.models.common.module import MultiModalModule
from mindspeed_mm.models.transformers.base_model import (
    FSDP2Mixin,
    WeightInitMixin,
    set_fullyshard_modules_to_wrap,
    set_modules_to_prefetch,
    set_recompute_modules_to_wrap,
)
from mindspeed_mm.training import get_args, pretrain, print_rank_0

WIDTH = 32


class CustomDataset(Dataset):
    def __init__(self, first, last):
        digits = load_digits()
        self.images = torch.tensor(digits.images[first:last] / 16, dtype=torch.float32)
        self.labels = torch.tensor(digits.target[first:last])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"images": self.images[index], "labels": self.labels[index]}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Position(nn.Module):
    def __init__(self):
        super().__init__()
        angles = torch.arange(9)[:, None] / 10 ** torch.linspace(0, 2, WIDTH)
        self.register_buffer("table", angles.sin(), persistent=False)

    def forward(self, x):
        return x + self.table.to(x.dtype)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TextDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1, WIDTH)
        self.rotary_pos_emb = Position()
        self.decoder = Decoder()
        self.output_layer = nn.Linear(WIDTH, 10)

    def forward(self, x):
        question = self.embedding(torch.zeros(len(x), 1, dtype=torch.long, device=x.device))
        x = self.rotary_pos_emb(torch.cat([x, question], dim=1))
        return self.output_layer(self.decoder(x)[:, -1])


class CustomModel(MultiModalModule, FSDP2Mixin, WeightInitMixin):
    """自定义模型类."""

    def __init__(self, config):
        super().__init__(config)
        self.image_encoder = nn.Linear(8, WIDTH)
        self.text_decoder = TextDecoder()

    def forward(self, images, labels):
        return self.text_decoder(self.image_encoder(images)), labels


class ModelWithStrategy(CustomModel):
    def _fully_shard(self, fsdp2_kwargs=None, fsdp2_config=None):
        """自定义fully_shard实现."""
        # 自定义重计算模块（可选）
        set_recompute_modules_to_wrap()

        # 自定义fully_shard包装模块
        set_fullyshard_modules_to_wrap()

        # 自定义预取策略（可选）
        num_to_forward_prefetch = getattr(self.fsdp2_config, "num_to_forward_prefetch", 0)
        num_to_backward_prefetch = getattr(self.fsdp2_config, "num_to_backward_prefetch", 0)
        set_modules_to_prefetch(num_to_forward_prefetch, num_to_backward_prefetch)


class ModelWithFullyShard(CustomModel):
    def fully_shard(self):
        """自定义fully_shard实现."""
        # 自定义重计算模块（可选）
        set_recompute_modules_to_wrap()

        # 自定义fully_shard包装模块
        set_fullyshard_modules_to_wrap()

        # 自定义预取策略（可选）
        num_to_forward_prefetch = getattr(self.fsdp2_config, "num_to_forward_prefetch", 0)
        num_to_backward_prefetch = getattr(self.fsdp2_config, "num_to_backward_prefetch", 0)
        set_modules_to_prefetch(num_to_forward_prefetch, num_to_backward_prefetch)


def build_dataloader(dataset):
    return DataLoader(dataset, batch_size=get_args().micro_batch_size, shuffle=True, drop_last=True)


def train_valid_test_datasets_provider():
    """Build train, valid, and test datasets."""
    # 返回您现有的数据集实例
    train_dataloader = build_dataloader(CustomDataset(0, 1200))
    valid_dataloader = build_dataloader(CustomDataset(1200, 1500))
    test_dataloader = build_dataloader(CustomDataset(1500, 1797))

    return train_dataloader, valid_dataloader, test_dataloader


def move_to_device(batch, float_dtype):
    for key, value in batch.items():
        batch[key] = value.to(dtype=float_dtype if value.is_floating_point() else None)


def get_batch(data_iterator, args):
    """Generate a batch."""
    if data_iterator is not None:
        batch = next(data_iterator)
    else:
        raise ValueError("Data iterator is None. Unable to retrieve batch.")
    move_to_device(batch, get_args().params_dtype)

    return batch


def model_provider(*args, **kwargs):
    model = globals()[get_args().model_class](config=None)
    print_rank_0(f"model: {type(model).__name__}")
    return model


def compute_loss(output_tensor):
    logits, labels = output_tensor
    return F.cross_entropy(logits.float(), labels)


def loss_func(output_tensor):
    # 基于模型输出计算损失
    loss = compute_loss(output_tensor)
    return loss


def forward_step(data_iterator, model):
    """Forward step."""
    batch_data = get_batch(data_iterator, get_args())
    output_tensor = model(**batch_data)
    return output_tensor, loss_func


def extra_args_provider(parser):
    parser = mm_extra_args_provider(parser)
    parser.add_argument("--model-class", default="CustomModel")
    return parser


if __name__ == "__main__":
    train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        None,
        forward_step,
        extra_args_provider=extra_args_provider,
        args_defaults={"dataloader_type": "external"},
    )
