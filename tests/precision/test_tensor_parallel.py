"""Activations, gradients and parameters of a model in tensor parallelism have the sketches of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mindspeed_mm.precision.recording.batch import read_batch
from mindspeed_mm.precision.recording.hooks import ModuleHooks
from mindspeed_mm.precision.recording.pool import StepPool
from mindspeed_mm.precision.recording.rows import BatchRows
from mindspeed_mm.precision.records.record import Key, RankStep, Record, RecordWriter
from mindspeed_mm.precision.records.sketch import distance
from tests.ranks import RankPool


class Block(nn.Module):
    """A norm and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(10), nn.Linear(10, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 10), nn.Linear(10, 30, bias=False)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def one_step(model: nn.Module, speaks: bool) -> RankStep:
    """Return what a forward and backward pass over a padded batch computes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 30, (3, 8), generator=generator)
    mask = (torch.arange(8) < torch.tensor([[8], [5], [6]])).long()
    pool = StepPool(speaks)
    hooks = ModuleHooks(model, pool)
    hooks.install()
    hooks.begin_micro_batch(BatchRows(read_batch({"input_ids": ids, "attention_mask": mask}), torch.device("cpu")))
    logits = model(ids, mask)
    (logits.log_softmax(-1)[..., 3] * mask).sum().backward()
    hooks.remove()
    for name, parameter in model.named_parameters():
        pool.add_whole(Key("weights", name, "parameter"), parameter)
        pool.add_whole(Key("grad_reduced", name, "gradient"), parameter.grad)
    return RankStep(entries=pool.read())


def in_parallel(folder: str, sequence: bool) -> None:
    """Record the model in tensor parallelism over all ranks, with the sequence split between the layers too."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = Model()
    for layer in model.layers:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            plan |= {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            }
            into = PrepareModuleInput(
                input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=False
            )
            parallelize_module(layer, mesh, plan)
            parallelize_module(layer, mesh, into)
            layer.register_forward_hook(lambda module, args, output: output.full_tensor())
        else:
            parallelize_module(layer, mesh, plan)
    data = one_step(model, speaks=dist.get_rank() == 0)
    RecordWriter(folder, dist.get_rank(), dist.get_world_size()).write(0, data)


@pytest.mark.parametrize("sequence", [False, True])
def test_a_model_in_parts_has_the_sketches_of_the_whole(sequence: bool, ranks2: RankPool, tmp_path: Path) -> None:
    RecordWriter(tmp_path, 0, 2).start({})
    ranks2.run(in_parallel, str(tmp_path), sequence)
    torch.manual_seed(0)
    expected = one_step(Model(), speaks=True).entries
    found = Record.open(tmp_path).step(0).entries
    assert found.keys() == expected.keys()
    for key, sketch in expected.items():
        apart = distance(found[key], sketch)
        assert apart.relative < 1e-5, key
        assert found[key].count == sketch.count and found[key].shape == sketch.shape, key
        assert apart.norm_gap < 1e-5, key
    assert 0 < sum(sketch.estimated for sketch in found.values()) < len(found) / 4
