"""What the guard reads of a conversation that it knows: everything that the client wrote, less of what the model said.

Pure. ``view`` takes a conversation and what is known of its past, and leaves out two things, both judged before:

- answers that were themselves judged unharmful, oldest first, once they and the client's words exceed ``characters``
  (the newest keep an eighth of it at least, and of the last that fits partly its end);
- the sight of images beyond the ``images`` newest; the text that was drawn in them stays.

Turns of one role that come to stand side by side become one, which saves their headings.

Everything else is in every view, whatever its length: definitions, system messages, every word of user and tool,
assistant turns that no verdict of ours covers (a client can forge those), and all that is new. So a request that is
split over turns is always whole in the last verdict. docs/conversations.md says what this does not see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from guard_middleware.types import (
    Blob,
    Conversation,
    Message,
    Part,
    Reasoning,
    Text,
    ToolCall,
    ToolCallResponse,
)

#: stands before the text of an image that is not shown again
PICTURE = "(picture)"
#: the share of ``characters`` that the newest answers keep however much the client wrote
_LEAST_SHARE = 8


@dataclass(frozen=True, slots=True)
class TurnBounds:
    """How much of the past is read again; docs/conversations.md."""

    characters: int = 1500
    images: int = 2


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of a conversation: its first ``judged`` messages were a request that was judged unharmful.

    ``answers`` are positions of answers that were judged unharmful; ``drawn`` is the text in images, by digest.
    """

    judged: int = 0
    answers: frozenset[int] = frozenset()
    drawn: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class View:
    """What is asked, and how many characters of answers and how many images of the past are not in it."""

    conversation: Conversation
    characters: int = 0
    images: int = 0


def view(conversation: Conversation, past: Past, bounds: TurnBounds) -> View:
    """What to ask about ``conversation``; itself, as it is, where nothing of it is known or nothing is left out."""
    messages = conversation.messages
    droppable = {
        index
        for index in past.answers
        if index < len(messages) and _is_answer(messages[index]) and index <= past.judged
    }
    hidden = _hidden(conversation, past, bounds)
    shown: dict[int, Message] = {}
    client = 0
    for index, message in enumerate(messages):
        if index not in droppable:
            shown[index] = _without_images(message, hidden.get(index, frozenset()), past.drawn)
            client += size(shown[index])
    room = max(bounds.characters - client, bounds.characters // _LEAST_SHARE)
    left_out = 0
    for index in sorted(droppable, reverse=True):
        kept = _ending(messages[index], room)
        left_out += size(messages[index]) - (size(kept) if kept else 0)
        room = room - size(kept) if kept and kept == messages[index] else 0
        if kept:
            shown[index] = kept
    images = sum(map(len, hidden.values()))
    if not left_out and not images:
        return View(conversation)
    return View(replace(conversation, messages=_joined([shown[i] for i in sorted(shown)])), left_out, images)


def size(message: Message) -> int:
    """Characters of all that a message says."""
    total = len(message.name or "")
    for part in message.parts:
        match part:
            case Text(text) | Reasoning(text) | ToolCallResponse(_, text):
                total += len(text)
            case ToolCall(_, name, arguments):
                total += len(name) + len(arguments)
    return total


def _joined(messages: Sequence[Message]) -> tuple[Message, ...]:
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is not None and last.role == message.role and _is_plain(last) and _is_plain(message):
            joined[-1] = replace(last, parts=(*last.parts, *message.parts))
        else:
            joined.append(message)
    return tuple(joined)


def _is_plain(message: Message) -> bool:
    return message.name is None and all(isinstance(part, Text) for part in message.parts)


def _is_answer(message: Message) -> bool:
    return message.role == "assistant" and not any(isinstance(part, Blob) for part in message.parts)


def _hidden(conversation: Conversation, past: Past, bounds: TurnBounds) -> dict[int, frozenset[int]]:
    """The images that are not shown again: positions of parts by position of their message."""
    places = [
        (index, position)
        for index, message in enumerate(conversation.messages)
        for position, part in enumerate(message.parts)
        if isinstance(part, Blob)
    ]
    old = [place for place in places if place[0] < past.judged]
    spare = max(0, bounds.images - (len(places) - len(old)))
    hidden: dict[int, frozenset[int]] = {}
    for index, position in old[: len(old) - spare] if spare < len(old) else []:
        hidden[index] = hidden.get(index, frozenset()) | {position}
    return hidden


def _without_images(message: Message, hidden: frozenset[int], drawn: Mapping[str, str]) -> Message:
    if not hidden:
        return message
    parts: list[Part] = []
    for position, part in enumerate(message.parts):
        if position in hidden and isinstance(part, Blob):
            words = " ".join(drawn.get(part.digest, "").split())
            parts.append(Text(f"{PICTURE} {words}".rstrip()))
        else:
            parts.append(part)
    return replace(message, parts=tuple(parts))


def _ending(message: Message, room: int) -> Message | None:
    """The message, or the end of its text, in ``room`` characters; None where nothing fits."""
    if size(message) <= room:
        return message
    text = "\n".join(part.text for part in message.parts if isinstance(part, Text))[-room:] if room > 0 else ""
    return replace(message, parts=(Text(text),), name=None) if text.strip() else None
