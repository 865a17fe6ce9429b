"""What a streamed answer may show before its last verdict: frames in, cleared frames out. No I/O, no clock.

Three modes. ``hold`` releases nothing before the last verdict. ``window`` releases text up to what was judged: as soon
as a window of unjudged text is full and the guard is free, that text is asked about, with ``overlap`` characters of
what was cleared before it, so that a phrase across the boundary is seen whole; windows grow by ``growth``. ``async``
releases at once, and is never more than ``leak_bound`` characters of a choice ahead of what was judged; past that it
holds, and the upstream waits.

In every mode the whole answer of a choice is judged at its end, once more; tool calls leave only then. With windows of
at least twice what they repeat the guard reads at most 2.5 times the answer: once in windows, at most half of it again
as overlap, once whole (tests/test_holdback.py).

Frames of a choice leave in order, and choices begin (or are cut) in the order in which they appeared, because SDKs take
that order for their index. A long hold-back is packed, so that it costs about what its text costs.
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from guard_middleware.config import StreamRules
from guard_middleware.dialects.base import Frame, Notice, StreamParser
from guard_middleware.types import Message, Reasoning, Text

#: frames that are packed together; parsed ones take a hundred times the memory
_BATCH = 256
#: bytes that are encoded at once, at the end
_PIECE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Window:
    """A question about a part of one choice; ``marks`` are the ends of its surfaces when it was asked."""

    choice: int
    number: int
    message: Message
    marks: dict[str, int] = field(repr=False)


@dataclass(slots=True)
class _Surface:
    """One surface's text; lengths in characters. ``asked`` and ``cleared`` are ends of judged text.

    ``texts`` are what no window held yet, and the overlap before it.
    """

    reasoning: bool
    texts: list[str] = field(default_factory=list)
    length: int = 0
    asked: int = 0
    cleared: int = 0

    def ask(self, overlap: int) -> Text | Reasoning:
        """The text of the next window."""
        text = "".join(self.texts)
        self.texts = [text[-overlap:]] if overlap else []
        self.asked = self.length
        return Reasoning(text) if self.reasoning else Text(text)


@dataclass(slots=True)
class _Held:
    """A frame in the queue; ``ends`` are where its text ends on each surface."""

    frame: Frame
    ends: tuple[tuple[str, int], ...]
    size: int


class _Queue:
    """Frames in order; those far from both ends are packed. Its head is always at hand."""

    def __init__(self) -> None:
        self._front: deque[_Held] = deque()
        self._packs: deque[bytes] = deque()
        self._back: list[_Held] = []

    @property
    def head(self) -> _Held | None:
        return self._front[0] if self._front else None

    def append(self, held: _Held) -> None:
        if len(self._front) < _BATCH and not self._back and not self._packs:
            self._front.append(held)
            return
        self._back.append(held)
        if len(self._back) == _BATCH:
            # Never leaves this process, so that what is loaded is what was dumped.
            self._packs.append(zlib.compress(pickle.dumps(self._back, pickle.HIGHEST_PROTOCOL), 1))
            self._back = []

    def popleft(self) -> _Held:
        held = self._front.popleft()
        if not self._front and self._packs:
            self._front.extend(pickle.loads(zlib.decompress(self._packs.popleft())))  # noqa: S301
        elif not self._front and self._back:
            self._front.extend(self._back)
            self._back = []
        return held

    def clear(self) -> None:
        self._front.clear()
        self._packs.clear()
        self._back = []


@dataclass(slots=True)
class _Choice:
    window: int
    queue: _Queue = field(default_factory=_Queue)
    surfaces: dict[str, _Surface] = field(default_factory=dict)
    windows: int = 0
    #: the first window, while it is the only one
    first: Message | None = None
    waiting: bool = False
    unasked: int = 0
    begun: bool = False
    #: why it was cut, and whether the client was told
    ending: tuple[Notice, bool] | None = None
    told: bool = False
    #: released ahead of the verdict, now
    leaked: int = 0


class HoldBack:
    """The queue of one streamed answer. ``parser`` encodes what leaves it, in the order in which it leaves."""

    def __init__(self, parser: StreamParser, rules: StreamRules) -> None:
        self._parser, self._rules, self._mode = parser, rules, rules.mode
        self._choices: dict[int, _Choice] = {}
        #: the most characters of one choice that left before they were judged
        self.leaked = 0
        #: characters that left
        self.shown = 0

    @property
    def paused(self) -> bool:
        """Whether the upstream should wait: an ``async`` choice has used up its bound."""
        return self._mode == "async" and any(
            choice.waiting and (head := choice.queue.head) is not None and not head.frame.whole
            for choice in self._choices.values()
        )

    @property
    def cut_choices(self) -> frozenset[int]:
        return frozenset(index for index, choice in self._choices.items() if choice.ending)

    def feed(self, frames: Iterable[Frame]) -> None:
        """Takes frames of the upstream; those of a choice that was cut are dropped."""
        for frame in frames:
            choice = self._choice(frame.choice)
            if choice.ending:
                continue
            size = 0
            for said in frame.said:
                size += len(said.text)
            ends = () if frame.whole or self._mode == "hold" else _gather(choice, frame)
            choice.queue.append(_Held(frame, ends, size))

    def due(self) -> list[Window]:
        """Windows to ask about now; each must come back through ``cleared`` or ``cut``."""
        if self._mode == "hold":
            return []
        return [
            self._window(index, choice)
            for index, choice in self._choices.items()
            if not choice.waiting and not choice.ending and self._full(choice)
        ]

    def cleared(self, window: Window) -> None:
        """The window's text may leave."""
        choice = self._choices[window.choice]
        choice.waiting = False
        for name, mark in window.marks.items():
            surface = choice.surfaces[name]
            choice.leaked -= min(choice.leaked, mark - surface.cleared)
            surface.cleared = mark

    def cut(self, index: int, notice: Notice, soft: bool) -> None:
        """Drops what is held of a choice, and all that will come of it; ``release`` says so when it is its turn."""
        choice = self._choice(index)
        if choice.ending is None:
            choice.ending, choice.waiting = (notice, soft), False
            choice.queue.clear()

    def covered(self, index: int, message: Message) -> bool:
        """Whether the only window of a choice was the whole of ``message``, so that its verdict is the last one."""
        choice = self._choices.get(index)
        return choice is not None and not choice.unasked and choice.first == message

    def release(self) -> bytes:
        """What may leave now, encoded."""
        out: list[bytes] = []
        for index, choice in self._choices.items():
            if choice.ending and not choice.told:
                out.append(self._tell(index, choice))
            while (held := choice.queue.head) is not None and self._may_leave(choice, held):
                self._count(choice, held)
                out.append(self._leave(choice))
            if not choice.begun:
                break
        return b"".join(out)

    def finish(self, close: Callable[[], bytes] = bytes) -> Iterator[bytes]:
        """All that is left, after the last verdict on every choice that was not cut, and then what ``close`` says.

        In pieces, because encoding a long answer takes the memory and the time of others.
        """
        out = io.BytesIO()
        for index, choice in self._choices.items():
            if choice.ending and not choice.told:
                out.write(self._tell(index, choice))
            while choice.queue.head is not None:
                out.write(self._leave(choice))
                if out.tell() >= _PIECE:
                    yield out.getvalue()
                    out = io.BytesIO()
        out.write(close())
        yield out.getvalue()

    def _choice(self, index: int) -> _Choice:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice(self._rules.first_window)
        return choice

    def _tell(self, index: int, choice: _Choice) -> bytes:
        assert choice.ending is not None
        choice.told = choice.begun = True
        return self._parser.cut(index, *choice.ending)

    def _leave(self, choice: _Choice) -> bytes:
        held = choice.queue.popleft()
        self.shown += held.size
        choice.begun = True
        return self._parser.release(held.frame)

    def _may_leave(self, choice: _Choice, held: _Held) -> bool:
        if self._mode == "hold" or held.frame.whole:
            return False
        if _judged(choice, held):
            return True
        return self._mode == "async" and choice.leaked + held.size <= (self._rules.leak_bound or 0)

    def _count(self, choice: _Choice, held: _Held) -> None:
        if not _judged(choice, held):
            choice.leaked += held.size
            self.leaked = max(self.leaked, choice.leaked)

    def _full(self, choice: _Choice) -> bool:
        """Whether a window is worth its question: it must be twice what it repeats, on however many surfaces."""
        if self._mode == "async":
            return choice.unasked > 0
        return choice.unasked >= choice.window and choice.unasked >= 2 * sum(
            min(surface.asked, self._rules.overlap) for surface in choice.surfaces.values() if _new(surface)
        )

    def _window(self, index: int, choice: _Choice) -> Window:
        parts = [surface.ask(self._rules.overlap) for surface in choice.surfaces.values() if _new(surface)]
        message = Message("assistant", tuple(parts))
        choice.first = None if choice.windows else message
        choice.waiting, choice.unasked = True, 0
        choice.windows += 1
        choice.window = min(int(choice.window * self._rules.growth), self._rules.last_window)
        marks = {name: surface.length for name, surface in choice.surfaces.items()}
        return Window(index, choice.windows, message, marks)


def _gather(choice: _Choice, frame: Frame) -> tuple[tuple[str, int], ...]:
    """Adds the frame's text to its surfaces; where it ends on each."""
    ends = []
    for said in frame.said:
        surface = choice.surfaces.get(said.surface)
        if surface is None:
            surface = choice.surfaces[said.surface] = _Surface(said.reasoning)
        surface.texts.append(said.text)
        surface.length += len(said.text)
        choice.unasked += len(said.text)
        ends.append((said.surface, surface.length))
    return tuple(ends)


def _judged(choice: _Choice, held: _Held) -> bool:
    return all(end <= choice.surfaces[name].cleared for name, end in held.ends)


def _new(surface: _Surface) -> bool:
    return surface.length > surface.asked
