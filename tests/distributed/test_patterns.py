from __future__ import annotations

import pytest
from torch import nn

from mindspeed_mm.distributed.patterns import resolve, resolve_all, summarise
from mindspeed_mm.errors import UserError


def block(experts: bool) -> nn.Module:
    inner = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.Linear(1, 1)}) if experts else nn.Linear(1, 1)})
    return inner


def model() -> nn.Module:
    root = nn.Module()
    root.text = nn.Module()
    root.text.layers = nn.ModuleList(block(experts=i > 0) for i in range(8))
    root.stages = nn.ModuleList(nn.ModuleList(nn.Linear(1, 1) for _ in range(3)) for _ in range(2))
    root.layer1 = nn.Linear(1, 1)
    root.layer2 = nn.Linear(1, 1)
    return root


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("", [""]),
        ("text.layers", ["text.layers"]),
        ("text.layers.{*}", [f"text.layers.{i}" for i in range(8)]),
        ("text.layers.{2-4}", ["text.layers.2", "text.layers.3", "text.layers.4"]),
        ("text.layers.{1,3,5}", ["text.layers.1", "text.layers.3", "text.layers.5"]),
        ("text.layers.{0-1, 4,6-7}", [f"text.layers.{i}" for i in (0, 1, 4, 6, 7)]),
        ("text.layers.{*}.mlp.experts", [f"text.layers.{i}.mlp.experts" for i in range(1, 8)]),
        ("stages.{*}.{0,2}", ["stages.0.0", "stages.0.2", "stages.1.0", "stages.1.2"]),
        ("layer{1-2}", ["layer1", "layer2"]),
        ("layer{*}", ["layer1", "layer2"]),
    ],
)
def test_resolve(pattern: str, paths: list[str]) -> None:
    root = model()
    found = resolve(root, pattern)
    assert [path for path, _ in found] == paths
    assert all(root.get_submodule(path) is module for path, module in found)


@pytest.mark.parametrize(
    "pattern", ["text.layers.{3-1}", "text.layers.{}", "text.layers.{a}", "text.{0", "text..a", "{0}}"]
)
def test_malformed_braces_say_what_to_write(pattern: str) -> None:
    with pytest.raises(UserError, match=r"\{0-23\}"):
        resolve(model(), pattern)


def test_no_match_names_the_nearest_paths() -> None:
    with pytest.raises(UserError, match=r"'text.layer.\{\*\}' matches no module.*text\.layers\.\{0-7\}"):
        resolve(model(), "text.layer.{*}")
    with pytest.raises(UserError, match="text, stages"):
        resolve(model(), "zzz")


def test_number_out_of_range_is_an_error() -> None:
    with pytest.raises(UserError, match="has no 8, 9; it has 8 children, 0 to 7"):
        resolve(model(), "text.layers.{0-9}")


def test_list_names_its_key_and_drops_repeats() -> None:
    root = model()
    root.same = root.layer1
    found = resolve_all(root, ["layer2", "layer{1-2}", "same"], "ignored_modules")
    assert list(found) == ["layer2", "layer1"]
    assert resolve_all(root, None, "ignored_modules") == {}
    with pytest.raises(UserError, match="ignored_modules"):
        resolve_all(root, ["layer3"], "ignored_modules")


def test_summarise_writes_patterns_back() -> None:
    assert summarise(["a.0", "a.1", "a.2", "a.5", "b"]) == {"a.{0-2,5}": ["a.0", "a.1", "a.2", "a.5"], "b": ["b"]}
    assert list(summarise(["a.0.b.0", "a.1.b.0"])) == ["a.{*}.b.{*}"]
