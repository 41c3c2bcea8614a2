"""Further mistakes, of kinds that nothing in the judge was written for."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.precision.faults import LAYERS, Fault, flags, layer, wrap_forward
from tests.training.job import Job


def softmax_scale(model: Any) -> None:
    layer(model, 1).self_attn.scaling *= 1.02


def dropout_left_on(model: Any) -> None:
    wrap_forward(layer(model, 2).mlp, lambda forward, *args: F.dropout(forward(*args), 0.1))


def residual_missing(model: Any) -> None:
    wrap_forward(layer(model, 1), lambda forward, hidden, **kwargs: forward(hidden, **kwargs) - hidden)


def gelu_by_tanh(model: Any) -> None:
    gelu = model.model.visual.merger.mlp[1]
    gelu.forward = lambda x: F.gelu(x, approximate="tanh")


def heads_of_groups_swapped(model: Any) -> None:
    attention = layer(model, 0).self_attn
    wrap_forward(attention.v_proj, lambda forward, x: forward(x).unflatten(-1, (2, -1)).flip(-2).flatten(-2))


def logits_scaled(model: Any) -> None:
    wrap_forward(model.lm_head, lambda forward, x: forward(x) * 1.001)


def weights_through_bf16(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


def rope_base(model: Any) -> None:
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq**1.01


def norm_twice(model: Any) -> None:
    norm = layer(model, 2).post_attention_layernorm
    wrap_forward(layer(model, 2).mlp, lambda forward, x: forward(norm.forward(x)))


def linear_without_bias_gradient(model: Any) -> None:
    attention = layer(model, 1).self_attn
    v = attention.v_proj
    v.forward = lambda x: F.linear(x, v.weight, v.bias * 0.5 + v.bias.detach() * 0.5)


def positions_without_images(model: Any) -> None:
    def around(forward: Any, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        plain = torch.arange(position_ids.shape[-1]).expand_as(position_ids)
        return forward(*args, position_ids=plain, **kwargs)

    wrap_forward(model.model.language_model, around)


def freeze_vision(job: Job) -> None:
    job.model["image_encoder"] = {"vision_encoder": {"freeze": True}}


def duplicated_sample(job: Job) -> None:
    job.rows[5] = job.rows[4]  # type: ignore[index]


def other_image_mean(job: Job) -> None:
    old = Path(job.data["dataset_param"]["preprocess_parameters"]["model_name_or_path"])
    new = job.folder / "processor"
    shutil.copytree(old, new)
    for path in new.glob("*processor*.json"):
        content = json.loads(path.read_text())
        for part in (content, content.get("image_processor", {})):
            if "image_mean" in part:
                part["image_mean"] = [0.5, 0.5, 0.5]
        path.write_text(json.dumps(content))
    job.data["dataset_param"]["preprocess_parameters"]["model_name_or_path"] = str(new)


def reduce_in_bf16(job: Job) -> None:
    job.yaml = {**job.yaml, "reduce_dtype": "bf16"}  # type: ignore[dict-item]


@contextlib.contextmanager
def labels_not_shifted() -> Iterator[None]:
    from mindspeed_mm.models.transformers import language_loss

    with mock.patch.object(language_loss, "shift_labels", lambda labels: labels):
        yield


@contextlib.contextmanager
def prompt_trained_too() -> Iterator[None]:
    from mindspeed_mm.models.transformers import language_loss

    original = language_loss.shift_labels

    def shift(labels: Tensor) -> Tensor:
        targets = original(labels).clone()
        targets[:, 3] = 7
        return targets

    with mock.patch.object(language_loss, "shift_labels", shift):
        yield


@contextlib.contextmanager
def one_gradient_halved() -> Iterator[None]:
    from mindspeed_mm.engine.fsdp2 import FSDP2Engine

    original = FSDP2Engine._reduce_replicated

    def reduce(self: Any) -> None:
        original(self)
        (parameter,) = (p for n, p in self.module.named_parameters() if n.endswith("layers.2.mlp.up_proj.weight"))
        parameter.grad.mul_(0.5)

    with mock.patch.object(FSDP2Engine, "_reduce_replicated", reduce):
        yield


@contextlib.contextmanager
def clipped_twice() -> Iterator[None]:
    from mindspeed_mm.engine import fsdp2

    original = fsdp2.clip_by_norm

    def clip(parameters: Any, norm: Tensor, max_norm: float) -> None:
        original(parameters, norm, max_norm)
        original(parameters, norm, max_norm)

    with mock.patch.object(fsdp2, "clip_by_norm", clip):
        yield


@contextlib.contextmanager
def with_optimizer(make: Any) -> Iterator[None]:
    from mindspeed_mm.training import optimizer_setup

    def build(groups: Any, *, lr: float, weight_decay: float, betas: Any, eps: float, **_: Any) -> Any:
        return make([g.to_optimizer_group(lr, weight_decay) for g in groups], betas=betas, eps=eps)

    with mock.patch.object(optimizer_setup, "build_optimizer", build):
        yield


def l2_decay() -> contextlib.AbstractContextManager[None]:
    return with_optimizer(torch.optim.Adam)


def eps_inside() -> contextlib.AbstractContextManager[None]:
    return with_optimizer(lambda groups, **options: AdamLike(groups, inside=True, **options))


def no_bias_correction() -> contextlib.AbstractContextManager[None]:
    return with_optimizer(lambda groups, **options: AdamLike(groups, correct=False, **options))


class AdamLike(torch.optim.Optimizer):
    """Adam written out, with what some implementations do differently."""

    def __init__(self, groups: Any, *, correct: bool = True, inside: bool = False, **defaults: Any) -> None:
        self.correct, self.inside = correct, inside
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=torch.tensor(0.0))
                state["step"] += 1
                count = float(state["step"])
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                first = state["exp_avg"] / (1 - beta1**count if self.correct else 1.0)
                second = state["exp_avg_sq"] / (1 - beta2**count if self.correct else 1.0)
                root = (second + group["eps"]).sqrt() if self.inside else second.sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, root, value=-group["lr"])


MORE: dict[str, Fault] = {
    "G01 softmax scale": Fault("forward", rf"{LAYERS}\.1\.self_attn", model=softmax_scale),
    "G02 dropout left on": Fault("forward", rf"{LAYERS}\.2\.mlp", model=dropout_left_on),
    "G03 residual missing": Fault("forward", rf"{LAYERS}\.1", model=residual_missing),
    "G04 gelu by tanh": Fault("forward", r"model\.visual\.merger\.mlp\.1", model=gelu_by_tanh),
    "G05 heads of groups swapped": Fault("forward", rf"{LAYERS}\.0\.self_attn\.v_proj", model=heads_of_groups_swapped),
    "G06 logits scaled": Fault("forward", "lm_head", model=logits_scaled),
    "G07 weights through bf16": Fault("weights", "", model=weights_through_bf16),
    "G08 rope base": Fault("weights", r"model\.language_model\.rotary_emb\.inv_freq", model=rope_base),
    "G09 norm twice": Fault("forward", rf"{LAYERS}\.2\.mlp", model=norm_twice),
    "G10 half of a bias' gradient": Fault(
        "grad_local", rf"{LAYERS}\.1\.self_attn\.v_proj\.bias", model=linear_without_bias_gradient
    ),
    "G11 positions without images": Fault(
        "forward", r"model\.language_model(\.rotary_emb)?", model=positions_without_images
    ),
    "G12 vision frozen": Fault("grad_local|backward", r"model\.visual.*", job=freeze_vision),
    "G13 duplicated sample": Fault("data", "samples", step=1, job=duplicated_sample),
    "G14 other image mean": Fault("data", "pixel_values", job=other_image_mean),
    "G15 labels not shifted": Fault("loss", "loss", program=labels_not_shifted),
    "G16 prompt trained too": Fault("loss", "loss", program=prompt_trained_too),
    "G17 one gradient halved": Fault(
        "grad_reduced", rf"{LAYERS}\.2\.mlp\.up_proj\.weight", program=one_gradient_halved
    ),
    "G18 clipped twice": Fault("grad_clipped", "", program=clipped_twice),
    "G19 L2 decay": Fault("optimizer", "exp_avg.*", program=l2_decay, evidence="decay"),
    "G20 eps inside the root": Fault("optimizer", "update.*", program=eps_inside, evidence="eps"),
    "G21 no bias correction": Fault("optimizer", "update.*", program=no_bias_correction, evidence="bias correction"),
    "G22 warm-up": Fault("optimizer", ".*", job=flags(lr_warmup_iters=2), evidence="learning rate"),
    "G23 cosine": Fault("optimizer", ".*", step=1, job=flags(lr_decay_style="cosine"), evidence="learning rate"),
    "G24 lr by 1 %": Fault("optimizer", "update.*", job=flags(lr="1.01e-2"), evidence="learning rate"),
    "G25 eps of Adam": Fault("optimizer", "update.*", job=flags(adam_eps="1e-6"), evidence="eps"),
    "G26 gradients reduced in bf16": Fault("grad_reduced", "", job=reduce_in_bf16, ranks=2),
    "G27 beta1": Fault("optimizer", "exp_avg", job=flags(adam_beta1="0.95"), evidence="beta1"),
    "G28 clip": Fault("grad_clipped", "", job=flags(clip_grad="1.0")),
}
