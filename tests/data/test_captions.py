from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mindspeed_mm.data.captions import TextProcesser
from mindspeed_mm.errors import UserError

CLEAN = [{"method": "basic_clean"}, {"method": "whitespace_clean"}]


class WordTokenizer:
    """Gives a word the id of its length, cuts and pads to four; keeps the texts it has seen."""

    model_max_length = 4

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, texts: Any, *, max_length: int, **options: Any) -> dict[str, torch.Tensor]:
        self.seen.append(texts)
        assert options == dict(padding="max_length", truncation=True, return_attention_mask=True, return_tensors="pt")
        rows = [[len(word) for word in text.split()][:max_length] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture(autouse=True)
def ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the optional package."""
    monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=lambda text: text.replace("â€œ", '"')))


def test_the_documented_cleaning() -> None:
    tokenizer = WordTokenizer()
    ids, mask = TextProcesser(tokenizer=tokenizer, text_preprocess_methods=CLEAN, cfg=0)(" a â€œbee\n &amp;lt;3 ")
    assert tokenizer.seen == [['a "bee <3']]
    assert ids.tolist() == [[1, 4, 2, 0]]
    assert mask.tolist() == [[1, 1, 1, 0]]


def test_several_tokenizers_and_captions() -> None:
    tokenizers = [WordTokenizer(), WordTokenizer()]
    ids, mask = TextProcesser(tokenizers, use_clean_caption=False, cfg=0)(["A bc ", "DEF"])
    assert tokenizers[1].seen == [["a bc", "def"]]
    assert [len(ids), len(mask), ids[1].tolist()] == [2, 2, [[1, 2, 0, 0], [3, 0, 0, 0]]]


def test_a_share_of_the_captions_is_dropped() -> None:
    random.seed(0)
    tokenizer = WordTokenizer()
    process = TextProcesser(tokenizer, use_clean_caption=False, cfg=0.25)
    for _ in range(400):
        process(["a", "b"])
    assert 70 < tokenizer.seen.count(["", ""]) < 130
    assert tokenizer.seen.count(["a", "b"]) + tokenizer.seen.count(["", ""]) == 400


def test_texts_as_they_are() -> None:
    tokenizer = WordTokenizer()
    TextProcesser(tokenizer, enable_text_preprocessing=False, cfg=1)([" A "])
    assert tokenizer.seen == [[" A "]]


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="use_clean_caption is not available"):
        TextProcesser(WordTokenizer())
    with pytest.raises(UserError, match=r"'basic_clear'.*Did you mean 'basic_clean'"):
        TextProcesser(WordTokenizer(), text_preprocess_methods={"method": "basic_clear"})
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"basic_clean needs .*mindspeed-mm\[video\]"):
        TextProcesser.basic_clean("a")
