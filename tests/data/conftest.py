from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny import save_digits, save_tiny_processor, write_jsonl

MESSAGES = {
    "messages": "messages",
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "images": "images",
}


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny processor of a family; each is written once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save_tiny_processor(family, made[family])
        return made[family]

    return folder


@pytest.fixture
def dataset_param(tmp_path: Path, processor_folder: Callable[[str], Path]) -> Callable[..., dict[str, Any]]:
    """Return ``dataset_param`` for rows (by default eight digits) that are written to ``data.jsonl``."""

    def make(rows: list[Any] | None = None, family: str = "qwen3_vl", **basic: Any) -> dict[str, Any]:
        digits = save_digits(tmp_path)
        write_jsonl(tmp_path / "data.jsonl", digits if rows is None else rows)
        return {
            "dataset_type": "huggingface",
            "preprocess_parameters": {"model_name_or_path": str(processor_folder(family))},
            "basic_parameters": {"dataset_dir": str(tmp_path), "dataset": str(tmp_path / "data.jsonl"), **basic},
            "attr": MESSAGES,
        }

    return make
