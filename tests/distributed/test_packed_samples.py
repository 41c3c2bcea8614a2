"""``per_sample_loss`` of packs that hold different numbers of samples, on two ranks, in fp64."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from tests.models.test_packing import Case, logits_and_losses
from tests.models.tiny import save_tiny, tiny_model
from tests.ranks import RankPool

CASE = Case("qwen3_vl", "images and videos", "per_sample_loss")
PACKS = [[[0], [1, 2, 3]], [[2, 3, 0], [1]]]  # samples of each micro batch of each rank


def gradients(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the reports and the gradients of one step; runs on each rank."""
    import torch.distributed as dist

    from mindspeed_mm.arguments import set_args
    from mindspeed_mm.data.collators import PackCollator
    from mindspeed_mm.data.model_inputs import ModelInputs
    from mindspeed_mm.distributed import state
    from mindspeed_mm.distributed.fsdp2 import prepare_model
    from mindspeed_mm.engine.fsdp2 import FSDP2Engine
    from mindspeed_mm.training.reporting import merge_reports, read_quotients
    from pretrain_transformers import loss_func
    from tests.models.test_packing import build

    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    set_args(Namespace(log_tps=False))
    model = build(folder, CASE)
    prepare_model(model, state.data_parallel_group(), str(folder / "fsdp2.yaml"))
    engine = FSDP2Engine(
        model,
        torch.optim.AdamW(model.parameters()),
        group=state.data_parallel_group(),
        clip_grad=0,
        per_sample_loss=True,
    )
    collate = PackCollator(64, 0, ModelInputs(folder))
    packs = iter([collate([CASE.samples[n] for n in pack]) for pack in PACKS[dist.get_rank()]])
    reports = engine.forward_backward(lambda iterator, module: (module(**next(iterator)), loss_func), packs, 2)
    loss = read_quotients(merge_reports(reports)["loss"])
    return loss, {name: p.grad.full_tensor() for name, p in model.model.named_parameters()}


def test_each_sample_weighs_the_same(ranks2: RankPool, tmp_path: Path) -> None:
    save_tiny(CASE.family, tmp_path)
    (tmp_path / "fsdp2.yaml").write_text(
        'sharding_size: auto\nsub_modules_to_wrap: ["model.language_model.layers.{*}"]\n'
    )
    loss, found = ranks2.run(gradients, tmp_path)[0]
    model = tiny_model(CASE.family).to(CASE.dtype)
    _, losses = logits_and_losses(model, CASE.samples)
    expected = torch.stack([sample.mean() for sample in losses]).mean()  # every sample is there twice
    expected.backward()
    torch.testing.assert_close(torch.tensor(loss, dtype=torch.float64), expected.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        error = (found[name] - parameter.grad).abs().max() / max(parameter.grad.abs().max(), 1)
        assert error <= 1e-10, f"{name}: {error}"
