"""What a client has been shown of a streamed Responses answer, so that it can be ended anywhere.

Every event that is sent passes ``saw``; ``closing`` gives the events that end whatever is open. They repeat only
what was shown before, so that every client, another gateway too, finds the stream and its summaries equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from guard_middleware.dialects.base import Notice
from guard_middleware.dialects.responses_response import message, own_id, refusal

_Event = dict[str, Any]
#: by type of part: the event that says its whole text, and the field with it
_SAID = {
    "output_text": ("response.output_text.done", "text"),
    "refusal": ("response.refusal.done", "refusal"),
    "reasoning_text": ("response.reasoning_text.done", "text"),
    "summary_text": ("response.reasoning_summary_text.done", "text"),
}

_LIFE = ("error", *(f"response.{name}" for name in ("created", "queued", "in_progress", "completed", "incomplete")))
_DELTAS = tuple(name.replace(".done", ".delta") for name, _ in _SAID.values())


@dataclass(slots=True)
class _Part:
    value: _Event
    texts: list[str]
    #: opened by an event of its own; said to its end; closed
    announced: bool = True
    said: bool = False
    done: bool = False

    def now(self) -> _Event:
        return {**self.value, _SAID[self.value["type"]][1]: "".join(self.texts)}


@dataclass(slots=True)
class _Item:
    value: _Event
    content: list[_Part] = field(default_factory=list)
    summary: list[_Part] = field(default_factory=list)
    done: bool = False

    def parts(self, name: str) -> list[_Part]:
        return self.summary if name == "summary" else self.content

    def now(self, status: str) -> _Event:
        """The item as it was shown."""
        lists = {n: [part.now() for part in self.parts(n)] for n in ("summary", "content") if self.parts(n)}
        return {**self.value, **lists, "status": status}


class Shown:
    """The open and closed items of one stream."""

    def __init__(self) -> None:
        self.begun = False
        self._items: dict[int, _Item] = {}

    @property
    def output(self) -> list[_Event]:
        """The items that were closed, in their order."""
        return [item.value for _, item in sorted(self._items.items()) if item.done]

    def saw(self, event: _Event) -> None:
        kind: str = event["type"]
        if kind in _LIFE:
            self.begun = True
            return
        index = event["output_index"]
        if kind == "response.output_item.added":
            self._items[index] = _Item(event["item"])
            return
        item = self._items[index]
        if kind == "response.output_item.done":
            item.value, item.done = event["item"], True
        elif kind in _DELTAS:
            self._part(item, kind, event).texts.append(event["delta"])
        elif kind == "response.output_text.annotation.added":
            part = item.content[event["content_index"]]
            part.value = {**part.value, "annotations": [*(part.value.get("annotations") or ()), event["annotation"]]}
        elif kind.endswith("part.added"):
            text = _SAID[event["part"]["type"]][1]
            item.parts(_list(event)).append(_Part(event["part"], [event["part"][text]]))
        elif kind.endswith("part.done"):
            part = item.parts(_list(event))[_number(event)]
            part.value, part.done = event["part"], True
            part.texts = [event["part"][_SAID[event["part"]["type"]][1]]]
        elif any(kind == name for name, _ in _SAID.values()):
            part = self._part(item, kind, event)
            part.texts, part.said = [event[_SAID[part.value["type"]][1]]], True

    def closing(self, notice: Notice, soft: bool) -> Iterator[_Event]:
        """The events that end what is open, and say in a part of its own that this was blocked."""
        status = "completed" if soft else "incomplete"
        speaking: tuple[int, _Item] | None = None
        for index, item in sorted(self._items.items()):
            if item.done:
                continue
            yield from self._close_parts(index, item)
            if item.value["type"] == "message" and speaking is None:
                speaking = index, item
                continue
            yield _of(index, "response.output_item.done", item=item.now(status))
        if speaking is None:
            index = max(self._items, default=-1) + 1
            speaking = index, _Item(message(own_id("msg", notice), "in_progress", []))
            yield _of(index, "response.output_item.added", item=speaking[1].value)
        index, item = speaking
        number = len(item.content)
        yield from _spoken(index, item.value["id"], number, refusal(notice.message, soft))
        item = self._items.get(index, item)
        yield _of(index, "response.output_item.done", item=item.now(status))

    def _close_parts(self, index: int, item: _Item) -> Iterator[_Event]:
        for name in ("summary", "content"):
            for number, part in enumerate(item.parts(name)):
                if part.done or not part.announced:
                    continue
                place = {"item_id": item.value.get("id", ""), f"{name}_index": number}
                kind, text = _SAID[part.value["type"]]
                if not part.said:
                    yield _of(index, kind, **place, **_logprobs(kind), **{text: "".join(part.texts)})
                done = "reasoning_summary_part" if name == "summary" else "content_part"
                yield _of(index, f"response.{done}.done", **place, part=part.now())

    def _part(self, item: _Item, kind: str, event: _Event) -> _Part:
        """The part that an event speaks of; some servers open parts of reasoning with their first text."""
        parts, number = item.parts(_list(event)), _number(event)
        if number == len(parts):
            type = "summary_text" if "summary" in kind else "reasoning_text"
            parts.append(_Part({"type": type, "text": ""}, [], announced=False))
        return parts[number]


def _spoken(index: int, item_id: str, number: int, part: _Event) -> Iterator[_Event]:
    """The events of one whole part."""
    kind, text = _SAID[part["type"]]
    place = {"item_id": item_id, "content_index": number}
    yield _of(index, "response.content_part.added", **place, part={**part, text: ""})
    yield _of(index, kind.replace(".done", ".delta"), **place, **_logprobs(kind), delta=part[text])
    yield _of(index, kind, **place, **_logprobs(kind), **{text: part[text]})
    yield _of(index, "response.content_part.done", **place, part=part)


def _of(index: int, kind: str, **fields: Any) -> _Event:
    return {"type": kind, "output_index": index, **fields}


def _logprobs(kind: str) -> _Event:
    return {"logprobs": []} if kind == "response.output_text.done" else {}  # the SDK reads it of both its events


def _list(event: _Event) -> str:
    return "summary" if "summary_index" in event else "content"


def _number(event: _Event) -> int:
    number: int = event["summary_index"] if "summary_index" in event else event["content_index"]
    return number
