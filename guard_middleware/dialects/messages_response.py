"""A Messages answer that came in one piece: read into one Message, released as what was read.

Every block of ``content`` is read where it stands. Nothing is released but the fields of ``messages_fields``. A
blocked answer is a ``refusal`` with ``stop_details`` and without content, as the service itself would end one. What
the API has no place for (decision ids, reasoning that policy shows) goes to the top-level key ``x_guard``.

Refuses (``UpstreamError``): an error in a 200; an answer without content or ``stop_reason``, or of another role;
blocks and fields that cannot be screened, such as the results of web searches.
"""

from __future__ import annotations

from dataclasses import dataclass

from guard_middleware.dialects.answer_shared import upstream_error
from guard_middleware.dialects.base import Answer, Notice, Options, ParsedRequest, Ruling
from guard_middleware.dialects.chat_moderation import explain
from guard_middleware.dialects.fields import (
    Admitted,
    FieldError,
    admit,
    as_identifier,
    as_object,
    as_word,
    in_order,
    invalid,
    unsupported_content,
)
from guard_middleware.dialects.messages_blocks import BlockReader
from guard_middleware.dialects.messages_fields import COUNT, MESSAGE, STOP_DETAILS
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Part, Text


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """``body`` is the whole answer as it may be released."""

    body: dict[str, JSONValue]
    answers: tuple[Answer, ...]
    answer_id: str | None

    def render(self, ruling: Ruling) -> bytes:
        (answer,) = self.answers
        body = self.body
        if ruling.blocked(answer.index, bool(answer.message.parts)):
            notice = ruling.choices[answer.index]
            told: JSONValue = [{"type": "text", "text": notice.message}] if ruling.soft else []
            body = {**body, "content": told, **refusal(notice, ruling.soft)}
        return dumps({**body, **explained(ruling)})


@dataclass(frozen=True, slots=True)
class ParsedCount:
    """The answer to a question for a number of tokens: only numbers, nothing to judge."""

    body: dict[str, JSONValue]

    answers: tuple[Answer, ...] = ()
    answer_id = None

    def render(self, ruling: Ruling) -> bytes:
        return dumps({**self.body, **explained(ruling)})


def refusal(notice: Notice, soft: bool) -> dict[str, JSONValue]:
    """How a blocked answer stops. ``category`` is null because typed clients know no categories but the service's."""
    if soft:
        return {"stop_reason": "end_turn", "stop_sequence": None, "stop_details": None}
    details: JSONValue = {"type": "refusal", "category": None, "explanation": notice.message}
    return {"stop_reason": "refusal", "stop_sequence": None, "stop_details": details}


def explained(ruling: Ruling) -> dict[str, JSONValue]:
    """The top-level key that says what was decided; none where there is nothing to say."""
    said = explain(ruling)
    return {"x_guard": said["x_guard"]} if said else {}


def thread_id(request: ParsedRequest, message: dict[str, JSONValue]) -> str | None:
    """The id by which a thread goes on after this answer; None where the service keeps no thread."""
    id = message.get("id")
    return id if isinstance(id, str) and request.body.get("thread") is not None else None


def reader(options: Options) -> BlockReader:
    """Reads the blocks of an answer."""
    return BlockReader(options, printed=False, id=as_identifier)


def parse_response(body: JSONValue, request: ParsedRequest, options: Options) -> ParsedMessage:
    """Read the body of a 200; raises ``UpstreamError`` and nothing else."""
    try:
        source = as_object(body, "")
        envelope, parts = read_envelope(source, "", request, options)
        kept = envelope.kept
        stop_reason = as_word(source.get("stop_reason"), "stop_reason")
        if not isinstance(source.get("content"), list):
            raise invalid("content", "must be an array of blocks")
        kept["content"], said = reader(options).content(source["content"], "assistant", "content", ("content",))
        message = Message("assistant", tuple(part for part in (*said, *parts) if part != Text("")))
        return ParsedMessage(
            in_order(source, kept) | kept, (Answer(0, message, stop_reason),), thread_id(request, kept)
        )
    except FieldError as error:
        raise upstream_error(error) from None


def parse_count(body: JSONValue, options: Options) -> ParsedCount:
    """Read the answer of ``count_tokens``; raises ``UpstreamError`` and nothing else."""
    try:
        admitted = admit(COUNT, _no_error(as_object(body, "")), "", options)
        if admitted.extras:
            raise unsupported_content("", "a number of tokens says nothing")
        if type(admitted.kept.get("input_tokens")) is not int:
            raise invalid("input_tokens", "must be a number")
        return ParsedCount(admitted.kept)
    except FieldError as error:
        raise upstream_error(error) from None


def read_envelope(
    source: dict[str, JSONValue], path: str, request: ParsedRequest, options: Options
) -> tuple[Admitted, list[Part]]:
    """An answer without its content, and what it says there; servers may leave out what is always the same."""
    envelope = admit(MESSAGE, _no_error(source), path, options)
    kept = envelope.kept
    if source.get("role") not in (None, "assistant") or source.get("type") not in (None, "message"):
        raise unsupported_content(f"{path}.role".lstrip("."), "must be a message of the assistant")
    kept |= {"type": "message", "role": "assistant", "stop_reason": kept.get("stop_reason") or None}
    parts = read_ending(source, envelope, request, options)
    return envelope, [*parts, *(Text(text) for text in envelope.extras.values())]


def read_ending(
    source: dict[str, JSONValue], admitted: Admitted, request: ParsedRequest, options: Options
) -> list[Part]:
    """What the end of an answer says: a stop sequence that the request did not name, an explanation.

    Puts what may be released of ``stop_details`` into ``admitted``.
    """
    parts: list[Part] = []
    sequence = admitted.texts.get("stop_sequence")
    named = request.body.get("stop_sequences")
    if sequence and not (isinstance(named, list) and sequence in named):
        parts.append(Text(sequence))
    if "stop_details" in source:
        admitted.kept["stop_details"] = None
    if (details := source.get("stop_details")) is not None:
        inner = admit(STOP_DETAILS, details, "stop_details", options)
        admitted.kept["stop_details"] = dict(inner.kept)
        parts += [Text(text) for text in (*inner.texts.values(), *inner.extras.values()) if text]
    return parts


def _no_error(source: dict[str, JSONValue]) -> dict[str, JSONValue]:
    if source.get("error") is not None or source.get("type") == "error":
        raise UpstreamError(UpstreamErrorKind.RESET, "the upstream reported an error inside its answer")
    return source
