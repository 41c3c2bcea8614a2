"""The documentation must be true: generated parts are current, links lead somewhere, examples load."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from mindspeed_mm.configs.base import Config, load_config
from mindspeed_mm.configs.data import (
    CollateParam,
    DataConfig,
    DataloaderParam,
    HuggingFaceAttributes,
    HuggingFaceBasic,
    HuggingFacePreprocess,
    MixtureSource,
)
from mindspeed_mm.configs.fsdp2 import Fsdp2Config
from mindspeed_mm.configs.model import LossConfig, ModelConfig
from mindspeed_mm.configs.tools import ToolsConfig

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("en", "zh")
GUIDE = sorted(path.name for path in (ROOT / "docs/en").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
CONFIGS = {"data": DataConfig, "model": ModelConfig, "tools": ToolsConfig, "fsdp2_config": Fsdp2Config}

_FENCE = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(page: Path) -> list[tuple[str, str, str]]:
    """Return language, file name and content of every fenced block."""
    return [(block[1], block[2], block[3]) for block in _FENCE.finditer(page.read_text("utf-8"))]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_generated_parts_are_current(page: Path) -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec and spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = page.read_text("utf-8")
    assert generate.render(text) == text, "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text("utf-8"))
    for link in _LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_examples_load(page: Path, tmp_path: Path) -> None:
    for language, file, content in fences(page):
        if language == "python":
            compile(content, name(page), "exec")
        if language not in ("json", "yaml"):
            continue
        if file == "rows.jsonl":
            assert all(json.loads(line)["messages"] for line in content.splitlines())
            continue
        kind = next((kind for kind in CONFIGS if file.startswith(kind)), None)
        assert kind, f"a {language} block says which file it is: ```{language} data.json"
        (tmp_path / file).write_text(content, encoding="utf-8")
        load_config(CONFIGS[kind], tmp_path / file)


def test_both_languages_have_the_same_pages() -> None:
    assert sorted(path.name for path in (ROOT / "docs/zh").glob("*.md")) == GUIDE


@pytest.mark.parametrize("page", GUIDE)
def test_both_languages_say_the_same(page: str) -> None:
    """The same blocks, tables and keys, and links to the same places."""
    english, chinese = (ROOT / "docs" / language / page for language in LANGUAGES)
    assert fences(chinese) == fences(english)
    assert list(rows(chinese)) == list(rows(english))
    assert count_rows(chinese) == count_rows(english)
    if page != "index.md":  # each index links to the other
        assert linked_files(chinese) == linked_files(english)


def rows(page: Path) -> dict[str, str]:
    """Return the second column of the table rows whose first column is nothing but code, by that code."""
    found = re.findall(r"^\| `([^|`]+(?:`, `[^|`]+)*)` \| (.*?) \|", page.read_text("utf-8"), re.MULTILINE)
    return dict(found)


def count_rows(page: Path) -> int:
    return sum(line.startswith("|") for line in page.read_text("utf-8").splitlines())


def linked_files(page: Path) -> list[str]:
    return sorted(link.partition("#")[0] for link in _LINK.findall(page.read_text("utf-8")))


DOCUMENTED: list[tuple[str, type[Config], set[str]]] = [
    ("fsdp2_yaml.md", Fsdp2Config, set()),
    ("data.md", HuggingFacePreprocess, set()),
    ("data.md", HuggingFaceBasic, set()),
    ("data.md", HuggingFaceAttributes, set()),
    ("sampling.md", MixtureSource, {"dataset"}),
    ("data.md", DataloaderParam, {"collate_param"}),
    ("data.md", CollateParam, set()),
    ("model_json.md", LossConfig, set()),
]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("page", "cls", "without_default"), DOCUMENTED, ids=lambda value: getattr(value, "__name__", "")
)
def test_every_key_is_documented(language: str, page: str, cls: type[Config], without_default: set[str]) -> None:
    documented = rows(ROOT / "docs" / language / page)
    for key, field in cls.model_fields.items():
        assert key in documented, f"{page} does not name {key}"
        if key not in without_default:
            assert documented[key] == f"`{_json(field.default)}`", f"{page}: default of {key}"


def _json(value: Any) -> str:
    assert value is not PydanticUndefined
    return json.dumps(value)
