from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field, ValidationError

from mindspeed_mm.configs.base import Config, FreeForm, InputPath, load_config
from mindspeed_mm.errors import UserError


class Inner(Config):
    images: str | None = None
    size: int = 8
    mode: Literal["fast", "slow"] = "fast"
    shards: int | Literal["auto"] | None = None


class Outer(Config):
    name: str = "n"
    inner: Inner = Field(default_factory=Inner)
    many: list[Inner] = Field(default_factory=list)
    folder: InputPath = ""
    custom: FreeForm = Field(default_factory=FreeForm)


def load(folder: Path, document: Any) -> Outer:
    path = folder / "outer.json"
    path.write_text(json.dumps(document))
    return load_config(Outer, path)


def test_values_are_attributes() -> None:
    cfg = Outer(inner={"size": 3}, custom={"a": {"b": [{"c": 1}]}})
    assert (cfg.inner.size, cfg.inner.mode, cfg.custom.a.b[0].c) == (3, "fast", 1)


def test_get_contains_and_to_dict() -> None:
    cfg = Outer(inner={"size": 3}, custom={"a": {"b": 1}})
    assert cfg.inner.get("size") == 3
    assert cfg.inner.get("images", "column") == "column"  # null in the class is "not given" for a caller
    assert cfg.inner.get("nothing", 5) == 5
    assert "size" in cfg.inner and "mode" not in cfg.inner
    cfg.inner.mode = "slow"
    assert "mode" in cfg.inner
    plain = cfg.to_dict()
    assert plain["inner"] == {"images": None, "size": 3, "mode": "slow", "shards": None}
    assert type(plain["custom"]) is dict and type(plain["custom"]["a"]) is dict
    assert json.loads(json.dumps(plain)) == plain


def test_an_unknown_attribute_names_the_key() -> None:
    cfg = Outer()
    assert not hasattr(cfg, "imges")
    assert getattr(cfg.inner, "imges", 7) == 7
    with pytest.raises(AttributeError, match="imges"):
        _ = cfg.inner.imges  # type: ignore[attr-defined]


def test_assignment_is_checked() -> None:
    cfg = Outer()
    cfg.inner = {"size": 4}  # type: ignore[assignment]
    assert cfg.inner.size == 4
    with pytest.raises(ValidationError):
        cfg.inner.size = "4"  # type: ignore[assignment]
    with pytest.raises(ValidationError):
        cfg.inner.sise = 4  # type: ignore[attr-defined]
    assert cfg.inner.size == 4


def test_copies_are_independent_and_survive_pickling() -> None:
    cfg = Outer(inner={"size": 3}, custom={"a": {"b": [1]}})
    for other in (copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert other == cfg and "size" in other.inner and isinstance(other.custom.a, FreeForm)
        other.inner.size = 5
        other.custom.a.b.append(2)
        assert cfg.inner.size == 3 and cfg.custom.a.b == [1]


def test_all_problems_of_a_file_are_listed_with_key_paths(tmp_path: Path) -> None:
    document = {
        "nme": "x",
        "name": 3,
        "inner": {"imges": "a", "size": "8", "mode": "fats", "shards": "atuo", "zzz": 1},
        "many": [{}, {"size": True}, 4],
        "custom": [],
    }
    with pytest.raises(UserError) as error:
        load(tmp_path, document)
    file = tmp_path / "outer.json"
    assert str(error.value).splitlines() == [
        f"{file}: name: must be a string; found 3.",
        f'{file}: inner.size: must be a whole number; found "8".',
        f"{file}: inner.mode: must be 'fast' or 'slow'; found \"fats\". Did you mean 'fast'?",
        f"{file}: inner.shards: must be a whole number or must be 'auto'; found \"atuo\". Did you mean 'auto'?",
        f"{file}: inner.imges: unknown key. Did you mean 'images'?",
        f"{file}: inner.zzz: unknown key. Remove it; the keys that exist are the fields of {__name__}.Inner.",
        f"{file}: many[1].size: must be a whole number; found true.",
        f"{file}: many[2]: must be an object; found 4.",
        f"{file}: custom: must be an object; found a list.",
        f"{file}: nme: unknown key. Did you mean 'name'?",
    ]


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"share": Infinity}'), ("a.yaml", "share: .nan")])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, name: str, text: str) -> None:
    class Shares(Config):
        share: float

    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: share: must be a finite number"):
        load_config(Shares, tmp_path / name)


def test_an_input_path_may_lie_beside_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "configs", tmp_path / "here"
    (beside / "a").mkdir(parents=True)
    (beside / "b").mkdir()
    (here / "b").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert load(beside, {"folder": "a"}).folder == str(beside / "a")
    assert load(beside, {"folder": "b"}).folder == "b"  # the current folder comes first
    assert load(beside, {"folder": "owner/name"}).folder == "owner/name"
    assert load(beside, {"folder": str(beside / "a")}).folder == str(beside / "a")


class TestFreeForm:
    def test_is_a_dict_with_attributes_at_every_depth(self) -> None:
        tree = FreeForm({"a": {"b": [{"c": 1}, 2]}}, d={"e": None})
        assert tree.a.b[0].c == 1 and tree["d"].e is None and "a" in tree and tree.get("x", 3) == 3
        tree.f = {"g": 1}
        tree.a.update(h={"i": 2})
        tree.setdefault("j", {"k": 3})
        assert (tree.f.g, tree.a.h.i, tree.j.k) == (1, 2, 3)
        del tree.f
        assert not hasattr(tree, "f")

    @pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16"])
    def test_a_dtype_is_one_of_torch_as_an_attribute(self, name: str) -> None:
        tree = FreeForm(ae={"dtype": name})
        assert (
            tree.ae.dtype is torch.bfloat16 and tree.ae["dtype"] == name and tree.to_dict() == {"ae": {"dtype": name}}
        )

    @pytest.mark.parametrize("other", ["auto", "nn", None, 8])
    def test_another_dtype_is_what_it_is(self, other: Any) -> None:
        assert FreeForm(dtype=other).dtype == other

    def test_to_dict_is_plain(self) -> None:
        tree = FreeForm(a={"b": [{"c": 1}]})
        plain = tree.to_dict()
        assert plain == {"a": {"b": [{"c": 1}]}}
        assert type(plain["a"]) is dict and type(plain["a"]["b"][0]) is dict
        plain["a"]["b"][0]["c"] = 2
        assert tree.a.b[0].c == 1

    def test_a_missing_key_names_itself_and_its_neighbour(self) -> None:
        with pytest.raises(AttributeError, match=r"no key 'blocs' here\. Did you mean 'blocks'"):
            _ = FreeForm(blocks=3).blocs

    def test_copies(self) -> None:
        tree = FreeForm(a={"b": [1]})
        for other in (copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
            assert isinstance(other, FreeForm) and isinstance(other.a, FreeForm) and other == tree
            other.a.b.append(2)
            assert tree.a.b == [1]
