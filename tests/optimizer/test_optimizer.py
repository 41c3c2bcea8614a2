"""Parameter groups, schedule and selection, against formulas written out here and torch's own optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mindspeed_mm.errors import UserError
from mindspeed_mm.optimizer import build_optimizer, build_param_groups, build_schedule
from mindspeed_mm.training.optimizer_setup import parameter_groups
from tests.arguments.lines import validated


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def names(groups: list) -> dict[tuple[float, float], list[str]]:
    return {(g.lr_mult, g.wd_mult): g.names for g in groups}


def test_biases_and_norms_do_not_decay() -> None:
    assert names(build_param_groups(model().named_parameters())) == {
        (1.0, 1.0): ["0.weight", "2.weight"],
        (1.0, 0.0): ["0.bias", "1.weight", "1.bias", "2.bias"],
    }


def test_decay_all_on_request() -> None:
    assert list(names(build_param_groups(model().named_parameters(), decay_all=True))) == [(1.0, 1.0)]


def test_keywords() -> None:
    groups = build_param_groups(
        model().named_parameters(), weight_decay_exclude=["0.WEIGHT"], lr_scale=["2."], lr_mult=0.1
    )
    assert names(groups)[(0.1, 1.0)] == ["2.weight"]
    assert "0.weight" in names(groups)[(1.0, 0.0)]


def test_a_keyword_that_matches_nothing_is_an_error() -> None:
    module = nn.ModuleDict({"visual": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=r"--lr-scale-modules: 'visal'.*Did you mean 'visual'"):
        build_param_groups(module.named_parameters(), lr_scale=["visal"])


def test_a_keyword_may_bring_its_own_scale_and_the_last_match_counts() -> None:
    module = nn.ModuleDict({"visual": nn.ModuleDict({"block": nn.Linear(2, 2), "merger": nn.Linear(2, 2)})})
    module["head"] = nn.Linear(2, 2)

    def scales(*words: str) -> dict[str, float]:
        groups = build_param_groups(module.named_parameters(), lr_scale=words, lr_mult=3.0, decay_all=True)
        return {name: g.lr_mult for g in groups for name in g.names if name.endswith("weight")}

    expected = {"visual.block.weight": 0.1, "visual.merger.weight": 2.0, "head.weight": 3.0}
    assert scales("visual=0.1", "merger=2", "head") == expected
    assert scales("merger=2", "visual=0.1", "head") == {**expected, "visual.merger.weight": 0.1}


@pytest.mark.parametrize("words", [{"lr_scale": [""]}, {"weight_decay_exclude": ["0.", ""]}])
def test_an_empty_keyword_which_is_part_of_every_name_is_an_error(words: dict) -> None:
    with pytest.raises(UserError, match="modules: an empty keyword is part of every name"):
        build_param_groups(model().named_parameters(), **words)


def test_a_tied_parameter_is_found_by_each_of_its_names() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    module["head"].weight = module["embed"].weight
    every = list(module.named_parameters(remove_duplicate=False))
    for words in ({"lr_scale": ["head=0.5"]}, {"lr_scale": ["embed=0.5"]}):
        assert names(build_param_groups(every, **words)) == {(0.5, 1.0): ["embed.weight"]}
    assert names(build_param_groups(every, weight_decay_exclude=["head"])) == {(1.0, 0.0): ["embed.weight"]}


def test_a_scale_of_one_is_said_to_have_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        flags = ["--use-torch-fsdp2", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1", *words]
        parameter_groups(validated(*flags), model().named_parameters())
        return capsys.readouterr().err

    assert "--lr-scale-modules 0. 2.: no effect" in said("--lr-scale-modules", "0.", "1.bias=2", "2.")
    assert said("--lr-scale-modules", "0.", "--lr-mult", "2") == said("--lr-scale-modules", "0.=1") == ""
    assert "--lr-mult 2.0: no effect" in said("--lr-scale-modules", "0.=3", "--lr-mult", "2")


@pytest.mark.parametrize("word", ["visual=", "visual=fast", "visual=-1", "visual=nan", "=0.1"])
def test_a_scale_that_is_no_number_is_an_error(word: str) -> None:
    with pytest.raises(UserError, match=r"--lr-scale-modules.*keyword=scale"):
        build_param_groups(nn.ModuleDict({"visual": nn.Linear(2, 2)}).named_parameters(), lr_scale=[word])


def test_groups_train_as_adamw_with_the_groups_made_by_hand() -> None:
    ours, plain = model(), model()
    groups = build_param_groups(
        ours.named_parameters(), weight_decay_exclude=["2.weight"], lr_scale=["0.=0.5", "1.bias"], lr_mult=2.0
    )
    options = {**OPTIONS, "weight_decay": 0.1}
    optimizer = build_optimizer(groups, name="adam", selection="fused_adamw", **options)
    p = dict(plain.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p["0.weight"]], "lr": 0.05, "weight_decay": 0.1},
            {"params": [p["0.bias"]], "lr": 0.05, "weight_decay": 0.0},
            {"params": [p["1.weight"], p["2.weight"], p["2.bias"]], "lr": 0.1, "weight_decay": 0.0},
            {"params": [p["1.bias"]], "lr": 0.2, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        fused=True,
    )
    train(optimizer, ours), train(reference, plain)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))


def test_the_bias_of_many_experts_is_two_dimensional_and_does_not_decay() -> None:
    module = nn.ParameterDict({"up_proj_bias": nn.Parameter(torch.zeros(4, 2)), "up_proj": nn.Parameter(torch.eye(2))})
    groups = build_param_groups(module.named_parameters())
    assert names(groups) == {(1.0, 0.0): ["up_proj_bias"], (1.0, 1.0): ["up_proj"]}


def test_everything_frozen_is_an_error() -> None:
    with pytest.raises(UserError, match="frozen"):
        build_param_groups(model().requires_grad_(False).named_parameters())


def schedule(style: str, optimizer: torch.optim.Optimizer | None = None, **changes: object):
    optimizer = optimizer or torch.optim.SGD(model().parameters(), lr=1.0)
    values: dict = dict(
        lr=1.0,
        min_lr=0.1,
        warmup_init=0.0,
        warmup_samples=4,
        decay_samples=20,
        decay_style=style,
        weight_decay=(0.01, 0.01),
        weight_decay_style="constant",
        weight_decay_samples=20,
    )
    return build_schedule(optimizer, **{**values, **changes})


def curve(plan) -> list[float]:
    rates = []
    for _ in range(12):
        rates.append(plan.current_lr)
        plan.step(2)
    return rates


def expected(style: str, n: int) -> float:
    if n <= 4:
        return n / 4
    if style == "constant":
        return 1.0
    if n > 20:
        return 0.1
    ratio = (n - 4) / 16
    if style == "linear":
        return 0.1 + 0.9 * (1 - ratio)
    if style == "cosine":
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * ratio))
    if style == "inverse-square-root":
        return max(0.1, math.sqrt(4 / n))
    return 1.0 if n <= 12 else 0.1 + 0.9 * (1 - (n - 12) / 8)  # WSD, linear over the last 8


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_learning_rate_styles(style: str) -> None:
    extra = {"wsd_decay_samples": 8, "wsd_decay_style": "linear"} if style == "WSD" else {}
    assert curve(schedule(style, **extra)) == pytest.approx([expected(style, n) for n in range(0, 24, 2)])


def test_group_multipliers_apply_at_every_step() -> None:
    groups = build_param_groups(model().named_parameters(), lr_scale=["2."], lr_mult=0.5)
    optimizer = torch.optim.SGD([g.to_optimizer_group(1.0, 0.01) for g in groups], lr=1.0)
    plan = schedule("linear", optimizer, warmup_init=0.4)
    for _ in range(12):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(plan.current_lr * group["lr_mult"])
            assert group["weight_decay"] == pytest.approx(0.01 * group["wd_mult"])
        plan.step(2)


def test_a_schedule_that_changed_is_an_error_that_names_the_flags() -> None:
    saved = schedule("linear").state_dict()
    with pytest.raises(UserError, match="--override-opt_param-scheduler"):
        schedule("linear", decay_samples=40).load_state_dict(saved)
    longer = schedule("linear", decay_samples=40, override=True)
    longer.load_state_dict(saved)
    assert longer.lr_decay_steps == 40


OPTIONS: dict = dict(lr=0.1, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8, momentum=0.9, ema_decay=0.5)


def train(optimizer: torch.optim.Optimizer, module: nn.Module, steps: int = 3) -> list[torch.Tensor]:
    history = [module[0].weight.detach().clone()]
    for i in range(steps):
        module(torch.ones(2, 4) * (i + 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(module[0].weight.detach().clone())
    return history


@pytest.mark.parametrize(
    ("name", "selection"), [("adam", "fused_torch_adamw"), ("adam", "fused_adamw"), ("sgd", "fused_adamw")]
)
def test_the_update_is_torchs(name: str, selection: str) -> None:
    ours, plain = model(), model()
    optimizer = build_optimizer(build_param_groups(ours.named_parameters()), name=name, selection=selection, **OPTIONS)
    reference = (
        torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        if name == "sgd"
        else torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
    )
    torch.testing.assert_close(train(optimizer, ours)[-1], train(reference, plain)[-1])


def test_moving_average_follows_its_formula_and_leaves_the_weights_alone() -> None:
    ours, plain = model(), model()
    groups = build_param_groups(ours.named_parameters())
    optimizer = build_optimizer(groups, name="adam", selection="fused_ema_adamw", **OPTIONS)
    history = train(optimizer, ours)
    reference = build_optimizer(
        build_param_groups(plain.named_parameters()), name="adam", selection="fused_torch_adamw", **OPTIONS
    )
    assert torch.equal(history[-1], train(reference, plain)[-1])
    assert any(not torch.equal(weight, history[0]) for weight in history)
    average = history[0]
    for weight in history[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(optimizer.state[ours[0].weight]["ema"], average)


def test_an_optimizer_we_do_not_have_is_an_error() -> None:
    with pytest.raises(UserError, match="--optimizer lion"):
        groups = build_param_groups(model().named_parameters())
        build_optimizer(groups, name="lion", selection="fused_adamw", **OPTIONS)


def test_a_step_skipped_on_the_device_is_none_for_the_average() -> None:
    module = model()
    optimizer = build_optimizer(
        build_param_groups(module.named_parameters()), name="adam", selection="fused_ema_adamw", **OPTIONS
    )
    train(optimizer, module)
    before = {p: (p.detach().clone(), optimizer.state[p]["ema"].clone()) for p in module.parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for parameter, (weight, average) in before.items():
        assert torch.equal(parameter, weight)
        assert torch.equal(optimizer.state[parameter]["ema"], average)
