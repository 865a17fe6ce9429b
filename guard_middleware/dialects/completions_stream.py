"""A streamed legacy Completions answer: every chunk checked, cut into frames of one choice, re-emitted when cleared.

Refuses (``UpstreamError``): named events, data that is not a chunk, ``{"error": ...}``, anything after ``[DONE]``;
unknown fields that carry content; choices that were not asked for; text of a choice after its ``finish_reason``; an
end without ``[DONE]``, without choices, or with a choice that has no ``finish_reason``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import DONE, read_chunk, read_envelope, read_index, upstream_error
from guard_middleware.dialects.base import Answer, Frame, Notice, Options, ParsedRequest, PublicError, Ruling, Said
from guard_middleware.dialects.chat_moderation import explain
from guard_middleware.dialects.completions_fields import CHOICE, COMPLETION
from guard_middleware.dialects.completions_response import blocked, spoken
from guard_middleware.dialects.fields import FieldError, admit, as_list, as_object, as_word, in_order, invalid
from guard_middleware.dialects.openai_error import openai_error
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Text

_PER_CHUNK = 64
#: what an ending of ours repeats of the upstream's chunks: identity, never content
_ENVELOPE = ("id", "object", "created", "model", "system_fingerprint")


@dataclass(slots=True)
class _Choice:
    texts: dict[str, list[str]] = field(default_factory=dict)
    extras: dict[str, list[str]] = field(default_factory=dict)
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A frame's value: one choice of a chunk, and the chunk's top level."""

    body: dict[str, JSONValue]
    choice: dict[str, JSONValue]

    def encode(self, **more: JSONValue) -> bytes:
        return sse.encode(dumps({**self.body, "choices": [self.choice], **more}))


class TextStreamParser:
    """``base.StreamParser`` of this API."""

    keep_alive = sse.comment("guard pending")
    answer_id = None

    def __init__(self, request: ParsedRequest, options: Options) -> None:
        self._request, self._options = request, options
        self._choices: dict[int, _Choice] = {}
        self._envelope: dict[str, JSONValue] = {}
        self._usage: JSONValue = None
        self._endings: dict[int, _Piece] = {}
        self._cut: set[int] = set()
        self._extras: dict[str, list[str]] = {}
        self._done = False

    def feed(self, event: sse.Event) -> Sequence[Frame]:
        """Take one event; raises ``UpstreamError``."""
        if self._done:
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "data after [DONE]")
        chunk = read_chunk(event)
        if chunk is None:
            self._done = True
            return ()
        try:
            return self._chunk(chunk)
        except FieldError as error:
            raise upstream_error(error) from None

    def finish(self) -> tuple[Answer, ...]:
        """The whole answer; raises ``UpstreamError`` where the stream is not complete."""
        if not self._done:
            raise UpstreamError(UpstreamErrorKind.RESET, "the stream ended without [DONE]")
        if not self._choices or any(choice.finish_reason is None for choice in self._choices.values()):
            raise UpstreamError(UpstreamErrorKind.MALFORMED, "the stream ended without a finish_reason")
        answers = []
        for index, choice in sorted(self._choices.items()):
            parts = spoken({name: "".join(pieces) for name, pieces in choice.texts.items()})
            parts += [Text("".join(pieces)) for pieces in [*choice.extras.values(), *self._extras.values()]]
            answers.append(Answer(index, Message("assistant", tuple(parts)), choice.finish_reason))
        return tuple(answers)

    def release(self, frame: Frame) -> bytes:
        piece: _Piece = frame.value
        return piece.encode()

    def cut(self, choice: int, notice: Notice, soft: bool) -> bytes:
        self._cut.add(choice)
        return _Piece(self._envelope, blocked(choice, notice.message, soft)).encode()

    def close(self, ruling: Ruling) -> bytes:
        """The chunks that end the choices, in the order in which they ended, the moderation, usage, ``[DONE]``."""
        endings = [piece for index, piece in self._endings.items() if index not in self._cut]
        said = explain(ruling)
        if said and not endings:  # every choice was cut: a chunk of its own, with a choice, as clients read choices[0]
            told: dict[str, JSONValue] = {"text": "", "index": min(self._cut), "logprobs": None, "finish_reason": None}
            endings = [_Piece(self._envelope, told)]
        out = [piece.encode() for piece in endings[:-1]]
        out += [piece.encode(**said) for piece in endings[-1:]]
        if self._request.include_usage and self._usage is not None:
            out.append(sse.encode(dumps({**self._envelope, "choices": [], "usage": self._usage})))
        return b"".join([*out, sse.encode(DONE)])

    def fail(self, error: PublicError) -> bytes:
        return sse.encode(openai_error(error, prompt_param="prompt").body) + sse.encode(DONE)

    def _chunk(self, source: dict[str, JSONValue]) -> list[Frame]:
        admitted = read_envelope(COMPLETION, source, self._options)
        _gather(self._extras, admitted.extras)
        body = {name: value for name, value in admitted.kept.items() if name != "usage"}
        self._usage = admitted.kept.get("usage") or self._usage
        self._envelope = self._envelope or {name: body[name] for name in _ENVELOPE if name in body}
        frames: list[Frame] = []
        for number, item in enumerate(as_list(source.get("choices"), "choices", _PER_CHUNK)):
            frames += self._choice(item, f"choices[{number}]", body, bool(admitted.extras))
        return frames

    def _choice(self, value: JSONValue, where: str, body: dict[str, JSONValue], whole: bool) -> Iterator[Frame]:
        source = as_object(value, where)
        index = read_index(source, where, self._request.choices)
        state = self._choices.setdefault(index, _Choice())
        outer = admit(CHOICE, source, where, self._options)
        _gather(state.texts, outer.texts)
        _gather(state.extras, outer.extras)
        said = tuple(Said(name, text, name == "reasoning") for name, text in outer.texts.items() if text)
        whole = whole or bool(outer.extras)
        if state.finish_reason is not None:
            if said or whole:
                raise invalid(f"{where}.text", "has content after its finish_reason")
            return
        kept = in_order(source, outer.kept | {"index": index})
        kept |= {"text": outer.texts.get("text", ""), "logprobs": None, "finish_reason": None}
        if outer.kept.get("finish_reason") is not None:
            state.finish_reason = as_word(outer.kept["finish_reason"], f"{where}.finish_reason")
            rest = {name: item for name, item in kept.items() if name not in outer.texts | outer.extras}
            head = {name: body[name] for name in _ENVELOPE if name in body}
            self._endings[index] = _Piece(head, rest | {"text": "", "finish_reason": state.finish_reason})
        if state.finish_reason is None or said or whole:
            yield Frame(index, _Piece(body, kept), said, whole)


def _gather(into: dict[str, list[str]], pieces: dict[str, str]) -> None:
    for name, text in pieces.items():
        into.setdefault(name, []).append(text)
