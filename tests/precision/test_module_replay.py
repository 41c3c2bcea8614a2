"""A module replayed from a reference's inputs, against modules whose difference is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mindspeed_mm.precision.records.record import Call
from mindspeed_mm.precision.replaying.module_replay import replay_module
from mindspeed_mm.precision.selftest.model import WIDTH, Attention, Layer, RMSNorm, Rotary


def call_of(module: nn.Module, *inputs: Any, dtype: torch.dtype = torch.float32) -> Call:
    """Run a module as a reference and keep the call, as a record does."""
    module = module.to(dtype)
    args = torch.utils._pytree.tree_map(
        lambda t: t.to(dtype).requires_grad_(True) if t.is_floating_point() else t, inputs
    )
    output = module(*args)
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(output.shape, generator=generator).to(dtype)
    (of_input,) = torch.autograd.grad(output, args[0], gradient)
    tensors = {"output.0": output.detach(), "grad_output.0": gradient, "grad_input.0": of_input}
    plain = torch.utils._pytree.tree_map(lambda t: t.detach(), args)
    return Call(plain, {}, output.detach(), tensors)


def hidden() -> Tensor:
    return torch.randn(4, 24, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.02


def made(kind: Callable[[], nn.Module], **attributes: Any) -> nn.Module:
    torch.manual_seed(0)
    module = kind()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


DTYPES = [torch.float32, torch.bfloat16]
INPUTS: dict[Any, tuple[Any, ...]] = {
    RMSNorm: (hidden(),),
    Attention: (50 * hidden(), Rotary()(torch.arange(24).expand(4, -1))),
    Layer: (hidden(), Rotary()(torch.arange(24).expand(4, -1))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", INPUTS)
def test_the_same_module_agrees(kind: Any, dtype: torch.dtype) -> None:
    call = call_of(made(kind), *INPUTS[kind], dtype=dtype)
    opinions = replay_module(made(kind), call)
    assert {opinion.what for opinion in opinions} == {"output.0", "grad_input.0"}
    assert not any(opinion.differs for opinion in opinions), opinions


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_attention_kernel_agrees(dtype: torch.dtype) -> None:
    call = call_of(made(Attention, eager=True), *INPUTS[Attention], dtype=dtype)
    assert not any(opinion.differs for opinion in replay_module(made(Attention), call))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "change"), [(RMSNorm, {"eps": 1e-5}), (Attention, {"diagonal": 1}), (Attention, {"scale": 0.4})]
)
def test_another_computation_differs(kind: Any, change: dict[str, Any], dtype: torch.dtype) -> None:
    call = call_of(made(kind), *INPUTS[kind], dtype=dtype)
    assert replay_module(made(kind, **change), call)[0].differs


def test_float64_tells_who_is_nearer() -> None:
    """A reference that has rounded inside of the module is further from the truth than the candidate."""

    class Rounded(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16().to(x.dtype))

    call = call_of(made(Rounded), *INPUTS[RMSNorm])
    output, _ = replay_module(made(RMSNorm), call)
    assert output.differs and output.candidate_error < 1e-6 < 1e-4 < output.reference_error
    assert "the candidate is nearer" in str(output)


def test_only_the_backward_pass_differs() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient / 2

    class Wrong(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(Half.apply(x))

    opinions = replay_module(made(Wrong), call_of(made(RMSNorm), *INPUTS[RMSNorm]))
    assert [opinion.differs for opinion in opinions] == [False, True]
    assert opinions[1].what == "grad_input.0" and opinions[1].apart == pytest.approx(0.5, rel=1e-3)


def test_reference_weights_are_used() -> None:
    reference = made(RMSNorm)
    with torch.no_grad():
        reference.weight.add_(torch.randn(WIDTH))
    call = call_of(reference, *INPUTS[RMSNorm])
    assert replay_module(made(RMSNorm), call)[0].differs
    weights = {name: p.detach() for name, p in reference.named_parameters()}
    assert not replay_module(made(RMSNorm), call, weights)[0].differs
