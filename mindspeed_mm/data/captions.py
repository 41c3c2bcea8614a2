"""From the caption of a video or an image to the token ids of a text encoder."""

from __future__ import annotations

import html
import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mindspeed_mm.errors import UserError, did_you_mean
from mindspeed_mm.extras import import_extra


class TextProcesser:
    """Clean captions and tokenise them.

    Args:
        tokenizer: a Hugging Face tokenizer, or a list of them for a model with several text encoders. Their
            ``model_max_length`` is the length to which captions are cut and padded.
        use_clean_caption: the published default cleaning, which is not available here; False only lowers and strips.
        enable_text_preprocessing: False takes captions as they are, and drops none.
        padding_type: as ``padding`` of the tokenizer.
        support_chinese: accepted; it belongs to the published default cleaning.
        text_preprocess_methods: ``{"method": name}`` or a list of these, applied in order instead of the default:
            ``basic_clean``, ``whitespace_clean``.
        cfg: share of the calls whose captions are replaced by empty ones, which trains the unconditional model of
            classifier-free guidance (Ho and Salimans, 2022). Drawn with :mod:`random`.

    Raises:
        UserError: a method is unknown, or none is given and ``use_clean_caption`` is left on.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        use_clean_caption: bool = True,
        enable_text_preprocessing: bool = True,
        padding_type: str = "max_length",
        support_chinese: bool = False,
        text_preprocess_methods: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        cfg: float = 0.1,
    ) -> None:
        methods = text_preprocess_methods or []
        self.methods = [methods] if isinstance(methods, Mapping) else list(methods)
        if enable_text_preprocessing and not self.methods and use_clean_caption:
            raise UserError(
                "TextProcesser: the cleaning of use_clean_caption is not available; set use_clean_caption to false, "
                'or text_preprocess_methods to [{"method": "basic_clean"}, {"method": "whitespace_clean"}].'
            )
        for method in self.methods:
            if (name := method.get("method")) not in _METHODS:
                raise UserError(
                    f"TextProcesser: text_preprocess_methods has the method {name!r}; "
                    f"use one of {', '.join(_METHODS)}.{did_you_mean(str(name), _METHODS)}"
                )
        self.tokenizer = tokenizer
        self.enable_text_preprocessing = enable_text_preprocessing
        self.padding = padding_type
        self.cfg = cfg

    def __call__(self, texts: str | Sequence[str]) -> tuple[Any, Any]:
        """Return ``(prompt_ids, prompt_mask)`` of one caption or several.

        Both are int64 tensors of shape ``(captions, length)``; with several tokenizers, lists of such tensors.
        """
        if self.enable_text_preprocessing:
            cleaned = [self._clean(text) for text in ([texts] if isinstance(texts, str) else texts)]
            texts = [""] * len(cleaned) if random.random() < self.cfg else cleaned
        if not isinstance(self.tokenizer, (list, tuple)):
            return self._tokenize(self.tokenizer, texts)
        pairs = [self._tokenize(tokenizer, texts) for tokenizer in self.tokenizer]
        return [ids for ids, _ in pairs], [mask for _, mask in pairs]

    def _clean(self, text: str) -> str:
        for method in self.methods:
            text = _METHODS[method["method"]](text)
        return text if self.methods else text.lower().strip()

    def _tokenize(self, tokenizer: Any, texts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = tokenizer(
            texts,
            max_length=tokenizer.model_max_length,
            padding=self.padding,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"]

    @staticmethod
    def basic_clean(text: str) -> str:
        """Repair broken Unicode with ftfy, resolve HTML entities, also doubly escaped ones, and strip."""
        ftfy = import_extra("ftfy", "video", "the method basic_clean")
        return html.unescape(html.unescape(ftfy.fix_text(text))).strip()

    @staticmethod
    def whitespace_clean(text: str) -> str:
        """Make every run of white space one blank, and strip."""
        return " ".join(text.split())


_METHODS = {"basic_clean": TextProcesser.basic_clean, "whitespace_clean": TextProcesser.whitespace_clean}
