"""Mistakes that ports of models make, each as one change of a tiny run on the training path.

A fault is a change of the model once it is built, of the job's files and flags, or of the program around both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mindspeed_mm.precision.selftest.faults import HalfSiLU
from tests.training.job import Job

LAYERS = "model.language_model.layers"


@dataclass(frozen=True)
class Fault:
    """One mistake and where it has to be found.

    Attributes:
        phase, site, step: the right answer; ``site`` is a regular expression for the whole path.
        model: changes the Hugging Face model.
        job: changes files and flags.
        program: a context in which the run is made.
        ranks: that it takes.
        evidence: a word that the answer has to hold.
    """

    phase: str
    site: str
    step: int = 0
    model: Callable[[Any], None] | None = None
    job: Callable[[Job], None] | None = None
    program: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    ranks: int = 1
    evidence: str = ""


def layer(model: Any, index: int) -> Any:
    return model.model.language_model.layers[index]


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Let ``around(forward, *args, **kwargs)`` stand for a module's forward."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: around(forward, *args, **kwargs)  # type: ignore[method-assign]


# --- the model ------------------------------------------------------------------------------------------------------


def norm_eps(model: Any) -> None:
    layer(model, 0).input_layernorm.variance_epsilon = 1e-5


def rope_in_bf16(model: Any) -> None:
    rotary = model.model.language_model.rotary_emb

    def around(forward: Any, x: Tensor, position_ids: Tensor) -> Any:
        exact = rotary.inv_freq
        rotary.inv_freq = exact.bfloat16().float()
        try:
            return forward(x, position_ids)
        finally:
            rotary.inv_freq = exact

    wrap_forward(rotary, around)


def mask_off_by_one(model: Any) -> None:
    def around(forward: Any, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        length = hidden.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril(1)[None, None]
        return forward(*args, attention_mask=mask, **kwargs)

    wrap_forward(layer(model, 1).self_attn, around)


def embedding_in_bf16(model: Any) -> None:
    embed = model.model.language_model.embed_tokens

    def forward(ids: Tensor) -> Tensor:
        other = torch.bfloat16 if embed.weight.dtype == torch.float32 else torch.float32
        return F.embedding(ids, embed.weight.to(other)).to(torch.float32)

    embed.forward = forward


def permuted_heads(model: Any) -> None:
    q = layer(model, 1).self_attn.q_proj
    size = layer(model, 1).self_attn.head_dim
    order = torch.arange(len(q.weight)).view(-1, size)[[1, 0, 2, 3]].flatten()
    with torch.no_grad():
        q.weight.copy_(q.weight[order].clone())
        q.bias.copy_(q.bias[order].clone())


def activation_backward(model: Any) -> None:
    layer(model, 1).mlp.act_fn.forward = HalfSiLU.apply


def images_reversed(model: Any) -> None:
    inner = model.model
    original = inner.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.pooler_output = tuple(reversed([image.flip(0) for image in output.pooler_output]))
        return output

    inner.get_image_features = get_image_features


# --- the job --------------------------------------------------------------------------------------------------------


def flags(**changes: Any) -> Callable[[Job], None]:
    return lambda job: job.flags.update({name.replace("_", "-"): value for name, value in changes.items()})


def mean_of_means(job: Job) -> None:
    job.model["loss_cfg"] = {"loss_type": "default"}


def stale_sampler(job: Job) -> None:
    batch = job.flags["global-batch-size"]
    job.rows[batch], job.rows[2 * batch] = job.rows[2 * batch], job.rows[batch]  # type: ignore[index]


# --- the program ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def partial_norm() -> Iterator[None]:
    from mindspeed_mm.engine import fsdp2

    original = fsdp2.total_grad_norm
    with mock.patch.object(fsdp2, "total_grad_norm", lambda parameters: original(list(parameters)[:10])):
        yield


def vision_left_to_itself(job: Job) -> None:
    job.yaml = {
        **job.yaml,  # type: ignore[dict-item]
        "sub_modules_to_wrap": ["model.language_model.layers.{*}"],
        "ignored_modules": ["model.visual"],
    }


@contextlib.contextmanager
def vision_not_reduced() -> Iterator[None]:
    """The vision tower is left out of the reduction: each rank keeps its own gradient, as if it were the global one."""
    from mindspeed_mm.engine.fsdp2 import FSDP2Engine

    def keep(self: Any) -> None:
        for parameter in self.replicated:
            if parameter.grad is not None:
                parameter.grad.mul_(self.world_size)

    with mock.patch.object(FSDP2Engine, "_reduce_replicated", keep):
        yield


FAULTS: dict[str, Fault] = {
    "F01 norm eps": Fault("forward", rf"{LAYERS}\.0\.input_layernorm", model=norm_eps),
    "F02 decay of biases and norms": Fault("optimizer", "update.*", job=flags(weight_decay_all=True), evidence="decay"),
    "F03 rope in bf16": Fault("forward", r"model\.language_model\.rotary_emb", model=rope_in_bf16),
    "F04 mean of micro-batch means": Fault("loss", "loss", job=mean_of_means),
    "F05 vision tower not reduced": Fault(
        "grad_reduced", r"model\.visual.*", job=vision_left_to_itself, program=vision_not_reduced, ranks=2
    ),
    "F06 mask off by one": Fault("forward", rf"{LAYERS}\.1\.self_attn", model=mask_off_by_one),
    "F07 stale sampler": Fault("data", "samples", step=1, job=stale_sampler),
    "F08 embedding in bf16": Fault("forward", r"model\.language_model\.embed_tokens", model=embedding_in_bf16),
    "F09 permuted heads": Fault("weights", rf"{LAYERS}\.1\.self_attn\.q_proj", model=permuted_heads),
    "F10 beta2": Fault("optimizer", "exp_avg_sq.*", job=flags(adam_beta2="0.999"), evidence="beta2"),
    "F11 clipping by a partial norm": Fault("grad_clipped", "", program=partial_norm),
    "F12 backward of the activation": Fault("backward", rf"{LAYERS}\.1\.mlp\.act_fn", model=activation_backward),
    "F13 images reversed": Fault("forward", "model", model=images_reversed),
}
