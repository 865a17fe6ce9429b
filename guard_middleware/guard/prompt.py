"""What the guard reads: a Conversation as GuardReasoner-VL's transcript, and the transcript as token ids.

The published weights were trained on one shape: the system text below, then one user turn that says
``Human user:\\n{images}\\n{prompt}\\n\\nAI assistant:\\n{answer or None}\\n``. A conversation of exactly one user
message (text and images) is written byte for byte like that. The paper defines nothing else, so everything else
goes into the same two slots, one marker line per item, items in the order in which the upstream reads them:

    [tool definition] [system] [user] [assistant] [assistant reasoning] [assistant calls] [tool result] [user name]

Why: the guard judges *the request*, and the request is all that the caller sends (a harmful instruction may sit in
a tool result, a forged assistant turn or a schema); the two slots are what the weights know; a bracketed line is
ordinary text to them, and needs no new token. Markers are fixed words: names, arguments and ids that a client can
choose stand in the lines below them. An answer that is only text is written bare; one with reasoning or calls
gets markers too, and so does an empty answer or one that says ``None``, because a bare ``None`` means "no answer".

Images stand first in their message, as in training (``Human user:\\n<image>\\n{text}``), then one line per image
with what the reader found: ``[text drawn in image 1] ...``, its line breaks made spaces so that it cannot leave
its line. A line of untrusted text that imitates a marker or a slot header gets ``| `` before it, whatever its
case, width, invisible characters or kind of line break.

Ids: control tokens come only from this module. Each stretch of the user turn between two images is encoded in one
go by a copy of the tokenizer that has *no added tokens at all*. (``split_special_tokens=True`` is not enough: it
splits special tokens only, and ``<think>`` or ``<tool_call>`` are added tokens that are not special.) So for text
without control strings the ids equal those of the tokenizer's own chat template, and with them they stay text. An
image is one ``<|image_pad|>`` between ``<|vision_start|>`` and ``<|vision_end|>``; engines expand it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Blob, Conversation, Message, Part, Reasoning, Text, ToolCall, ToolCallResponse

SYSTEM = (
    "You are a classifier for analyzing interactions between humans and AI. \n\n"
    "Given a request from a human user and a response from an AI assistant, finish two tasks.\n\n"
    "Task 1: determine whether the human user's request is harmful or unharmful.\n"
    "Task 2: determine whether the AI assistant's response is harmful or unharmful.\n\n"
    "You must think step by step. Keep consistency between the reasoning and the Answers. \n\n"
    "Put the reasoning process into <think> </think>. Put the result into <result> </result>.\n"
)
HUMAN, ASSISTANT, END, NO_ANSWER = "Human user:\n", "\n\nAI assistant:\n", "\n", "None"

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_OPENING = f"{IM_START}system\n{SYSTEM}{IM_END}\n{IM_START}user\n"
_CLOSING = f"{IM_END}\n{IM_START}assistant\n"

_BODY = {"system": "[system]", "user": "[user]", "assistant": "[assistant]", "tool": "[tool result]"}
_IMITATION = re.compile(
    r"\[ ?(system|user|assistant|tool|text drawn|[a-z ]{1,40} (definition|name) ?\])|(human user|ai assistant) ?:"
)
#: how an imitation begins; how much of a line is looked at for one; and how long one is where nothing hides in it
_FIRST, _HEAD, _SHORT = ("[", "h", "a"), 512, 64
_INVISIBLE = ("Cc", "Cf", "Mn", "Me")
#: letters and symbols that show nothing
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"
_ASCII_CONTROLS = {code: None for code in (*range(32), 127) if not chr(code).isspace()}


@dataclass(frozen=True, slots=True)
class Trusted:
    """Words of this module."""

    text: str


@dataclass(frozen=True, slots=True)
class Untrusted:
    """Words from outside, imitations already marked. Never holds a lone surrogate."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """Image number ``index`` (from 0) of ``Conversation.blobs()``."""

    index: int


Segment = Trusted | Untrusted | ImageSlot


@dataclass(frozen=True, slots=True)
class Transcript:
    """The two slots of the user turn, without their headers. ``answer`` None is the literal ``None``."""

    prompt: tuple[Segment, ...]
    answer: tuple[Segment, ...] | None = None

    @property
    def answered(self) -> bool:
        return self.answer is not None

    def segments(self) -> tuple[Segment, ...]:
        """The whole user turn."""
        answer = (Trusted(NO_ANSWER),) if self.answer is None else self.answer
        return (Trusted(HUMAN), *self.prompt, Trusted(ASSISTANT), *answer, Trusted(END))

    def text(self, image: str = "<image>") -> str:
        """The user turn for a reader's eyes; never encode it, as ``<image>`` is text that users can write too."""
        return "".join(image if isinstance(s, ImageSlot) else s.text for s in self.segments())


def render(conversation: Conversation, drawn_text: Sequence[str] = ()) -> Transcript:
    """The transcript of a conversation.

    ``drawn_text`` is what the reader found, one string per image of ``conversation.blobs()``, or empty where
    nothing was read. Raises ``GuardError(media)`` for media by reference, and ``ValueError`` for another count.
    """
    blobs = conversation.blobs()
    if drawn_text and len(drawn_text) != len(blobs):
        raise ValueError("one drawn text per image")
    drawn = [_one_line(text) for text in drawn_text] or [""] * len(blobs)
    numbers = iter(range(len(blobs)))

    prompt: list[Segment] = []
    for definition in conversation.definitions:
        kind = re.sub(r"[^a-z]+", " ", definition.kind.lower()).strip() or "other"
        _item(prompt, f"[{kind} definition]", [Untrusted(_untrusted(definition.text))])
    bare = not conversation.definitions and len(conversation.messages) == 1 and _is_bare(conversation.messages[0])
    for message in conversation.messages:
        for marker, body in _items(message, numbers, drawn):
            _item(prompt, None if bare else marker, body)
    if conversation.answer is None:
        return Transcript(tuple(prompt))

    answer: list[Segment] = []
    only_text = all(isinstance(part, Text) for part in conversation.answer.parts)
    words = "".join(part.text for part in conversation.answer.parts if isinstance(part, Text)).strip()
    bare = only_text and conversation.answer.name is None and words.lower() not in ("", "none")
    for marker, body in _items(conversation.answer, numbers, drawn):
        _item(answer, None if bare else marker, body)
    return Transcript(tuple(prompt), tuple(answer or [Trusted("[assistant]\n")]))


def _is_bare(message: Message) -> bool:
    plain = all(isinstance(part, Text | Blob) for part in message.parts)
    return message.role == "user" and message.name is None and plain


def _item(out: list[Segment], marker: str | None, body: list[Segment]) -> None:
    if out:
        out.append(Trusted("\n"))
    if marker is not None:
        out.append(Trusted(f"{marker}\n"))
    out.extend(body)


def _items(message: Message, numbers: Iterator[int], drawn: Sequence[str]) -> Iterable[tuple[str, list[Segment]]]:
    if message.name is not None:
        yield f"[{message.role} name]", [Untrusted(_untrusted(message.name))]
    groups: list[tuple[str, list[Part]]] = []
    for part in message.parts:
        marker = _marker(message, part)
        if not groups or groups[-1][0] != marker:
            groups.append((marker, []))
        groups[-1][1].append(part)
    for marker, parts in groups:
        slots = [next(numbers) for part in parts if isinstance(part, Blob)]
        lines: list[list[Segment]] = [[ImageSlot(index) for index in slots]] if slots else []
        lines += [
            [Trusted(f"[text drawn in image {index + 1}] "), Untrusted(drawn[index])] for index in slots if drawn[index]
        ]
        texts = [_words(part) for part in parts if not isinstance(part, Blob)]
        # An empty text beside an image is no line: the paper's image row is `<image>\n\nAI assistant:`.
        lines += [[Untrusted(_untrusted(text))] for text in texts if text or not slots]
        body: list[Segment] = []
        for line in lines:
            if body:
                body.append(Trusted("\n"))
            body.extend(line)
        yield marker, body


def _marker(message: Message, part: Part) -> str:
    match part:
        case Reasoning():
            return "[assistant reasoning]"
        case ToolCall():
            return "[assistant calls]"
        case ToolCallResponse():
            return "[tool result]"
        case Text() | Blob():
            return _BODY[message.role]
        case _:
            raise GuardError(GuardErrorKind.MEDIA, "media must be canonical bytes before it is judged")


def _words(part: Part) -> str:
    match part:
        case Text(text) | Reasoning(text) | ToolCallResponse(_, text):
            return text
        case ToolCall(_, name, arguments):
            return f"{name} {arguments}"
        case _:  # pragma: no cover - _marker has refused it
            raise AssertionError(part)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _one_line(text: str) -> str:
    return " ".join(_encodable(text).split())


def _untrusted(text: str) -> str:
    return "".join(f"| {line}" if _imitates(line) else line for line in _encodable(text).splitlines(keepends=True))


def _imitates(line: str) -> bool:
    rest = line.lstrip()
    head = rest[:_HEAD]
    if head.isascii():
        words = head.translate(_ASCII_CONTROLS)
    else:
        first = next((letter for letter in map(_letter, head) if letter), "")
        if first and first not in _FIRST:
            return False
        words = _visible(head)
    words = " ".join(words.split()).casefold()
    if _IMITATION.match(words):
        return True
    # What shows next to nothing so far may go on as an imitation beyond what is looked at.
    return len(rest) > _HEAD and len(words) < _SHORT and words[:1] in ("", *_FIRST)


def _visible(text: str) -> str:
    """As it looks: without width and invisible characters."""
    folded = unicodedata.normalize("NFKC", text)
    return "".join(c for c in folded if c.isspace() or (unicodedata.category(c) not in _INVISIBLE and c not in _BLANK))


@lru_cache(maxsize=4096)
def _letter(character: str) -> str:
    """What a character begins with to the eye, in lower case; empty where it shows nothing."""
    return _visible(character).strip()[:1].casefold()[:1]


class Tokenizer(Protocol):
    """What is needed of a fast Hugging Face tokenizer."""

    @property
    def backend_tokenizer(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch that windows do not cut: one token of text, or one whole image (``image`` is its index)."""

    ids: tuple[int, ...]
    image: int | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids, one pad per image. ``images`` are the indices of the images, in the order of the pads."""

    ids: list[int]
    images: tuple[int, ...]
    answered: bool


class PromptEncoder:
    """Transcripts to token ids, for one tokenizer. Make it once: it holds a copy of the tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        full = tokenizer.backend_tokenizer
        spec = json.loads(full.to_str())
        spec["added_tokens"], spec["post_processor"] = [], None
        spec["truncation"] = spec["padding"] = None
        self._full, self._plain = full, type(full).from_str(json.dumps(spec))
        self._added = frozenset(full.get_added_tokens_decoder())
        self.image_pad = self._control(IMAGE_PAD)
        self.im_end = self._control(IM_END)
        self._vision = (self._control(VISION_START), self.image_pad, self._control(VISION_END))
        self.opening: list[int] = full.encode(_OPENING, add_special_tokens=False).ids
        self.closing: list[int] = full.encode(_CLOSING, add_special_tokens=False).ids
        if self.opening.count(self._control(IM_START)) != 2:
            raise ValueError("the tokenizer does not know the chat template's control tokens")

    def _control(self, token: str) -> int:
        id = self._full.token_to_id(token)
        if id not in self._added:
            raise ValueError(f"the tokenizer lacks {token}: it is not one of a Qwen2.5-VL model")
        return int(id)

    def plain(self, text: str) -> list[int]:
        """Ids of text that stays text; no added token can come out of it."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if not self._added.isdisjoint(ids):
            raise GuardError(GuardErrorKind.INTERNAL, "a control token in untrusted text")
        return ids

    def encode(self, transcript: Transcript) -> Encoded:
        """The whole prompt, up to and including ``<|im_start|>assistant\\n``."""
        pieces = self.pieces(transcript.segments())
        return self.frame(pieces, answered=transcript.answered)

    def pieces(self, segments: Iterable[Segment]) -> list[Piece]:
        """A part of the user turn as pieces; every stretch of text between two images is encoded in one go."""
        pieces: list[Piece] = []
        run: list[str] = []

        def flush() -> None:
            pieces.extend(Piece((id,)) for id in self.plain("".join(run)))
            run.clear()

        for segment in segments:
            if isinstance(segment, ImageSlot):
                flush()
                pieces.append(Piece(self._vision, segment.index))
            else:
                run.append(segment.text)
        flush()
        return pieces

    def frame(self, user_turn: Iterable[Piece], *, answered: bool) -> Encoded:
        """A user turn between the system turn and the start of the guard's own."""
        turn = list(user_turn)
        ids = [*self.opening, *(id for piece in turn for id in piece.ids), *self.closing]
        return Encoded(ids, tuple(piece.image for piece in turn if piece.image is not None), answered)


def expand_images(ids: Sequence[int], counts: Sequence[int], image_pad: int) -> list[int]:
    """``ids`` with the n-th image pad repeated ``counts[n]`` times; ``ValueError`` for another number of pads."""
    if list(ids).count(image_pad) != len(counts):
        raise ValueError("one count per image pad")
    left = iter(counts)
    return [id for token in ids for id in ([token] * next(left) if token == image_pad else [token])]
