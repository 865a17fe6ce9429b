"""What a streamed answer may show before its last verdict: frames in, cleared frames out. No I/O, no clock.

Three modes. ``hold`` releases nothing before the last verdict. ``window`` releases text up to what was judged: as soon
as a window of unjudged text is full and the guard is free, that text is asked about, with ``overlap`` characters of
what was cleared before it, so that a phrase across the boundary is seen whole; windows grow by ``growth``. ``async``
releases at once, and is never more than ``leak_bound`` characters of a choice ahead of what was judged; past that it
holds, and the upstream waits.

In every mode the whole answer of a choice is judged at its end, once more; tool calls leave only then. With windows of
at least twice the overlap the guard reads at most 2.5 times the answer: once in windows, at most half of it again as
overlap, once whole (tests/test_holdback.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from guard_middleware.config import StreamRules
from guard_middleware.dialects.base import Frame, Notice, StreamParser
from guard_middleware.types import Message, Reasoning, Text


@dataclass(frozen=True, slots=True)
class Window:
    """A question about a part of one choice; ``marks`` are the ends of its surfaces when it was asked."""

    choice: int
    number: int
    message: Message
    marks: dict[str, int] = field(repr=False)


@dataclass(slots=True)
class _Surface:
    """One surface's text; lengths in characters. ``asked`` and ``cleared`` are ends of judged text."""

    reasoning: bool
    texts: list[str] = field(default_factory=list)
    length: int = 0
    asked: int = 0
    cleared: int = 0

    def since(self, start: int) -> str:
        """The text from ``start`` on; joins no more than the tail that holds it."""
        tail: list[str] = []
        at = self.length
        for text in reversed(self.texts):
            tail.append(text)
            at -= len(text)
            if at <= start:
                break
        joined = "".join(reversed(tail))
        return joined[max(0, start - at) :]


@dataclass(slots=True)
class _Held:
    """A frame in the queue; ``ends`` are where its text ends on each surface."""

    frame: Frame
    ends: tuple[tuple[str, int], ...]
    size: int


@dataclass(slots=True)
class _Choice:
    queue: deque[_Held] = field(default_factory=deque)
    surfaces: dict[str, _Surface] = field(default_factory=dict)
    window: int = 0
    windows: int = 0
    waiting: bool = False
    cut: bool = False
    begun: bool = False
    #: released ahead of the verdict, now and at most so far
    leaked: int = 0

    @property
    def unasked(self) -> int:
        return sum(surface.length - surface.asked for surface in self.surfaces.values())


class HoldBack:
    """The queue of one streamed answer. ``parser`` encodes what leaves it, in the order in which it leaves."""

    def __init__(self, parser: StreamParser, rules: StreamRules) -> None:
        self._parser, self._rules = parser, rules
        self._choices: dict[int, _Choice] = {}
        #: the most characters of one choice that left before they were judged
        self.leaked = 0

    @property
    def paused(self) -> bool:
        """Whether the upstream should wait: an ``async`` choice has used up its bound."""
        return self._rules.mode == "async" and any(
            choice.queue and choice.waiting and not choice.cut for choice in self._choices.values()
        )

    @property
    def cut_choices(self) -> frozenset[int]:
        return frozenset(index for index, choice in self._choices.items() if choice.cut)

    def feed(self, frames: Iterable[Frame]) -> None:
        """Takes frames of the upstream; those of a choice that was cut are dropped."""
        for frame in frames:
            choice = self._choices.setdefault(frame.choice, _Choice(window=self._rules.first_window))
            if choice.cut:
                continue
            ends = []
            for said in frame.said if not frame.whole else ():
                surface = choice.surfaces.setdefault(said.surface, _Surface(said.reasoning))
                surface.texts.append(said.text)
                surface.length += len(said.text)
                ends.append((said.surface, surface.length))
            choice.queue.append(_Held(frame, tuple(ends), sum(len(said.text) for said in frame.said)))

    def due(self) -> Iterator[Window]:
        """Windows to ask about now; each must come back through ``cleared`` or ``cut``."""
        if self._rules.mode == "hold":
            return
        for index, choice in self._choices.items():
            full = choice.unasked >= (1 if self._rules.mode == "async" else choice.window)
            if full and not choice.waiting and not choice.cut:
                yield self._window(index, choice)

    def cleared(self, window: Window) -> None:
        """The window's text may leave."""
        choice = self._choices[window.choice]
        choice.waiting = False
        for name, mark in window.marks.items():
            surface = choice.surfaces[name]
            choice.leaked -= min(choice.leaked, mark - surface.cleared)
            surface.cleared = mark

    def cut(self, index: int) -> None:
        """Drops what is held of a choice, and all that will come of it."""
        choice = self._choices.setdefault(index, _Choice())
        choice.cut, choice.waiting = True, False
        choice.queue.clear()

    def covered(self, index: int, message: Message) -> bool:
        """Whether the only window of a choice was the whole of ``message``, so that its verdict is the last one."""
        choice = self._choices.get(index)
        if choice is None or choice.windows != 1 or choice.unasked:
            return False
        return self._message(choice, from_start=True) == message

    def release(self) -> bytes:
        """What may leave now, encoded.

        Frames of a choice leave in order, and choices begin in the order in which they appeared, because SDKs take
        that order for their index.
        """
        out: list[bytes] = []
        for choice in self._choices.values():
            while choice.queue and self._may_leave(choice, choice.queue[0]):
                held = choice.queue.popleft()
                self._count(choice, held)
                out.append(self._parser.release(held.frame))
                choice.begun = True
            if not choice.begun and not choice.cut:
                break
        return b"".join(out)

    def finish(self, blocked: Mapping[int, Notice], soft: bool) -> bytes:
        """All that is left, after the last verdict on every choice: ``blocked`` ones end here, the others leave."""
        out: list[bytes] = []
        for index, choice in self._choices.items():
            if index in blocked and not choice.cut:
                self.cut(index)
                out.append(self._parser.cut(index, blocked[index], soft))
            out += [self._parser.release(held.frame) for held in choice.queue]
            choice.queue.clear()
        return b"".join(out)

    def _may_leave(self, choice: _Choice, held: _Held) -> bool:
        if self._rules.mode == "hold" or held.frame.whole:
            return False
        if all(end <= choice.surfaces[name].cleared for name, end in held.ends):
            return True
        return self._rules.mode == "async" and choice.leaked + held.size <= (self._rules.leak_bound or 0)

    def _count(self, choice: _Choice, held: _Held) -> None:
        if any(end > choice.surfaces[name].cleared for name, end in held.ends):
            choice.leaked += held.size
            self.leaked = max(self.leaked, choice.leaked)

    def _window(self, index: int, choice: _Choice) -> Window:
        message = self._message(choice)
        marks = {name: surface.length for name, surface in choice.surfaces.items()}
        for surface in choice.surfaces.values():
            surface.asked = surface.length
        choice.waiting = True
        choice.windows += 1
        choice.window = min(int(choice.window * self._rules.growth), self._rules.last_window)
        return Window(index, choice.windows, message, marks)

    def _message(self, choice: _Choice, *, from_start: bool = False) -> Message:
        """The text that no window held yet, each surface with the overlap before it."""
        parts: list[Reasoning | Text] = []
        for surface in choice.surfaces.values():
            start = 0 if from_start else max(0, surface.asked - self._rules.overlap)
            if surface.length > (0 if from_start else surface.asked):
                text = surface.since(start)
                parts.append(Reasoning(text) if surface.reasoning else Text(text))
        return Message("assistant", tuple(parts))
