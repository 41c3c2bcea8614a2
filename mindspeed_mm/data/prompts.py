"""Render a conversation with the model's own chat template and find what the assistant wrote in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.data.conversations import IMAGE_PLACEHOLDER
from mindspeed_mm.errors import UserError

_QUESTION, _ANSWER, _NEXT = "QuestionMarker", "AnswerMarker", "NextMarker"


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Attributes:
        text: the prompt with one placeholder per image, as the processor wants it.
        turns: for every assistant turn the character span ``[start, end)`` of its content and end-of-turn token. A
            conversation that the template leaves open is closed with the tokenizer's EOS token.
    """

    text: str
    turns: list[tuple[int, int]]


class ChatRenderer:
    """Renders conversations with the chat template of a processor or tokenizer.

    An assistant turn starts where the template's generation prompt ends: what the model is given at inference is
    context, all that it has to say itself is target. Where the turn ends, and with which token, is learnt from a
    probe conversation, so that no template needs marks of its own.
    """

    def __init__(self, processor: Any, enable_thinking: bool = True) -> None:
        """Probe the template.

        Args:
            processor: a processor or tokenizer with a chat template.
            enable_thinking: handed to templates that know this variable.

        Raises:
            UserError: there is no template, or it does not print what it is given.
        """
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        template = processor.chat_template
        if not template:
            raise UserError(
                "the folder in preprocess_parameters.model_name_or_path has no chat template; "
                "copy chat_template.jinja (or tokenizer_config.json with 'chat_template') of the original model into it"
            )
        self._options = {"enable_thinking": enable_thinking} if "enable_thinking" in str(template) else {}
        probe = [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": _NEXT},
        ]
        self._as_parts = False
        self._as_parts = not self._prints(probe[:2])
        if self._as_parts and not self._prints(probe[:2]):
            raise UserError("the model's chat template does not print the text of a user or an assistant turn")
        self._tail = self._render(probe[:2]).partition(_ANSWER)[2]
        self._between = self._render(probe).partition(_ANSWER)[2].partition(_NEXT)[0]
        if not self._between.strip():
            raise UserError("the model's chat template puts nothing between two turns; their ends cannot be found")
        self._end_of_turn = self._leading_special_token(self._tail)
        self._image_line_break = self._ends_image_with_line_break()

    def render(self, messages: list[dict[str, str]]) -> Prompt:
        """Render ``messages``, which alternate user and assistant after an optional system turn.

        Raises:
            UserError: the template changes or leaves out a turn.
        """
        text = self._render(messages)
        turns = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._start_of_turn(text, messages[:index])
                end = self._end_of_content(text, start, last=index == len(messages) - 1)
                # A template may drop the reasoning of earlier turns; it must keep the answer.
                answer = message["content"].rpartition("</think>")[2].strip()
                if answer not in text[start:end]:
                    raise UserError(f"the model's chat template does not print message {index + 1} as it is written")
                turns.append((start, end + len(self._end_of_turn)))
        if not self._end_of_turn:
            # The template leaves the last turn open; closed, it also teaches the model to stop.
            text += self._tokenizer.eos_token or ""
            turns[-1] = (turns[-1][0], len(text))
        return Prompt(text, turns)

    def _start_of_turn(self, text: str, before: list[dict[str, str]]) -> int:
        """Return where the generation prompt for the next turn ends in ``text``."""
        # With thinking disabled, templates put an empty thought into the generation prompt of the last turn only.
        attempts = [self._options, {"enable_thinking": not self._options["enable_thinking"]}] if self._options else [{}]
        for options in attempts:
            prefix = self._render(before, add_generation_prompt=True, **options)
            if text.startswith(prefix):
                return len(prefix)
        raise UserError(
            f"the model's chat template rewrites earlier turns when a later one is added (message {len(before) + 1}); "
            "labels cannot be placed. Split the conversation into rows of one question and one answer"
        )

    def _end_of_content(self, text: str, start: int, last: bool) -> int:
        """Return where the content of the turn that starts at ``start`` ends, its end-of-turn token excluded."""
        if last:
            end = len(text) - len(self._tail) if text.endswith(self._tail) else -1
            separator = self._tail
        else:
            end = text.find(self._between, start)
            separator = self._between
        if end < start:
            raise UserError("the model's chat template ends this turn in an unusual way; labels cannot be placed")
        return end + (len(separator) - len(separator.lstrip()) if self._end_of_turn else 0)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False, **options: Any) -> str:
        conversation = [{"role": m["role"], "content": self._content(m["content"])} for m in messages]
        return self._processor.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **{**self._options, **options}
        )

    def _content(self, content: str) -> str | list[dict[str, str]]:
        if IMAGE_PLACEHOLDER not in content:
            return [{"type": "text", "text": content}] if self._as_parts else content
        parts: list[dict[str, str]] = []
        for number, text in enumerate(content.split(IMAGE_PLACEHOLDER)):
            if number > 0:
                parts.append({"type": "image"})
                if self._image_line_break:
                    text = text.removeprefix("\n")
            if text:
                parts.append({"type": "text", "text": text})
        return parts

    def _prints(self, messages: list[dict[str, str]]) -> bool:
        from jinja2 import TemplateError

        try:
            text = self._render(messages)
        except (TemplateError, TypeError):  # TypeError: the template adds text to a list
            return False
        return all(message["content"] in text for message in messages)

    def _leading_special_token(self, text: str) -> str:
        known = {str(token) for token in self._tokenizer.added_tokens_decoder.values()}
        known |= set(self._tokenizer.all_special_tokens)
        choice = "|".join(re.escape(token) for token in sorted(known, key=len, reverse=True) if token)
        found = re.match(rf"\s*({choice})", text) if choice else None
        return found[1] if found else ""

    def _ends_image_with_line_break(self) -> bool:
        """Tell whether the template itself breaks the line after an image, as published rows also do."""
        self._image_line_break = False
        if not hasattr(self._processor, "image_processor"):
            return False
        text = self._render([{"role": "user", "content": IMAGE_PLACEHOLDER + _QUESTION}])
        return text.partition(_QUESTION)[0].endswith("\n") and text.partition(_QUESTION)[1] != ""
