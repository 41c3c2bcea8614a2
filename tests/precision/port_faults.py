"""Mistakes that people make who move a model between frameworks: in its ports, its loops and its resumes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.precision.faults import LAYERS, Fault, flags, layer, wrap_forward
from tests.precision.more_faults import with_optimizer

UP = "model.language_model.layers.1.mlp.up_proj.weight"


# --- the model ------------------------------------------------------------------------------------------------------


def image_features_detached(model: Any) -> None:
    inner = model.model
    original = inner.get_image_features

    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.pooler_output = tuple(image.detach() for image in output.pooler_output)
        return output

    inner.get_image_features = get_image_features


def time_positions_doubled(model: Any) -> None:
    def around(forward: Any, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids * torch.tensor([2] + [1] * (len(position_ids) - 1))[:, None, None]
        return forward(*args, position_ids=position_ids, **kwargs)

    wrap_forward(model.model, around)


def image_tokens_one_off(model: Any) -> None:
    inner = model.model
    original = inner.get_placeholder_mask

    def get_placeholder_mask(*args: Any, **kwargs: Any) -> Any:
        images, videos = original(*args, **kwargs)
        return images.roll(1, dims=1), videos

    inner.get_placeholder_mask = get_placeholder_mask


def norm_weight_plus_one(model: Any) -> None:
    norm = layer(model, 2).post_attention_layernorm
    wrap_forward(norm, lambda forward, x: forward(x) / norm.weight * (1 + norm.weight))


def bias_left_out(model: Any) -> None:
    linear = layer(model, 1).self_attn.v_proj
    linear.forward = lambda x: F.linear(x, linear.weight)


def final_norm_left_out(model: Any) -> None:
    model.model.language_model.norm.forward = lambda x: x


def rows_without_gradient(model: Any) -> None:
    def forward(ids: Tensor) -> Tensor:
        weight = embed.weight
        return F.embedding(ids, torch.cat([weight[:100], weight[100:].detach()]))

    embed = model.model.language_model.embed_tokens
    embed.forward = forward


def residual_branch_detached(model: Any) -> None:
    wrap_forward(layer(model, 1).mlp.up_proj, lambda forward, x: forward(x.detach()))


def softmax_in_bf16(model: Any) -> None:
    def around(forward: Any, *args: Any, **kwargs: Any) -> Any:
        original = F.scaled_dot_product_attention

        def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            options.pop("enable_gqa", None)
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
            mask = mask if options.get("attn_mask") is None else options["attn_mask"]
            scores = (q @ k.transpose(2, 3) * options["scale"]).masked_fill(~mask, float("-inf"))
            return torch.softmax(scores.bfloat16(), -1).to(q.dtype).nan_to_num() @ v

        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
            assert original is not F.scaled_dot_product_attention
            return forward(*args, **kwargs)

    wrap_forward(layer(model, 1).self_attn, around)


# --- the program ----------------------------------------------------------------------------------------------------


class Careless(torch.optim.AdamW):
    """AdamW with an accident in its second step, or with one parameter that is treated otherwise in all of them."""

    def __init__(self, groups: Any, accident: Callable[[Any], None] | None = None, times: float = 1.0, **options: Any):
        self.accident, self.times, self.made = accident, times, 0
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.made == 1 and self.accident:
            self.accident(self)
        odd = self.param_groups[0]["params"][-1]
        before = odd.detach().clone()
        super().step(closure)
        odd.copy_(before + self.times * (odd - before))
        self.made += 1


class Narrow(torch.optim.AdamW):
    """AdamW whose parameters have no copy in fp32."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(parameter.bfloat16())


def state_lost() -> contextlib.AbstractContextManager[None]:
    return with_optimizer(lambda groups, **options: Careless(groups, lambda adam: adam.state.clear(), **options))


def count_lost() -> contextlib.AbstractContextManager[None]:
    def forget(adam: Any) -> None:
        for state in adam.state.values():
            state["step"].zero_()

    return with_optimizer(lambda groups, **options: Careless(groups, forget, **options))


def one_not_updated() -> contextlib.AbstractContextManager[None]:
    return with_optimizer(lambda groups, **options: Careless(groups, times=0.0, **options))


def one_updated_twice() -> contextlib.AbstractContextManager[None]:
    return with_optimizer(lambda groups, **options: Careless(groups, times=2.0, **options))


def no_copy_in_fp32() -> contextlib.AbstractContextManager[None]:
    return with_optimizer(lambda groups, **options: Narrow(groups, **options))


@contextlib.contextmanager
def average_written_back() -> Iterator[None]:
    from mindspeed_mm.engine.fsdp2 import FSDP2Engine

    original = FSDP2Engine.optimizer_step

    def optimizer_step(self: Any) -> Any:
        result = original(self)
        with torch.no_grad():
            next(p for name, p in self.module.named_parameters() if name.endswith(UP)).mul_(0.999)
        return result

    with mock.patch.object(FSDP2Engine, "optimizer_step", optimizer_step):
        yield


@contextlib.contextmanager
def gradients_left_over() -> Iterator[None]:
    with mock.patch.object(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None):
        yield


@contextlib.contextmanager
def norm_of_each_rank() -> Iterator[None]:
    from mindspeed_mm.engine import fsdp2

    def norm(parameters: Any) -> Tensor:
        local = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in parameters if p.grad is not None]
        return torch.stack([gradient.norm() for gradient in local]).norm()

    with mock.patch.object(fsdp2, "total_grad_norm", norm):
        yield


PORT: dict[str, Fault] = {
    "G29 image features detached": Fault("backward", "model", model=image_features_detached),
    "G30 time positions doubled": Fault("forward", "model", model=time_positions_doubled),
    "G31 image tokens one off": Fault("forward", "model", model=image_tokens_one_off),
    "G32 norm weight plus one": Fault("forward", rf"{LAYERS}\.2\.post_attention_layernorm", model=norm_weight_plus_one),
    "G33 bias left out": Fault("forward", rf"{LAYERS}\.1\.self_attn\.v_proj", model=bias_left_out),
    "G34 final norm left out": Fault("forward", r"model\.language_model\.norm", model=final_norm_left_out),
    "G35 rows without gradient": Fault(
        "grad_local", r"model\.language_model\.embed_tokens\.weight", model=rows_without_gradient
    ),
    "G36 branch detached": Fault("backward", rf"{LAYERS}\.1\.mlp\.up_proj", model=residual_branch_detached),
    "G37 softmax in bf16": Fault("forward", rf"{LAYERS}\.1\.self_attn", model=softmax_in_bf16),
    "G38 optimizer state lost": Fault("optimizer", "step", step=1, program=state_lost, evidence="lost"),
    "G39 step count lost": Fault("optimizer", "step", step=1, program=count_lost, evidence="count"),
    "G40 one parameter not updated": Fault("optimizer", r"update of \S*weight", program=one_not_updated),
    "G41 one parameter updated twice": Fault("optimizer", r"update of \S*weight", program=one_updated_twice),
    "G42 no copy in fp32": Fault("optimizer", "update.*", program=no_copy_in_fp32, evidence="bfloat16"),
    "G43 average written back": Fault("weights", UP.replace(".", r"\."), step=1, program=average_written_back),
    "G44 gradients left over": Fault("grad_reduced", "", step=1, program=gradients_left_over),
    "G45 learning rate of the vision tower": Fault(
        "optimizer",
        r"update of model\.visual",
        job=flags(lr_scale_modules=["visual"], lr_mult="0.1"),
        evidence="learning rate",
    ),
    "G46 decay of the vision tower": Fault(
        "optimizer", r"update of model\.visual", job=flags(weight_decay_exclude_modules=["visual"]), evidence="decay"
    ),
    "G47 each rank's own norm": Fault("grad_clipped", "", program=norm_of_each_rank, ranks=2),
}
