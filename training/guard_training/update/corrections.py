"""Operators' corrections: what a reviewer says that a decision of the gateway should have been.

One JSON object per line:

    {"decision": "...", "reviewer": "ana", "label": "unharmful",
     "content": "text" | {"text": "...", "image": "a.png", "response": "..."} | {"messages": [...]},
     "request_label": "harmful", "category": "...", "rationale": "..."}

``decision`` is an id from the decision log (the request's or the question's), ``label`` the right label of what was
judged: the answer where the content has one, else the request. ``request_label`` is the request's beside a judged
answer, ``rationale`` the reviewer's own reasoning; these two and ``category`` may be left out. A message is ``{"role",
"content"}``, its content a text or a list of parts: ``{"type": "text" | "reasoning", "content"}``, ``{"type":
"tool_call", "name", "arguments"}``, ``{"type": "tool_call_response", "response"}``, ``{"type": "image", "image"}``.
A last message of the assistant is the answer. Image paths are relative to the file.

Left out, each with file, line and reason: what has another shape or key, more than one image, an image outside the
file's folder or unreadable, a decision that the log does not hold or that was about the other side, a decision with
two contents, and what two reviewers judge differently.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from guard_middleware.types import (
    Blob,
    Conversation,
    Label,
    Message,
    Part,
    Reasoning,
    Role,
    Source,
    Text,
    ToolCall,
    ToolCallResponse,
)
from guard_training.corpus.conversation import conversation
from guard_training.corpus.leakage import words
from guard_training.corpus.rows import CorpusError, Row, Skipped, encodable, read_lines
from guard_training.rowfile import digest

SOURCE = "corrections"
_KEYS = {"decision", "reviewer", "label", "content", "request_label", "category", "rationale"}
_CONTENT = {"text", "image", "response"}


@dataclass(frozen=True, slots=True)
class Lesson(Row):
    """A row that may have more than one turn.

    ``messages`` is then the JSON of all its messages, the answer included; ``prompt`` its last user turn, ``response``
    the text of the answer. Empty where the row says it all.
    """

    messages: str = ""


@dataclass(frozen=True, slots=True)
class Correction:
    """One line. ``where`` is its file and line; ``lesson.rationale`` is the reviewer's."""

    decision: str
    reviewer: str
    lesson: Lesson
    where: str


@dataclass(frozen=True, slots=True)
class Logged:
    """What the decision log says of an id: the sides that were judged, and the request's label by the guard."""

    sources: frozenset[Source]
    request: Label | None


def whole(row: Row) -> Conversation:
    """A row or lesson as the gateway sees it. Raises ``CorpusError``."""
    if not isinstance(row, Lesson) or not row.messages:
        return conversation(row)
    blobs = conversation(replace(row, messages="")).blobs()
    return _conversation(json.loads(row.messages), blobs)


def user_turns(row: Row) -> list[str]:
    """Every text of a user in a row or lesson."""
    if not isinstance(row, Lesson) or not row.messages:
        return [row.prompt]
    turns = [message for message in json.loads(row.messages) if message["role"] == "user"]
    return [part.text for turn in turns for part in _message(turn, ()).parts if isinstance(part, Text)]


def content_key(row: Row) -> tuple[object, ...]:
    """Equal for rows of equal content: the words of every message, and the image's bytes."""
    said = [(message.role, words(_said(message))) for message in _shown(row)]
    return (*said, digest(row.image) if row.image else "")


def _shown(row: Row) -> list[Message]:
    found = whole(row)
    return [*found.messages, *([found.answer] if found.answer else [])]


def _said(message: Message) -> str:
    said = []
    for part in message.parts:
        match part:
            case Text(text) | Reasoning(text) | ToolCallResponse(_, text):
                said.append(text)
            case ToolCall(_, name, arguments):
                said += [name, arguments]
    return "\n".join(said)


def read_corrections(path: Path, skipped: Skipped, log: Mapping[str, Logged] | None = None) -> list[Correction]:
    """The lines of a file that can be used; with ``log`` (``read_log``) only those whose decision it holds."""
    return list(read_lines(path, partial(_correction, path.parent, log), skipped, "a usable correction"))


def _correction(folder: Path, log: Mapping[str, Logged] | None, value: Mapping[str, Any], where: str) -> Correction:
    if unknown := sorted(value.keys() - _KEYS):
        raise CorpusError(f"unknown key {', '.join(unknown)}; known: {', '.join(sorted(_KEYS))}")
    if not encodable(json.dumps(value, ensure_ascii=False)):
        raise CorpusError("a text holds half of a surrogate pair")
    decision, reviewer = _text(value, "decision"), _text(value, "reviewer")
    label, request = _label(value["label"]), _label(value["request_label"]) if value.get("request_label") else None
    base = Lesson(
        id=f"correction:{decision}",
        source=SOURCE,
        prompt="",
        request=None,
        category=_text(value, "category") if value.get("category") else None,
        rationale=_text(value, "rationale") if value.get("rationale") else None,
    )
    lesson = _with_content(base, value["content"], folder)
    answered = lesson.response is not None
    if request and not answered:
        raise CorpusError("request_label is for content with an answer; say the request's label as label")
    if log is not None:
        request = request or _logged(log, decision, answered)
    lesson = replace(lesson, request=request if answered else label, response_label=label if answered else None)
    whole(lesson)
    return Correction(decision, reviewer, replace(lesson, where=where), where)


def _logged(log: Mapping[str, Logged], decision: str, answered: bool) -> Label | None:
    known = log.get(decision)
    if known is None:
        raise CorpusError(f"no decision {decision} in the log")
    source: Source = "output" if answered else "input"
    if known.sources and source not in known.sources:
        raise CorpusError(
            f"decision {decision} judged the {'request' if answered else 'answer'} alone, the content here is "
            f"{'an answer too; leave it out' if answered else 'a request alone; add the answer'}"
        )
    return known.request if answered else None


def _with_content(base: Lesson, content: Any, folder: Path) -> Lesson:
    match content:
        case str(text) if text.strip():
            return replace(base, prompt=text)
        case {"messages": [*messages], **rest} if messages and not rest:
            return _from_messages(base, messages, folder)
        case {**fields} if fields.keys() <= _CONTENT and all(isinstance(v, str) for v in fields.values()):
            text, image, response = (str(fields.get(key, "")) for key in ("text", "image", "response"))
            if text or image:
                return replace(
                    base,
                    prompt=text,
                    image=_image(image, folder) if image else None,
                    response=response or None,
                    response_label="unharmful" if response else None,
                )
    raise CorpusError('the content is a text, {"text", "image", "response"} or {"messages": [...]}')


def _from_messages(base: Lesson, messages: list[Any], folder: Path) -> Lesson:
    parsed = [_message(value, None) for value in messages]
    images = [part["image"] for value in messages for part in _parts(value) if part.get("type") == "image"]
    if len(images) > 1:
        raise CorpusError(f"{len(images)} images; a guard learns from one image at a time")
    users = [message for message in parsed if message.role == "user"]
    if not users:
        raise CorpusError("no message of a user")
    answer = parsed[-1] if parsed[-1].role == "assistant" else None
    lesson = replace(
        base,
        prompt=_said(users[-1]),
        image=_image(images[0], folder) if images else None,
        response=(_said(answer) or "-") if answer else None,
        response_label="unharmful" if answer else None,
    )
    meant = replace(lesson, messages=json.dumps(messages, ensure_ascii=False))
    # one user turn and a plain answer need no messages, and every other command can read them
    return lesson if whole(meant) == conversation(lesson) else meant


def _conversation(messages: Sequence[Any], blobs: Sequence[Blob]) -> Conversation:
    parsed = tuple(_message(value, blobs) for value in messages)
    if parsed[-1].role == "assistant":
        return Conversation(parsed[:-1], answer=parsed[-1])
    return Conversation(parsed)


def _message(value: Any, blobs: Sequence[Blob] | None) -> Message:
    """``blobs`` are the images to put in; None leaves them out."""
    if not isinstance(value, dict) or value.keys() != {"role", "content"} or value["role"] not in get_args(Role):
        raise CorpusError(f'a message is {{"role": one of {", ".join(get_args(Role))}, "content": text or parts}}')
    parts = [_part(part, blobs) for part in _parts(value)]
    return Message(value["role"], tuple(part for part in parts if part is not None))


def _parts(value: Any) -> list[Any]:
    content = value["content"] if isinstance(value, dict) and "content" in value else None
    if isinstance(content, str):
        return [{"type": "text", "content": content}]
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        raise CorpusError("a message's content is a text or a list of parts")
    return content


def _part(value: Mapping[str, Any], blobs: Sequence[Blob] | None) -> Part | None:
    match value:
        case {"type": "text", "content": str(text), **rest} if not rest:
            return Text(text)
        case {"type": "reasoning", "content": str(text), **rest} if not rest:
            return Reasoning(text)
        case {"type": "tool_call", "name": str(name), "arguments": str(arguments), **rest} if not rest:
            return ToolCall("", name, arguments)
        case {"type": "tool_call_response", "response": str(text), **rest} if not rest:
            return ToolCallResponse("", text)
        case {"type": "image", "image": str(), **rest} if not rest:
            return blobs[0] if blobs else None
    raise CorpusError(f"a part of the type {value.get('type')!r} with the keys {', '.join(sorted(map(str, value)))}")


def _image(name: str, folder: Path) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise CorpusError("the image lies outside the file's folder; move it inside")
    return path


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value[key]
    if not isinstance(found, str) or not found.strip():
        raise CorpusError(f"{key} must be a text")
    return found


def _label(value: Any) -> Label:
    if value not in get_args(Label):
        raise CorpusError(f"the label {value!r} is none of {', '.join(get_args(Label))}")
    return cast(Label, value)


def read_log(paths: Iterable[Path], skipped: Skipped) -> dict[str, Logged]:
    """What decision logs say of every id in them, the requests' and the questions'."""
    found: dict[str, Logged] = {}
    for path in paths:
        for line in read_lines(path, _log_line, skipped, "a line of the decision log"):
            found |= line
    return found


def _log_line(value: Mapping[str, Any], where: str) -> dict[str, Logged]:
    if not str(value["schema"]).startswith("guard_middleware.decision/"):
        raise ValueError(f"the schema is {value['schema']}")
    calls = {call["id"]: (call["source"], (call["verdict"] or {}).get("request")) for call in value["decisions"]}
    out = {id: Logged(frozenset({source}), label) for id, (source, label) in calls.items()}
    labels = [label for _, label in calls.values() if label]
    out[value["id"]] = Logged(frozenset(source for source, _ in calls.values()), labels[0] if labels else None)
    return out


def agreed(corrections: Sequence[Correction], skipped: Skipped) -> list[Correction]:
    """One correction for each content, the last of its reviewer; what reviewers judge differently is left out."""
    contents: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    groups: dict[tuple[object, ...], dict[str, Correction]] = defaultdict(dict)
    for one in corrections:
        key = content_key(one.lesson)
        contents[one.decision].add(key)
        groups[key][one.reviewer] = one
    kept: dict[str, Correction] = {}
    for by_reviewer in groups.values():
        found = list(by_reviewer.values())
        said = {(one.lesson.request, one.lesson.response_label) for one in found}
        torn = [one for one in found if len(contents[one.decision]) > 1]
        if torn:
            for one in torn:
                skipped(f"{one.where}: decision {one.decision} is corrected with two contents; keep the right one")
        elif any(len({label for label in side if label}) > 1 for side in zip(*said, strict=True)):
            places = ", ".join(f"{one.where} ({one.reviewer})" for one in found)
            skipped(f"{places}: reviewers disagree about the same content; settle it and give it again")
        else:
            # the one that says more: a rationale, a label of the request
            best = max(found, key=lambda one: (bool(one.lesson.rationale), bool(one.lesson.request)))
            kept[best.decision] = best
    return list(kept.values())
