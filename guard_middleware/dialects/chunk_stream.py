"""Streams of chunks with choices, ended by ``[DONE]``: what Chat Completions and Completions have in common.

Chunks are never passed on; they are parsed, their allowed fields kept in order, cut into frames of one choice, and
encoded again.

Refuses (``UpstreamError``): named events, data that is not a chunk, ``{"error": ...}``, anything after ``[DONE]``;
choices that were not asked for; an end without ``[DONE]``, without choices, or with a choice that has no
``finish_reason``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from guard_middleware import sse
from guard_middleware.dialects.answer_shared import DONE, read_chunk, read_envelope, read_index, upstream_error
from guard_middleware.dialects.base import Answer, Frame, Notice, Options, ParsedRequest, PublicError, Ruling
from guard_middleware.dialects.chat_moderation import explain
from guard_middleware.dialects.fields import FieldError, Table, as_list, as_object
from guard_middleware.dialects.openai_error import openai_error
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Message, Part, Text

#: choices in one chunk; past it the answer is malformed
_PER_CHUNK = 64


@dataclass(slots=True)
class Choice:
    """What one choice has said so far, by surface."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    extras: dict[str, list[str]] = field(default_factory=dict)
    finish_reason: str | None = None


C = TypeVar("C", bound=Choice)


@dataclass(frozen=True, slots=True)
class Piece:
    """A frame's value: one choice of a chunk, and the chunk's top level."""

    body: dict[str, JSONValue]
    choice: dict[str, JSONValue]

    def encode(self, **more: JSONValue) -> bytes:
        return sse.encode(dumps({**self.body, "choices": [self.choice], **more}))


class ChunkStreamParser(ABC, Generic[C]):
    """``base.StreamParser`` but for what a choice holds."""

    keep_alive = sse.comment("guard pending")
    answer_id = None
    #: the top level of a chunk
    table: ClassVar[Table]
    #: what an ending of ours repeats of the upstream's chunks: identity, never content
    identity: ClassVar[tuple[str, ...]]
    prompt_param: ClassVar[str]

    def __init__(self, request: ParsedRequest, options: Options) -> None:
        self._request, self._options = request, options
        self._choices: dict[int, C] = {}
        self._envelope: dict[str, JSONValue] = {}
        self._usage: JSONValue = None
        self._endings: dict[int, Piece] = {}
        self._cut: set[int] = set()
        self._extras: dict[str, list[str]] = {}
        self._done = False

    @abstractmethod
    def _new(self) -> C:
        """A choice that has said nothing."""

    @abstractmethod
    def _said(self, choice: C) -> list[Part]:
        """What a choice said, operators' moderated fields left out."""

    @abstractmethod
    def _read(
        self, state: C, index: int, source: dict[str, JSONValue], where: str, body: dict[str, JSONValue], whole: bool
    ) -> Iterator[Frame]:
        """The frames of one choice of a chunk; ``body`` is the chunk's top level, ``whole`` makes them wait."""

    @abstractmethod
    def _blocked(self, index: int, notice: Notice, soft: bool) -> dict[str, JSONValue]:
        """The choice of the chunk that ends a blocked one."""

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
        return tuple(
            Answer(index, self._message(choice), choice.finish_reason)
            for index, choice in sorted(self._choices.items())
        )

    def release(self, frame: Frame) -> bytes:
        piece: Piece = frame.value
        return piece.encode()

    def cut(self, choice: int, notice: Notice, soft: bool) -> bytes:
        self._cut.add(choice)
        ending = Piece(self._envelope, self._blocked(choice, notice, soft))
        return ending.encode(**explain(Ruling(None, {choice: notice})))

    def close(self, ruling: Ruling) -> bytes:
        """The chunks that end the choices, in the order in which they ended, the moderation, usage, ``[DONE]``."""
        endings = [piece for index, piece in self._endings.items() if index not in self._cut]
        out = [piece.encode() for piece in endings[:-1]]
        out += [piece.encode(**explain(ruling)) for piece in endings[-1:]]
        if self._request.include_usage and self._usage is not None:
            out.append(sse.encode(dumps({**self._envelope, "choices": [], "usage": self._usage})))
        return b"".join([*out, sse.encode(DONE)])

    def fail(self, error: PublicError) -> bytes:
        return sse.encode(openai_error(error, prompt_param=self.prompt_param).body) + sse.encode(DONE)

    def _message(self, choice: C) -> Message:
        extras = [*choice.extras.values(), *self._extras.values()]
        return Message("assistant", (*self._said(choice), *(Text("".join(pieces)) for pieces in extras)))

    def _chunk(self, source: dict[str, JSONValue]) -> list[Frame]:
        admitted = read_envelope(self.table, source, self._options)
        gather(self._extras, admitted.extras)
        body = {name: value for name, value in admitted.kept.items() if name != "usage"}
        self._usage = admitted.kept.get("usage") or self._usage
        head = self._head(body)
        if not self._envelope or (head.get("id") and not self._envelope.get("id")):  # Azure's first chunk is nameless
            self._envelope = head
        if not body.get("id"):  # as its annotations are: SDKs skip a chunk without an ``object``
            body |= {name: value for name, value in self._envelope.items() if value and not body.get(name, value)}
        frames: list[Frame] = []
        for number, item in enumerate(as_list(source.get("choices"), "choices", _PER_CHUNK)):
            where = f"choices[{number}]"
            choice = as_object(item, where)
            index = read_index(choice, where, self._request.choices)
            state = self._choices.setdefault(index, self._new())
            frames += self._read(state, index, choice, where, body, bool(admitted.extras))
        return frames

    def _head(self, body: dict[str, JSONValue]) -> dict[str, JSONValue]:
        return {name: body[name] for name in self.identity if name in body}


def gather(into: dict[str, list[str]], pieces: dict[str, str]) -> None:
    """Adds pieces of text to what was said before under the same name."""
    for name, text in pieces.items():
        into.setdefault(name, []).append(text)
