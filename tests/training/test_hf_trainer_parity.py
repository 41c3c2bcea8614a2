"""Hugging Face Trainer and our engine make the same 50 steps: same weights, samples, order and hyper-parameters.

Trainer passes the tokens of the global batch to its text classes only: they are trained as our per-token loss does it,
its vision-language classes as our default loss does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.tiny import save_tiny, tiny_batch, tiny_model
from tests.ranks import RankPool

STEPS, BATCH, LR, DECAY, CLIP = 50, 2, 1e-3, 0.01, 1.0
LOSS_TYPE = {"qwen3_vl": "default", "qwen3": "per_token_loss"}


def micro_batch(family: str, index: int) -> dict[str, Tensor]:
    """Return two samples of uneven lengths, padded; with vision one of them has an image."""
    images = [index % 2, 1 - index % 2] if family == "qwen3_vl" else [0, 0]
    batch = tiny_batch(family, images=images, length=14, seed=index)
    shorter = 1 + index % 5
    row = index % 2
    for name, value in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
        batch[name][row, -shorter:] = value
    return batch


def by_trainer(family: str, accumulation: int, folder: Path) -> dict[str, Any]:
    """Let Hugging Face Trainer train; it logs the loss of every step."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,  # an item of the data set is a whole micro-batch
        gradient_accumulation_steps=accumulation,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    model = tiny_model(family)
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=[micro_batch(family, index) for index in range(STEPS * accumulation)],
        data_collator=lambda items: items[0],
    )
    assert bool(trainer.model_accepts_loss_kwargs) == (LOSS_TYPE[family] == "per_token_loss")
    trainer.train()
    rows = [row for row in trainer.state.log_history if "grad_norm" in row]
    return {
        "losses": [row["loss"] for row in rows],
        "norms": [float(row["grad_norm"]) for row in rows],
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
    }


def by_engine(family: str, accumulation: int, folder: str) -> dict[str, Any]:
    """Train in a pool rank on our road."""
    from argparse import Namespace

    from torch.distributed.tensor import DTensor

    from mindspeed_mm.arguments import set_args
    from mindspeed_mm.distributed import state
    from mindspeed_mm.distributed.fsdp2 import prepare_model
    from mindspeed_mm.engine.fsdp2 import FSDP2Engine
    from mindspeed_mm.models.transformers_model import TransformersModel
    from mindspeed_mm.optimizer import build_optimizer, build_param_groups
    from mindspeed_mm.training.reporting import merge_reports, read_quotients
    from pretrain_transformers import loss_func

    state.initialize(None, state.RankInfo.from_environment(), backend="gloo", timeout=None)
    set_args(Namespace(log_tps=False))
    model = TransformersModel({"init_from_hf_path": folder, "loss_cfg": {"loss_type": LOSS_TYPE[family]}})
    prepare_model(model, state.data_parallel_group())
    optimizer = build_optimizer(
        build_param_groups(model.named_parameters()),
        name="adam",
        selection="fused_torch_adamw",
        lr=LR,
        weight_decay=DECAY,
        betas=(0.9, 0.999),
        eps=1e-8,
        momentum=0.0,
        ema_decay=0.0,
    )
    for group in optimizer.param_groups:
        group["weight_decay"] = DECAY * group["wd_mult"]
    engine = FSDP2Engine(
        model,
        optimizer,
        group=state.data_parallel_group(),
        clip_grad=CLIP,
        per_token_loss=LOSS_TYPE[family] == "per_token_loss",
    )
    batches = (micro_batch(family, index) for index in range(STEPS * accumulation))
    losses, norms = [], []
    for _ in range(STEPS):
        reports = engine.forward_backward(lambda it, module: (module(**next(it)), loss_func), batches, accumulation)
        norms.append(float(engine.optimizer_step().grad_norm))
        losses.append(read_quotients(merge_reports(reports)["loss"]))
    named = model.model.named_parameters()
    full = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in named}
    return {"losses": losses, "norms": norms, "parameters": full}


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative L2 distance of all the parameters together."""
    gap = sum((ours[name] - theirs[name]).double().square().sum() for name in theirs)
    return float((gap / sum(p.double().square().sum() for p in theirs.values())).sqrt())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3"])
def test_fifty_steps_of_hugging_face_trainer(family: str, accumulation: int, ranks1: RankPool, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the rank has
    try:
        theirs = by_trainer(family, accumulation, tmp_path / "trainer")
    finally:
        torch.set_num_threads(threads)
    (ours,) = ranks1.run(by_engine, family, accumulation, str(save_tiny(family, tmp_path / "hf")))
    assert len(theirs["losses"]) == STEPS
    assert worst(ours["losses"], theirs["losses"]) <= 1e-6
    # Later norms show how Adam amplifies the last bits of parameters whose true gradient is zero.
    assert worst(ours["norms"][:10], theirs["norms"][:10]) <= 1e-6
    assert distance(ours["parameters"], theirs["parameters"]) <= 1e-6
    assert distance(tiny_model(family).state_dict(), theirs["parameters"]) > 1e-2, "they have been trained"
