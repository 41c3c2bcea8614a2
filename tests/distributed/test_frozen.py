"""What is frozen by pattern, how FSDP2 holds it, and that it costs neither gradients nor optimizer state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_mm.distributed.frozen import choose_policies, freeze, frozen_parts
from mindspeed_mm.engine.fsdp2 import FSDP2Engine
from mindspeed_mm.errors import UserError
from mindspeed_mm.optimizer import build_param_groups
from tests.distributed.tiny import assert_same_gradients, batches, loss_of, shard, tiny
from tests.ranks import RankPool


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["tower"], {"tower"}),
        (["layers.{0-1}"], {"layers.0", "layers.1"}),
        (["layers.{0,2}.linear.bias"], {"layers.0.linear.bias", "layers.2.linear.bias"}),
        (["layers.{*}.linear.{*}", "scale"], {"layers", "scale"}),
        (["tower.{*}"], {"tower"}),
        ([], set()),
    ],
)
def test_patterns_name_modules_and_parameters(patterns: list[str], expected: set[str]) -> None:
    model = tiny()
    freeze(model, patterns)
    assert set(frozen_parts(model)) == expected
    below = {n for n, _ in model.named_parameters() if any(f"{n}.".startswith(f"{path}.") for path in expected)}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == below


def test_a_tied_parameter_is_frozen_under_both_names() -> None:
    model = tiny(tied=True)
    freeze(model, ["embed"])
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("layer.{*}", r"model\.json: freeze: 'layer\.\{\*\}' matches no module and no parameter.*layers\.\{0-2\}"),
        ("layers.{0-9}", r"'layers' has no 3, 4, .*it has 3 children"),
        ("layers.0.linear.bia", r"matches no module and no parameter.*layers\.\{0-2\}\.linear\.bias"),
        ("layers.0.linear.bias.x", "matches no module and no parameter"),
        ("layers.{a}", "is no number and no range"),
        ("layers.{*}.dropout", r"'layers\.\{\*\}\.dropout' has no parameters that could be frozen"),
    ],
)
def test_a_pattern_that_names_nothing(pattern: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        freeze(tiny(), [pattern])


LAYERS, ROOT = ["layers.{*}"], []
SHARDED = {"sharding_size": "auto", "replicate_frozen_mib": 0}
POLICIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "small": (
        {"sharding_size": "auto", "sub_modules_to_wrap": LAYERS},
        {"frozen": ("tower", "layers.1")},
        {"tower": "replicated, it is small", "layers.1": "per layer, as sub_modules_to_wrap says"},
    ),
    "large": (
        {**SHARDED, "sub_modules_to_wrap": LAYERS},
        {"frozen": ("tower", "layers.0", "layers.1")},
        {"tower": "root, gathered with what is left to it", "layers.{0-1}": "per layer, as sub_modules_to_wrap says"},
    ),
    "ignored": (
        {**SHARDED, "sub_modules_to_wrap": ROOT, "ignored_modules": ["tower"]},
        {"frozen": ("tower",)},
        {"tower": "replicated, as ignored_modules says"},
    ),
    "units that nobody listed": (
        SHARDED,
        {"frozen": ("layers",)},
        {"layers": "per layer"},
    ),
    "units that nobody listed, small": (
        {"sharding_size": "auto"},
        {"frozen": ("layers",)},
        {"layers": "replicated, it is small"},
    ),
    "would be cast": (
        {"sharding_size": "auto", "sub_modules_to_wrap": ROOT, "param_dtype": "bf16", "reduce_dtype": "fp32"},
        {"frozen": ("tower",)},
        {"tower": "root, gathered with what is left to it"},
    ),
    "offloaded": (
        {"sharding_size": "auto", "sub_modules_to_wrap": ROOT, "offload_to_cpu": True},
        {"frozen": ("tower",)},
        {"tower": "root, gathered with what is left to it"},
    ),
    "part of a unit": (
        {"sharding_size": "auto", "sub_modules_to_wrap": LAYERS},
        {"frozen": ("layers.0.linear",), "biased": True},
        {},
    ),
    "tied": (
        {"sharding_size": "auto", "sub_modules_to_wrap": LAYERS},
        {"frozen": ("embed",), "tied": True},
        {"embed": "replicated, it is small", "head": "replicated, it is small"},
    ),
}


def check_policy(name: str) -> None:
    keys, kwargs, expected = POLICIES[name]
    kwargs = dict(kwargs)
    biased = kwargs.pop("biased", False)

    def build() -> Any:
        model = tiny(**kwargs)
        model._no_split_modules = {"Block"} if "sub_modules_to_wrap" not in keys else None
        if biased:
            model.layers[0].register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
        return model

    model = build()
    plan = shard(model, **keys)
    lines = {line.split()[1]: line.split("): ")[1] for line in plan.notes if line.startswith("frozen ")}
    assert lines == expected
    for path, policy in expected.items():
        for parameter in model.get_submodule(path.split(".{")[0]).parameters():
            if not parameter.requires_grad:
                assert isinstance(parameter, DTensor) is not policy.startswith("replicated"), path
    if "param_dtype" not in keys and not biased:
        assert_same_gradients(model, build())


@pytest.mark.parametrize("name", POLICIES)
def test_frozen_towers_are_held_by_the_rule(ranks2: RankPool, name: str) -> None:
    ranks2.run(check_policy, name)


def test_small_towers_together_keep_to_the_limit() -> None:
    model = tiny(("layers.0", "layers.1", "layers.2"))
    model.layers[2].linear.bias.requires_grad_(True)  # so that they are not one tower, layers
    both = 2 * sum(p.numel() for p in model.layers[0].parameters()) * 4
    for limit, expected in ((both, {"layers.0", "layers.1"}), (both - 1, {"layers.0"})):
        replicated, lines = choose_policies(model, {}, set(), listed=False, replicate_up_to=limit, dtype=None)
        assert replicated.keys() == expected
    assert lines == [
        "frozen layers.0 (30 parameters): replicated, it is small",
        "frozen layers.1 (30 parameters): root, gathered with what is left to it",
    ]


def byte_size(tensors: Any) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in local)


def unreduced(model: torch.nn.Module) -> int:
    """Bytes of full gradients that wait for the last micro-batch."""
    total = 0
    for module in model.modules():
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group):
            for param in group.fsdp_params:
                waiting = [param.unsharded_accumulated_grad]
                if hasattr(param, "_unsharded_param"):
                    waiting.append(param._unsharded_param.grad)
                total += byte_size(waiting)
    return total


class Reductions(TorchDispatchMode):
    """Counts the bytes of gradients given to collectives that reduce; hosts agree on integers."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        # Older torch scatters over the one rank of a shard group too, which is a copy.
        if name == "c10d::_reduce_scatter_base_" and args[0].numel() < args[1].numel():
            self.bytes += byte_size([args[1]])
        elif name == "c10d::allreduce_":
            self.bytes += byte_size(t for t in args[0] if t.is_floating_point())
        return func(*args, **(kwargs or {}))


def check_memory(keys: dict[str, Any], frozen: tuple[str, ...]) -> dict[str, int]:
    """Train two micro-batches and return what was allocated, in bytes."""
    model = tiny(frozen, width=6)
    plan = shard(model, **keys)
    groups = build_param_groups(model.named_parameters())
    optimizer = torch.optim.AdamW([group.to_optimizer_group(1e-3, 0.1) for group in groups], fused=True)
    engine = FSDP2Engine(
        model, optimizer, group=dist.group.WORLD, clip_grad=1.0, replicated=[p for _, p in plan.ignored]
    )
    found: dict[str, int] = {}
    todo = iter(batches(2))
    step = 0

    def forward_step(iterator: Any, module: torch.nn.Module) -> Any:
        nonlocal step
        if step:
            found["unreduced"] = unreduced(model)
        step += 1
        return loss_of(module, next(iterator)), lambda loss: loss

    with Reductions() as reductions:
        engine.forward_backward(forward_step, todo, 2)
    found["reduce buffers"] = reductions.bytes
    found["gradients"] = byte_size(p.grad for p in model.parameters() if p.grad is not None)
    engine.optimizer_step()
    moments = [state[m] for state in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
    found["optimizer state"] = byte_size(moments)
    found["states"] = len(optimizer.state)
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    return found


FROZEN = ("tower", "layers.0", "layers.1", "layers.2")


@pytest.mark.parametrize(
    ("keys", "padded"),
    [
        ({**SHARDED, "sub_modules_to_wrap": LAYERS}, True),
        ({**SHARDED, "sub_modules_to_wrap": ROOT}, True),
        ({"sharding_size": "auto", "sub_modules_to_wrap": ROOT}, True),
        ({**SHARDED, "sharding_size": 1, "sub_modules_to_wrap": LAYERS}, False),
    ],
    ids=["per layer", "root", "replicated", "HSDP"],
)
def test_pain_20_frozen_parameters_cost_no_gradients_and_no_state(
    ranks2: RankPool, keys: dict[str, Any], padded: bool
) -> None:
    model = tiny(FROZEN, width=6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in trained] == [(1,), (7, 6), (7, 6)]
    full_size = sum(p.numel() for p in trained) * 4
    for rank, found in enumerate(ranks2.run(check_memory, keys, FROZEN)):
        # Two ranks hold 4 and 3 of 7 rows, 1 and 0 of 1; buffers are padded to what both can hold.
        mine = [(1 + 2 * 4 * 6) * 4, (0 + 2 * 3 * 6) * 4][rank] if padded else full_size
        assert found["unreduced"] == full_size
        assert found["reduce buffers"] == (2 * (1 + 2 * 4 * 6) * 4 if padded else full_size)
        assert found["gradients"] == mine and found["optimizer state"] == 2 * mine
        assert found["states"] == len(trained)
    everything = ranks2.run(check_memory, keys, ())[0]
    assert everything["reduce buffers"] > found["reduce buffers"], "the count sees the gradients of the tower"
