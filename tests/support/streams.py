"""A streamed answer read to its end, and released at once: what a policy that holds does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from guard_middleware.config import StreamRules
from guard_middleware.dialects.base import Answer, Frame, Ruling, StreamParser
from guard_middleware.holdback import HoldBack
from guard_middleware.sse import Event


@dataclass(frozen=True)
class Finished:
    parser: StreamParser
    frames: tuple[Frame, ...]
    answers: tuple[Answer, ...]

    def render(self, ruling: Ruling) -> bytes:
        hold = HoldBack(self.parser, StreamRules())
        hold.feed(self.frames)
        for answer in self.answers:
            if ruling.blocked(answer.index, bool(answer.message.parts)):
                hold.cut(answer.index, ruling.choices[answer.index], ruling.soft)
        return b"".join(hold.finish()) + self.parser.close(ruling)


def finished(parser: StreamParser, events: Iterable[Event]) -> Finished:
    frames = tuple(frame for event in events for frame in parser.feed(event))
    return Finished(parser, frames, parser.finish())
