"""What every dialect promises: one public API shape, read into the neutral form and written back.

A dialect is pure. It takes values that were already parsed strictly, refuses whatever it does not know,
and re-encodes the value that was moderated, never the bytes that came. The four API shapes differ in
where text and images sit and in how a block looks; everything that differs is behind ``Dialect``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from guard_middleware.limits import Limits
from guard_middleware.strictjson import JSONValue, dumps
from guard_middleware.types import Action, Basis, Blob, Conversation, Message, Part, Source, Uri

if TYPE_CHECKING:
    from guard_middleware.sse import Event

#: raw ASGI headers, names in lower case
Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]
#: what the operator says of a field that no table knows
ExtraField = Literal["moderated", "opaque"]


@dataclass(frozen=True, slots=True)
class Options:
    """The operator's say over one dialect.

    ``extra_fields`` names fields outside the tables that may carry content, by name at any level of a
    request or an answer: ``moderated`` (its text joins what the guard reads) or ``opaque`` (passed unread).
    """

    extra_fields: Mapping[str, ExtraField] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MediaSite:
    """Where the body holds one piece of media: the path of keys and indexes down to the value that names it."""

    uri: str
    path: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request that a dialect accepts. ``body`` is the validated value that is sent on; it is never mutated.

    ``conversation`` holds media as ``Uri`` parts until ``with_media``; ``choices`` is ``n``.
    ``include_usage`` says that a stream must end with its usage. ``continues`` is the id of an earlier answer whose
    conversation the upstream holds (``previous_response_id``); ``server_tools`` says that the upstream itself acts on
    tools while it answers (web search, code execution), so that an answer asked for cannot be taken back.
    """

    dialect: str
    conversation: Conversation
    body: dict[str, JSONValue]
    model: str | None
    stream: bool
    choices: int
    include_usage: bool
    sites: tuple[MediaSite, ...]
    place: Callable[[Blob], JSONValue] = field(repr=False, compare=False)
    continues: str | None = None
    server_tools: bool = False

    @property
    def media(self) -> tuple[str, ...]:
        """Every distinct media uri, in order of first appearance."""
        return tuple(dict.fromkeys(site.uri for site in self.sites))

    def with_media(self, blobs: Mapping[str, Blob]) -> ParsedRequest:
        """The same request with canonical bytes in place of every uri, in the conversation and in the body.

        Raises ``KeyError`` where ``blobs`` lacks one of ``media``.
        """

        def filled(part: Part) -> Part:
            return blobs[part.uri] if isinstance(part, Uri) else part

        messages = tuple(
            replace(message, parts=tuple(filled(part) for part in message.parts))
            for message in self.conversation.messages
        )
        body: Any = self.body
        for site in self.sites:
            body = _put(body, site.path, self.place(blobs[site.uri]))
        return replace(self, conversation=replace(self.conversation, messages=messages), body=body, sites=())

    def with_history(self, history: Conversation) -> ParsedRequest:
        """The same request after the messages and the answer of an earlier one, as the guard should see it."""
        before = history.messages if history.answer is None else (*history.messages, history.answer)
        own = self.conversation
        definitions = tuple(dict.fromkeys((*history.definitions, *own.definitions)))
        return replace(self, conversation=replace(own, messages=(*before, *own.messages), definitions=definitions))

    def encode(self) -> bytes:
        """The body to send on, as JSON."""
        return dumps(self.body)


def _put(value: Any, path: tuple[str | int, ...], leaf: JSONValue) -> Any:
    if not path:
        return leaf
    copied = value.copy()
    copied[path[0]] = _put(value[path[0]], path[1:], leaf)
    return copied


@dataclass(frozen=True, slots=True)
class Notice:
    """What the client may know of one decision; made by ``enforce.notice``, never holds content.

    ``flagged`` and ``score`` are None where there is no verdict. ``reasoning`` is set only where policy shows it.
    """

    id: str
    source: Source
    action: Action
    basis: Basis
    message: str
    flagged: bool | None
    score: float | None
    categories: tuple[str, ...]
    model: str
    input_types: tuple[Literal["text", "image"], ...]
    error: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Ruling:
    """What is to be done with a whole answer: the request's notice, and one per judged choice.

    A choice with content and no notice is never released (``ValueError``: a defect of the caller).
    ``soft`` renders a block as an ordinary answer for chat front ends that read no ``finish_reason``.
    """

    request: Notice | None
    choices: Mapping[int, Notice]
    soft: bool = False

    def blocked(self, index: int, has_content: bool) -> bool:
        notice = self.choices.get(index)
        if notice is None and has_content:
            raise ValueError(f"choice {index} has content and no decision")
        return notice is not None and notice.action is Action.BLOCK

    @property
    def annotated(self) -> bool:
        """Whether anything is to be said to the client besides the answer itself."""
        notices = [*self.choices.values(), *([self.request] if self.request else [])]
        return any(notice.action is not Action.ALLOW for notice in notices)


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of an answer. ``message.parts`` is empty where the model said nothing."""

    index: int
    message: Message
    finish_reason: str | None = None


class ParsedAnswer(Protocol):
    """A whole answer, read from one JSON body, none of it released."""

    @property
    def answer_id(self) -> str | None:
        """The upstream's id of this answer, where a later request may continue from it."""

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The choices in order of their index; each is judged on its own."""

    def render(self, ruling: Ruling) -> bytes:
        """The body to release. Needs a notice for every choice."""


@dataclass(frozen=True, slots=True)
class Said:
    """Text that one frame adds to one surface of a choice.

    ``surface`` is unique within the choice (``content``, ``reasoning_content``, ``tool_calls.0``, ``block.2``); the
    texts of a surface, joined in order, are what is judged.
    """

    surface: str
    text: str
    reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """The smallest piece of a streamed answer that is released or held: one event's share in one choice.

    ``value`` is what the dialect encodes on release. ``said`` is empty for structure (an opening, a closing), which
    leaves as soon as all that its choice said before it has left. ``whole`` leaves only after the last verdict on its
    choice: a tool call, whose arguments mean nothing in parts.
    """

    choice: int
    value: Any = field(repr=False)
    said: tuple[Said, ...] = ()
    whole: bool = False


class StreamParser(Protocol):
    """One streamed answer, read event by event and written again frame by frame; counts no bytes (the caller does).

    What ends a choice (its ``finish_reason`` or ``stop_reason``), usage and what ends the stream are no frames: the
    parser keeps them for ``close``. Nothing is judged or released here; the caller calls ``release`` for the frames
    that were cleared, in order, ``cut`` at most once for a choice, and ``close`` or ``fail`` once, at the end. Where
    every choice was cut, ``close`` may come before the upstream's stream has ended, and must repeat nothing of it.
    """

    @property
    def keep_alive(self) -> bytes:
        """What may stand anywhere between two events while an answer is held: a comment, or Anthropic's ``ping``."""

    @property
    def answer_id(self) -> str | None:
        """The upstream's id of this answer, where a later request may continue from it."""

    def feed(self, event: Event) -> Sequence[Frame]:
        """Take one event; raises ``UpstreamError`` for anything that cannot be screened."""

    def finish(self) -> tuple[Answer, ...]:
        """All choices, whole, in order of their index; raises ``UpstreamError`` where the stream ended too early."""

    def release(self, frame: Frame) -> bytes:
        """The frame's events for the client."""

    def cut(self, choice: int, notice: Notice, soft: bool) -> bytes:
        """Ends a choice as blocked, whatever of it was released before; its later frames are never released."""

    def close(self, ruling: Ruling) -> bytes:
        """The endings of all choices that were not cut, what is to be said about the answer, usage, and the end."""

    def fail(self, error: PublicError) -> bytes:
        """Ends a stream whose head is out with an error that every client of this API raises."""


@dataclass(frozen=True, slots=True)
class PublicError:
    """An error as the client sees it, in no dialect's shape yet; made by ``enforce``.

    ``type`` is the OpenAI error type. ``param`` None leaves the choice to the dialect where ``about_prompt`` is set.
    ``headers`` come in addition to the content type.
    """

    status: int
    code: str
    type: str
    message: str
    param: str | None = None
    about_prompt: bool = False
    detail: dict[str, JSONValue] | None = None
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer of our own: status, headers (content type included, length not), body."""

    status: int
    headers: Headers
    body: bytes


class Dialect(Protocol):
    """One public API shape."""

    @property
    def name(self) -> str:
        """The word of the design: chat_completions, completions, responses or messages."""

    def parse_request(self, body: JSONValue, limits: Limits, options: Options) -> ParsedRequest:
        """Read a request; raises ``RequestRejected`` and nothing else."""

    def parse_response(self, body: JSONValue, request: ParsedRequest, options: Options) -> ParsedAnswer:
        """Read the body of a 200 that is not a stream; raises ``UpstreamError`` and nothing else."""

    def stream_parser(self, request: ParsedRequest, options: Options) -> StreamParser:
        """A parser for one streamed answer to ``request``."""

    def error(self, error: PublicError) -> Reply:
        """An error before any byte of an answer: always a real HTTP status, also for a stream."""

    def soft_block(self, request: ParsedRequest, notice: Notice, created: int) -> Reply:
        """A blocked prompt as an ordinary answer (soft mode). ``created`` is Unix time in seconds."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. ``dialect`` None passes through: no content either way is expected or allowed."""

    dialect: Dialect | None
