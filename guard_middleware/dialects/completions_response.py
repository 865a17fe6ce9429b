"""A legacy Completions answer that came in one piece: one Message per choice, released as what was read.

Refuses (``UpstreamError``): no choices, more than were asked for or a repeated index; a choice without text or
without ``finish_reason``; an ``error`` in a 200; fields of the wrong type; unknown fields that carry content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from guard_middleware.dialects.answer_shared import read_envelope, read_index, upstream_error
from guard_middleware.dialects.base import Answer, Options, ParsedRequest, Ruling
from guard_middleware.dialects.chat_moderation import explain
from guard_middleware.dialects.completions_fields import CHOICE, COMPLETION
from guard_middleware.dialects.fields import FieldError, admit, as_list, as_object, as_word, in_order, invalid
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Part, Reasoning, Text


@dataclass(frozen=True, slots=True)
class ParsedText:
    """``body`` is the answer without its choices; ``choices`` are they, by index, in the order they came."""

    body: dict[str, JSONValue]
    choices: Mapping[int, dict[str, JSONValue]]
    answers: tuple[Answer, ...]

    answer_id = None  # nothing continues a text completion by its id

    def render(self, ruling: Ruling) -> bytes:
        said = {answer.index: answer for answer in self.answers}
        choices: list[JSONValue] = [
            blocked(index, ruling.choices[index].message, ruling.soft)
            if ruling.blocked(index, bool(said[index].message.parts))
            else choice
            for index, choice in self.choices.items()
        ]
        return dumps({**self.body, "choices": choices, **explain(ruling)})


def blocked(index: int, public_text: str, soft: bool) -> dict[str, JSONValue]:
    """A choice in place of a blocked one; this API has no field for a refusal."""
    ending: tuple[str, str] = (public_text, "stop") if soft else ("", "content_filter")
    return {"text": ending[0], "index": index, "logprobs": None, "finish_reason": ending[1]}


def spoken(texts: Mapping[str, str]) -> list[Part]:
    """The parts of what was said: reasoning, then text."""
    thoughts: list[Part] = [Reasoning(texts["reasoning"])] if texts.get("reasoning") else []
    return [*thoughts, *([Text(texts["text"])] if texts.get("text") else [])]


def parse_response(body: JSONValue, request: ParsedRequest, options: Options) -> ParsedText:
    """Read the body of a 200; raises ``UpstreamError`` and nothing else."""
    try:
        return _completion(body, request, options)
    except FieldError as error:
        raise upstream_error(error) from None


def _completion(body: JSONValue, request: ParsedRequest, options: Options) -> ParsedText:
    source = as_object(body, "")
    top = read_envelope(COMPLETION, source, options)
    choices: dict[int, dict[str, JSONValue]] = {}
    answers: list[Answer] = []
    for number, item in enumerate(as_list(source.get("choices"), "choices", request.choices)):
        where = f"choices[{number}]"
        choice = as_object(item, where)
        index = read_index(choice, where, request.choices)
        if index in choices:
            raise invalid(f"{where}.index", "is repeated")
        outer = admit(CHOICE, choice, where, options)
        if "text" not in outer.texts:
            raise invalid(f"{where}.text", "must be a string")
        finish_reason = as_word(choice.get("finish_reason"), f"{where}.finish_reason")
        parts = spoken(outer.texts) + [Text(text) for text in [*outer.extras.values(), *top.extras.values()]]
        choices[index] = in_order(choice, outer.kept | {"index": index, "logprobs": None})
        answers.append(Answer(index, Message("assistant", tuple(parts)), finish_reason))
    if not answers:
        raise invalid("choices", "is empty")
    return ParsedText(top.kept, choices, tuple(sorted(answers, key=lambda answer: answer.index)))
