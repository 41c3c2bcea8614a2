"""Every key of ``fsdp2_config.yaml`` must have its effect, on two real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from mindspeed_mm.configs.fsdp2 import Fsdp2Config
from mindspeed_mm.distributed import fsdp2
from mindspeed_mm.distributed.replicas import start_alike
from mindspeed_mm.engine.fsdp2 import FSDP2Engine
from mindspeed_mm.errors import UserError
from tests.distributed.tiny import Tiny, assert_same_gradients, batches, full, loss_of, shard, tiny
from tests.ranks import RankPool

LAYERS = {"sharding_size": "auto", "sub_modules_to_wrap": ["layers.{*}"]}


def check_error(words: str, keys: dict[str, Any], model: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=words):
        shard(tiny(**model), **keys)


@pytest.mark.parametrize(
    ("words", "keys", "model"),
    [
        ("sharding_size: 3 does not divide the 2", {"sharding_size": 3}, {}),
        (
            "sub_modules_to_wrap: 'layer.{.}' matches no module.*layers.{0-2}",
            {"sub_modules_to_wrap": ["layer.{*}"]},
            {},
        ),
        ("sub_modules_to_wrap: 'layers' is a ModuleList.*layers.{.}", {"sub_modules_to_wrap": ["layers"]}, {}),
        ("recompute_modules: 'layers' is a ModuleList", {"recompute_modules": ["layers"]}, {}),
        (
            "'tower.0' is in sub_modules_to_wrap and inside ignored_modules",
            {"sub_modules_to_wrap": ["tower.0"], "ignored_modules": ["tower"]},
            {},
        ),
        ("'embed.weight' and 'head.weight' are one tied", {"sub_modules_to_wrap": ["head"]}, {"tied": True}),
        ("reshard_after_forward: 3", {**LAYERS, "reshard_after_forward": 3}, {}),
        ("moe_modules: .* is not available", {"moe_modules": ["layers.{*}"]}, {}),
        ("reshard_local_experts", {"reshard_local_experts": False}, {}),
        ("align_fsdp_param_groups", {"align_fsdp_param_groups": True}, {}),
    ],
)
def test_values_that_do_not_fit(ranks2: RankPool, words: str, keys: dict[str, Any], model: dict[str, Any]) -> None:
    ranks2.run(check_error, words, keys, model)


def check_parity(keys: dict[str, Any], model: dict[str, Any]) -> list[str]:
    sharded = tiny(**model)
    plan = shard(sharded, **keys)
    assert plan.ignored == []
    assert_same_gradients(sharded, tiny(**model))
    return plan.lines()


@pytest.mark.parametrize("sharding_size", ["auto", 1])
@pytest.mark.parametrize(
    ("keys", "model"),
    [
        ({"sub_modules_to_wrap": ["layers.{*}"]}, {}),
        ({"sub_modules_to_wrap": ["layers.{0-1}", "tower"]}, {"frozen": ("tower",)}),
        ({"sub_modules_to_wrap": ["layers.{0,2}"]}, {"tied": True}),
        ({"sub_modules_to_wrap": ["head", "layers.{*}", "embed"]}, {"tied": True, "frozen": ("layers.0",)}),
        ({"sub_modules_to_wrap": [], "recompute_modules": ["layers.{*}"]}, {"width": 1}),
    ],
)
def test_gradients_equal_one_process(
    ranks2: RankPool, ranks1: RankPool, sharding_size: Any, keys: dict[str, Any], model: dict[str, Any]
) -> None:
    keys = {"sharding_size": sharding_size, **keys}
    ranks2.run(check_parity, keys, model)
    ranks1.run(check_parity, keys, model)


def check_sharding_size() -> None:
    for value in ("auto", 2, 1, None):
        model = tiny()
        shard(model, sharding_size=value, sub_modules_to_wrap=["layers.{*}"])
        weight = model.layers[0].linear.weight
        if value in ("auto", 2):
            assert weight.placements == (Shard(0),)
            assert weight.to_local().shape == ((3, 5) if dist.get_rank() == 0 else (2, 5))
        else:
            assert weight.placements == (Replicate(), Shard(0)) and weight.device_mesh.shape == (2, 1)
            assert weight.to_local().shape == (5, 5)


def test_sharding_size(ranks2: RankPool) -> None:
    ranks2.run(check_sharding_size)


def check_wrapping() -> list[str]:
    model = tiny()
    plan = shard(model, **{**LAYERS, "sub_modules_to_wrap": ["layers.{0,2}", "layers.{0-1}.linear"]})
    wrapped = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert wrapped == ["", "layers.0", "layers.0.linear", "layers.1.linear", "layers.2"]
    return plan.lines()


def test_sub_modules_to_wrap_and_the_printed_plan(ranks2: RankPool) -> None:
    lines = ranks2.run(check_wrapping)[0]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert rows["layers.{0,2}"] == ["2", "30"] and rows["layers.{0-1}.linear"] == ["2", "60"]
    assert rows["left"][-1] == "121"
    assert "2 rank(s) = 1 replica(s) x 2 shard(s)" in lines[0]


def check_left_out() -> list[list[str]]:
    model = tiny()
    model._no_split_modules = {"Block"}
    lines = [shard(model, sharding_size="auto").notes, shard(tiny()).notes]
    assert [isinstance(module, FSDPModule) for module in model.layers] == [True] * 3
    return lines


def test_left_out_wrapping_follows_no_split_modules(ranks2: RankPool) -> None:
    named, unnamed = ranks2.run(check_left_out)[0]
    assert "layers.{0-2} (3)" in named[0]
    assert "root only" in unnamed[0]


def check_ignored() -> None:
    model = tiny()
    plan = shard(model, **LAYERS, ignored_modules=["tower"])
    names = ["tower.0.weight", "tower.0.bias", "tower.1.weight", "tower.1.bias"]
    assert [name for name, _ in plan.ignored] == names
    loss_of(model, batches(2)[dist.get_rank()]).backward()
    for name, param in plan.ignored:
        assert not isinstance(param, DTensor), name
    gradient = model.tower[0].weight.grad
    other = gradient.clone()
    dist.broadcast(other, 0)
    assert torch.equal(other, gradient) == (dist.get_rank() == 0), "FSDP reduced an ignored gradient"


def check_ignored_in_mixed_precision() -> None:
    model, seen = tiny(), []
    model.tower[0].register_forward_hook(lambda _, args, output: seen.extend([args[0].dtype, output.dtype]))
    shard(model, **LAYERS, ignored_modules=["tower"], param_dtype="bf16")
    model.embed.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    out = model(*batches(1)[0])
    assert seen == [torch.bfloat16, torch.float32, torch.float32] and out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert model.tower[0].weight.grad.dtype == torch.float32


def test_ignored_modules(ranks2: RankPool) -> None:
    ranks2.run(check_ignored)
    ranks2.run(check_ignored_in_mixed_precision)


def check_recompute() -> None:
    plain, again = tiny(), tiny()
    shard(plain, **LAYERS)
    plan = shard(again, **LAYERS, recompute_modules=["layers.{0-1}"])
    loss_of(plain, batches(1)[0]).backward()
    loss_of(again, batches(1)[0]).backward()
    assert [layer.calls for layer in plain.layers] == [1, 1, 1]
    assert [layer.calls for layer in again.layers] == [2, 2, 1]
    assert plan.notes == []


def test_recompute_modules(ranks2: RankPool) -> None:
    ranks2.run(check_recompute)


def check_reentrant() -> None:
    frozen = {"frozen": ("embed", "tower")}
    model = tiny(**frozen)
    plan = shard(model, **LAYERS, recompute_modules=["layers.{*}"], use_reentrant=True)
    assert "use_reentrant: true runs as false" in plan.notes[0]
    assert_same_gradients(model, tiny(**frozen))
    assert model.layers[0].linear.weight.grad is not None
    assert shard(tiny(), **LAYERS, recompute_modules=["layers.{*}"], use_reentrant=False).notes == []


def test_use_reentrant_never_loses_the_gradients_behind_frozen_inputs(ranks2: RankPool) -> None:
    ranks2.run(check_reentrant)


def check_reshard() -> None:
    for value in (True, False):
        model = tiny()
        shard(model, **LAYERS, reshard_after_forward=value)
        loss = loss_of(model, batches(1)[0])
        assert isinstance(model.layers[0].linear.weight, DTensor) is value
        loss.backward()
        assert isinstance(model.layers[0].linear.weight, DTensor)


def test_reshard_after_forward(ranks2: RankPool) -> None:
    ranks2.run(check_reshard)


def check_prefetch() -> None:
    keys = {"sharding_size": "auto", "sub_modules_to_wrap": ["layers.{*}", "layers.{0}.linear", "head", "embed"]}
    plain, model = tiny(tied=True), tiny(tied=True)
    shard(plain, **keys)
    shard(model, **keys, num_to_forward_prefetch=2, num_to_backward_prefetch=2)
    state = {
        id(module._get_fsdp_state()): name for name, module in model.named_modules() if isinstance(module, FSDPModule)
    }

    def of(model: Any, name: str, way: str) -> list[str]:
        return [
            state.get(id(s), "?")
            for s in getattr(model.get_submodule(name)._get_fsdp_state(), f"_states_to_{way}_prefetch")
        ]

    assert of(model, "embed", "forward") == ["layers.0", "layers.0.linear"]
    assert of(model, "layers.0", "forward") == ["layers.0.linear", "layers.1"]
    assert of(model, "layers.2", "forward") == []
    assert of(model, "embed", "backward") == ["layers.2", "layers.1"]  # one unit with the head, where backward starts
    assert of(model, "layers.2", "backward") == ["layers.1", "layers.0"]
    assert of(model, "layers.0", "backward") == ["layers.0.linear"]
    assert of(plain, "layers.0", "forward") == of(plain, "layers.2", "backward") == []
    assert_same_gradients(model, tiny(tied=True))


def test_prefetch_both_ways(ranks2: RankPool) -> None:
    ranks2.run(check_prefetch)


def check_dtypes() -> None:
    def run(**keys: Any) -> tuple[Any, torch.Tensor, list[torch.dtype], list[str]]:
        model = tiny()
        plan = shard(model, **LAYERS, **keys)
        out = model(*batches(2)[dist.get_rank()])
        out.float().square().sum().backward()
        gradient = model.layers[0].linear.weight.grad.to_local()
        assert model.layers[0].linear.weight.dtype == gradient.dtype == torch.float32
        return out.dtype, gradient, model.layers[1].seen, plan.notes

    bf16, fp32 = torch.bfloat16, torch.float32

    def is_rounded(gradient: torch.Tensor) -> bool:
        return torch.equal(gradient.to(bf16).float(), gradient)

    dtype, gradient, seen, notes = run()
    assert dtype == fp32 and seen == [fp32, fp32] and not is_rounded(gradient) and notes == []
    dtype, gradient, seen, notes = run(param_dtype="bf16")
    assert dtype == bf16 and seen == [bf16, bf16] and not is_rounded(gradient) and "fp32" in notes[0]
    dtype, gradient, seen, notes = run(param_dtype="bf16", reduce_dtype="bf16")
    assert is_rounded(gradient) and notes == []
    dtype, gradient, seen, notes = run(reduce_dtype="bf16")
    assert dtype == fp32 and is_rounded(gradient)
    dtype, gradient, seen, notes = run(param_dtype="bf16", output_dtype="fp32")
    assert dtype == fp32 and seen == [bf16, bf16], "only the model's own output is cast"
    with pytest.raises(RuntimeError, match="dtype"):
        run(param_dtype="bf16", cast_forward_inputs=False)


def test_dtypes_and_cast_forward_inputs(ranks2: RankPool) -> None:
    ranks2.run(check_dtypes)


def check_offload() -> None:
    model = tiny()
    plan = shard(model, **LAYERS, offload_to_cpu=True, pin_memory=True)
    group = model.layers[0]._get_fsdp_state()._fsdp_param_group
    assert group.fsdp_params[0].offload_to_cpu and not group.fsdp_params[0].pin_memory
    assert "pin_memory" in plan.notes[0] and plan.shard_device == torch.device("cpu")
    assert_same_gradients(model, tiny())
    plain = tiny()
    shard(plain, **LAYERS)
    assert not plain.layers[0]._get_fsdp_state()._fsdp_param_group.fsdp_params[0].offload_to_cpu


def check_pin_memory() -> None:
    original = fsdp2.accelerator.is_cpu
    fsdp2.accelerator.is_cpu = lambda: False
    try:
        for value in (True, False):
            config = Fsdp2Config(offload_to_cpu=True, pin_memory=value)
            assert fsdp2.Sharding(tiny(), config).kwargs["offload_policy"].pin_memory is value
    finally:
        fsdp2.accelerator.is_cpu = original


def test_offload_and_pin_memory(ranks2: RankPool) -> None:
    ranks2.run(check_offload)
    ranks2.run(check_pin_memory)


def check_tied_note() -> list[str]:
    return shard(tiny(tied=True), sub_modules_to_wrap=["embed", "head"]).notes


def test_tied_modules_are_wrapped_together(ranks1: RankPool) -> None:
    assert "share a parameter: embed, head" in ranks1.run(check_tied_note)[0][0]


class Awkward(Tiny):
    """With a parameter without dimensions and one that lies transposed in memory."""

    def build(self, width: int = 5, tied: bool = False, dropout: float = 0.0) -> None:
        super().build(width, tied, dropout)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head.weight = nn.Parameter(self.head.weight.detach().t().contiguous().t())


def check_awkward_parameters() -> None:
    config = Fsdp2Config(**LAYERS)
    torch.manual_seed(1)
    model = Awkward()
    torch.manual_seed(1)
    reference = Awkward()
    model._fully_shard = lambda kwargs, _: fsdp2.Sharding.current().apply()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp2, "load_fsdp2_config", lambda _: config)
        plan = fsdp2.prepare_model(model)
    assert [name for name, _ in plan.ignored] == ["scale"]  # left to the engine, which reduces it
    engine = FSDP2Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        group=dist.group.WORLD,
        clip_grad=0.0,
        replicated=[param for _, param in plan.ignored],
    )
    todo = batches(dist.get_world_size())
    mine = iter([todo[dist.get_rank()]])
    engine.forward_backward(lambda data, module: (loss_of(module, next(data)), lambda loss: loss), mine, 1)
    for batch in todo:
        (loss_of(reference, batch) / len(todo)).backward()
    expected = {name: param.grad for name, param in reference.named_parameters()}
    for name, param in model.named_parameters():
        torch.testing.assert_close(full(param.grad), expected[name], rtol=1e-6, atol=1e-6)


def test_parameters_without_dimensions_or_out_of_order_train(ranks2: RankPool) -> None:
    ranks2.run(check_awkward_parameters)


def check_mixed_unit() -> None:
    model = tiny()
    model.layers[1].linear.bias = nn.Parameter(model.layers[1].linear.bias.detach().bfloat16())
    words = "'layers.1.linear.weight' is float32 and 'layers.1.linear.bias' is bfloat16, .* unit, 'layers.1'"
    with pytest.raises(UserError, match=words):
        shard(model, **LAYERS)
    frozen = tiny(frozen=("tower",))
    frozen.tower.bfloat16()
    shard(frozen, **LAYERS, replicate_frozen_mib=0)


def test_a_unit_of_several_dtypes_is_an_error_that_names_it(ranks1: RankPool) -> None:
    ranks1.run(check_mixed_unit)


def check_replicas(keys: dict[str, Any], copies: int) -> None:
    torch.manual_seed(dist.get_rank())
    model = Tiny()
    shard(model, **keys)
    start_alike(model)
    found = 0
    for name, param in model.named_parameters():
        if isinstance(param, DTensor) and param.placements[0].is_shard():
            continue
        mine = param.detach().to_local() if isinstance(param, DTensor) else param.detach()
        everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, mine)
        assert torch.equal(*everywhere), name
        found += 1
    assert found == copies


@pytest.mark.parametrize(("keys", "copies"), [({}, 13), ({**LAYERS, "ignored_modules": ["tower", "head"]}, 5)])
def test_copies_start_alike_whatever_each_rank_has_drawn(ranks2: RankPool, keys: dict[str, Any], copies: int) -> None:
    ranks2.run(check_replicas, keys, copies)


class Opaque:
    """Nothing that PyTorch looks into."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Either(nn.Module):
    """Each rank has a part of its own."""

    def __init__(self, hides: bool, bias: bool = True) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3, bias)])
        self.hides = hides

    def forward(self, x: torch.Tensor) -> Any:
        output = self.parts[dist.get_rank()](x).sum()
        return Opaque(output) if self.hides else (output,)


class OwnPart(torch.autograd.Function):
    """The parameters of all parts take part, and on each rank only those of its own get a gradient."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parameters)
        return torch.stack([p.sum() for p in parameters]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        mine = [i // 2 == dist.get_rank() for i in range(4)]
        return tuple(
            torch.ones_like(p) if is_mine else None for is_mine, p in zip(mine, ctx.saved_tensors, strict=True)
        )


class Hidden(Either):
    """As `Either`, but autograd does not know it."""

    def forward(self, x: torch.Tensor) -> Any:
        return (OwnPart.apply(*self.parameters()),)


def check_gradients_that_cannot_be(words: str, model: Either) -> None:
    shard(model, sharding_size="auto", sub_modules_to_wrap=[])
    engine = FSDP2Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), group=dist.group.WORLD, clip_grad=0.0)
    loss_func = lambda output: output.value if model.hides else output[0]  # noqa: E731
    micro_batches = 2
    with pytest.raises(UserError, match=words):
        for _ in range(2):
            engine.forward_backward(lambda _, module: (module(torch.ones(2, 3)), loss_func), None, micro_batches)


@pytest.mark.parametrize("model", [Either(False), Either(False, bias=False), Hidden(False)], ids=["", "size", "hidden"])
def test_gradients_of_different_parameters_are_not_added_up(ranks2: RankPool, model: Either) -> None:
    """Of different sizes, gloo ends the process where it would add them up."""
    ranks2.run(check_gradients_that_cannot_be, "'parts.0.weight' got a gradient on rank 0 and none on rank 1", model)


def test_an_output_whose_tensors_fsdp_does_not_find_is_an_error(ranks1: RankPool) -> None:
    ranks1.run(check_gradients_that_cannot_be, "no parameter got one: .* tuples, lists, dicts", Either(True))
