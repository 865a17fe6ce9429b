"""A Chat Completions answer that came in one piece: read into Messages, released as what was read.

Each choice becomes one Message: reasoning, text, refusal, citations, tool calls. Nothing of a choice is released
but the fields of ``chat_fields``; what cannot be screened and is not needed (log probabilities, vendors' second
copies) is dropped, and what cannot be screened and is the answer (audio, pictures, unknown content) is refused.

Refuses (``UpstreamError``): no choices, more than were asked for or a repeated index; a choice without a message
or without ``finish_reason``; an ``error`` in a 200; fields of the wrong type; unknown fields that carry content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guard_middleware.dialects.answer_shared import read_envelope, read_index, unread_id, upstream_error
from guard_middleware.dialects.base import Answer, Options, ParsedRequest, Ruling
from guard_middleware.dialects.chat_fields import CALL, CHOICE, COMPLETION, MESSAGE, TOOL_CALLS
from guard_middleware.dialects.chat_moderation import explain
from guard_middleware.dialects.chat_shared import MOST_CALLS, read_annotations, read_named
from guard_middleware.dialects.fields import (
    FieldError,
    admit,
    as_identifier,
    as_list,
    as_object,
    as_word,
    in_order,
    invalid,
    unsupported_content,
)
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Part, Reasoning, Text, ToolCall


@dataclass(frozen=True, slots=True)
class ParsedCompletion:
    """``body`` is the answer without its choices; ``choices`` are they, by index, in the order they came."""

    body: dict[str, JSONValue]
    choices: Mapping[int, dict[str, JSONValue]]
    answers: tuple[Answer, ...]

    answer_id = None  # a Chat Completions answer cannot be continued by its id

    def render(self, ruling: Ruling) -> bytes:
        said = {answer.index: answer for answer in self.answers}
        choices: list[Any] = []
        for index, choice in self.choices.items():
            if ruling.blocked(index, bool(said[index].message.parts)):
                message, finish_reason = blocked(ruling.choices[index].message, ruling.soft)
                choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason})
            else:
                choices.append(choice)
        return dumps({**self.body, "choices": choices, **explain(ruling)})


def blocked(public_text: str, soft: bool) -> tuple[dict[str, JSONValue], str]:
    """(message, finish_reason) in place of a blocked choice."""
    if soft:
        return {"role": "assistant", "content": public_text, "refusal": None}, "stop"
    return {"role": "assistant", "content": None, "refusal": public_text}, "content_filter"


def parse_response(body: JSONValue, request: ParsedRequest, options: Options) -> ParsedCompletion:
    """Read the body of a 200; raises ``UpstreamError`` and nothing else."""
    try:
        return _completion(body, request, options)
    except FieldError as error:
        raise upstream_error(error) from None


def _completion(body: JSONValue, request: ParsedRequest, options: Options) -> ParsedCompletion:
    source = as_object(body, "")
    top = read_envelope(COMPLETION, source, options)
    choices: dict[int, dict[str, JSONValue]] = {}
    answers: list[Answer] = []
    items = as_list(source.get("choices"), "choices", request.choices)
    if not items:
        raise invalid("choices", "is empty")
    for number, item in enumerate(items):
        where = f"choices[{number}]"
        choice = as_object(item, where)
        index = read_index(choice, where, request.choices)
        if index in choices:
            raise invalid(f"{where}.index", "is repeated")
        outer = admit(CHOICE, choice, where, options)
        finish_reason = as_word(choice.get("finish_reason"), f"{where}.finish_reason")
        message, parts = _message(choice.get("message"), f"{where}.message", options)
        parts += [Text(text) for text in [*outer.extras.values(), *top.extras.values()]]
        kept = outer.kept | {"index": index, "message": message}
        choices[index] = in_order(choice, kept)
        answers.append(Answer(index, Message("assistant", tuple(parts)), finish_reason))
    return ParsedCompletion(top.kept, choices, tuple(sorted(answers, key=lambda answer: answer.index)))


def check_role(value: JSONValue, path: str) -> None:
    if value not in (None, "", "assistant"):
        raise unsupported_content(path, "must be assistant")


def spoken(texts: Mapping[str, str]) -> list[Part]:
    """The parts of what was said: reasoning first (vendors send it under two names), then text, then refusal."""
    thoughts = dict.fromkeys(texts[name] for name in ("reasoning_content", "reasoning") if texts.get(name))
    words = [texts[name] for name in ("content", "refusal") if texts.get(name)]
    return [*map(Reasoning, thoughts), *map(Text, words)]


def _message(value: JSONValue, path: str, options: Options) -> tuple[dict[str, JSONValue], list[Part]]:
    source = as_object(value, path)
    check_role(source.get("role"), f"{path}.role")
    admitted = admit(MESSAGE, source, path, options)
    kept, parts = admitted.kept, spoken(admitted.texts)
    for name in ("annotations", "tool_calls", "function_call"):
        if name in source and source[name] is None:
            kept[name] = None
    if (annotations := source.get("annotations")) is not None:
        kept["annotations"], found = read_annotations(annotations, f"{path}.annotations", options)
        parts += found
    if (calls := source.get("tool_calls")) is not None:
        kept["tool_calls"], asked = _tool_calls(calls, f"{path}.tool_calls", options)
        parts += asked
    if (call := source.get("function_call")) is not None:
        kept["function_call"], name, arguments, extra = read_named(
            CALL["function"], call, f"{path}.function_call", options
        )
        parts += [ToolCall("", name, arguments), *extra]
    parts += [Text(text) for text in admitted.extras.values()]
    return in_order(source, kept), parts


def _tool_calls(value: JSONValue, path: str, options: Options) -> tuple[list[JSONValue], list[Part]]:
    kept: list[JSONValue] = []
    parts: list[Part] = []
    for number, item in enumerate(as_list(value, path, MOST_CALLS)):
        where = f"{path}[{number}]"
        source = as_object(item, where)
        kind = as_word(source.get("type", "function"), f"{where}.type")
        table = TOOL_CALLS.get(kind)
        if table is None:
            raise unsupported_content(f"{where}.type", "this type of tool call cannot be moderated")
        admitted = admit(table, source, where, options)
        id = "" if source.get("id") == "" else as_identifier(source.get("id"), f"{where}.id")
        inner, name, arguments, extra = read_named(CALL[kind], source.get(kind), f"{where}.{kind}", options)
        kept.append(in_order(source, admitted.kept | {"id": id, kind: inner}))
        parts += [ToolCall(id, name, arguments), *unread_id(id, name), *extra]
        parts += [Text(text) for text in admitted.extras.values()]
    return kept, parts
