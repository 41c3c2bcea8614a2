"""Render a conversation with the model's own chat template and find what the assistant wrote in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.data.conversations import PLACEHOLDERS
from mindspeed_mm.errors import UserError

_QUESTION, _ANSWER, _NEXT = "QuestionMarker", "AnswerMarker", "NextMarker"


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation.

    Attributes:
        text: the prompt with one placeholder per image, as the processor wants it.
        is_document: no template has written it, and with it the tokens that begin every text.
        turns: for every assistant turn the character span ``[start, end)`` of its content and end-of-turn token. A
            conversation that the template leaves open is closed with the tokenizer's EOS token.
    """

    text: str
    turns: list[tuple[int, int]]
    is_document: bool = False


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
        self._between = {"user": self._render(probe).partition(_ANSWER)[2].partition(_NEXT)[0]}
        if not self._between["user"].strip():
            raise UserError("the model's chat template puts nothing between two turns; their ends cannot be found")
        self._end_of_turn = self._leading_special_token(self._tail)
        self._line_breaks: dict[str, bool] = {}

    def render(self, row: Mapping[str, Any]) -> Prompt:
        """Render the conversation of a row as ``read_conversations`` gives it.

        Raises:
            UserError: the template changes or leaves out a turn, a call of a function or a tool.
        """
        kinds = [kind for kind in PLACEHOLDERS if row.get(kind)]
        messages = [self._message(message, kinds) for message in row["messages"]]
        if messages[0]["role"] == "document":
            return self._document(messages[0]["content"])
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in _list(row, "tools")]
        given: dict[str, Any] = {"tools": tools} if tools else {}
        text = self._render(messages, **given)
        self._expect_names(text, tools, "a tool")
        turns = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._start_of_turn(text, messages[:index], given)
                end = self._end_of_content(text, start, messages[index + 1]["role"] if messages[index + 1 :] else None)
                # A template may drop the reasoning of earlier turns; it must keep the answer.
                answer = row["messages"][index]["content"].rpartition("</think>")[2].strip()
                if answer not in text[start:end]:
                    raise UserError(f"the model's chat template does not print message {index + 1} as it is written")
                self._expect_names(text[start:end], message.get("tool_calls", []), f"message {index + 1}: the call of")
                turns.append((start, end + len(self._end_of_turn)))
        if not self._end_of_turn:
            # The template leaves the last turn open; closed, it also teaches the model to stop.
            text += self._tokenizer.eos_token or ""
            turns[-1] = (turns[-1][0], len(text))
        return Prompt(text, turns)

    def _document(self, content: str | list[dict[str, str]]) -> Prompt:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] if part["type"] == "text" else self._mark(f"{part['type']}s") for part in parts)
        text += self._tokenizer.eos_token or ""
        return Prompt(text, [(0, len(text))], is_document=True)

    def _mark(self, kind: str) -> str:
        """Return what the template writes for an image, a video or audio; nothing if it takes none."""
        if self._processor is self._tokenizer:
            return ""
        before = [
            self._render([{"role": "user", "content": [*parts, {"type": "text", "text": _QUESTION}]}])
            for parts in ([{"type": kind.removesuffix("s")}], [])
        ]
        with_mark, without = (text.partition(_QUESTION)[0] for text in before)
        return with_mark.removeprefix(without)

    def _brings_line_break(self, kind: str) -> bool:
        if kind not in self._line_breaks:
            self._line_breaks[kind] = self._mark(f"{kind}s").endswith("\n")
        return self._line_breaks[kind]

    def _expect_names(self, text: str, functions: list[Any], what: str) -> None:
        for name in (function["function"].get("name") for function in functions):
            if not isinstance(name, str) or name not in text:
                raise UserError(f"the model's chat template does not print {what} {name!r}; remove the row")

    def _start_of_turn(self, text: str, before: list[dict[str, Any]], given: dict[str, Any]) -> int:
        """Return where the generation prompt for the next turn ends in ``text``."""
        # With thinking disabled, templates put an empty thought into the generation prompt of the last turn only.
        attempts = [self._options, {"enable_thinking": not self._options["enable_thinking"]}] if self._options else [{}]
        for options in attempts:
            prefix = self._render(before, add_generation_prompt=True, **options, **given)
            if text.startswith(prefix):
                return len(prefix)
        raise UserError(
            f"the model's chat template rewrites earlier turns when a later one is added (message {len(before) + 1}); "
            "labels cannot be placed. Split the conversation into rows of one question and one answer"
        )

    def _end_of_content(self, text: str, start: int, next_role: str | None) -> int:
        """Return where the content of the turn that starts at ``start`` ends, its end-of-turn token excluded."""
        if next_role is None:
            end = len(text) - len(self._tail) if text.endswith(self._tail) else -1
            separator = self._tail
        else:
            separator = self._before(next_role)
            end = text.find(separator, start)
        if end < start:
            raise UserError("the model's chat template ends this turn in an unusual way; labels cannot be placed")
        return end + (len(separator) - len(separator.lstrip()) if self._end_of_turn else 0)

    def _before(self, role: str) -> str:
        """Return what stands between an answer and the content of the turn of ``role`` after it."""
        if role not in self._between:
            probe = [
                {"role": "user", "content": _QUESTION},
                {"role": "assistant", "content": _ANSWER},
                {"role": role, "content": _NEXT},
            ]
            if not self._prints(probe):
                raise UserError(f"the model's chat template has no turns of role {role!r}; remove such rows")
            self._between[role] = self._render(probe).partition(_ANSWER)[2].partition(_NEXT)[0]
        return self._between[role]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **options: Any) -> str:
        if self._as_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message["content"], str)
                else message
                for message in messages
            ]
        return self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **{**self._options, **options}
        )

    def _message(self, message: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
        """Return a message as chat templates take it."""
        found: dict[str, Any] = {"role": message["role"], "content": self._content(message["content"], kinds)}
        if calls := _list(message, "tool_calls"):
            found["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        return found

    def _content(self, content: str, kinds: list[str]) -> str | list[dict[str, str]]:
        marks = {PLACEHOLDERS[kind]: kind.removesuffix("s") for kind in kinds}
        pieces = re.split(f"({'|'.join(map(re.escape, marks))})", content) if marks else [content]
        if len(pieces) == 1:
            return content
        parts: list[dict[str, str]] = []
        for piece in pieces:
            if piece in marks:
                parts.append({"type": marks[piece]})
                continue
            if parts and parts[-1]["type"] != "text" and self._brings_line_break(parts[-1]["type"]):
                piece = piece.removeprefix("\n")
            if piece:
                parts.append({"type": "text", "text": piece})
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


def _list(values: Mapping[str, Any], key: str) -> list[Any]:
    """Return a list that a row holds as JSON text, empty if there is none."""
    return json.loads(values[key]) if values.get(key) else []
