"""A guard that sees only what stands in one transcript, behind the cache, and conversations to put to both."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

from guard_middleware.errors import GuardError
from guard_middleware.stores import MemoryStore
from guard_middleware.types import (
    Action,
    Basis,
    Blob,
    Conversation,
    Decision,
    GuardCall,
    Label,
    Message,
    Part,
    Record,
    Source,
    Text,
    Usage,
    Verdict,
)
from guard_middleware.verdicts import CachedGuard
from guard_middleware.wire import ModerationRequest
from tests.support.records import record as some_record
from tests.support.scripted_worker import text_of

#: the phrase whose pieces, in braces, are harmful once they stand in one transcript in order
PHRASE = "pickalock"
#: an answer longer than all that is read again of the past
LONG = "It is a fine day for bread. " * 100


class PieceGuard:
    """Joins the pieces ``{like this}`` of the whole transcript, drawn ones included; no piece alone is harmful.

    Reads an image's text from its bytes. ``pause`` is how long a verdict takes.
    """

    def __init__(self, pause: float = 0.0, revision: str = "r1") -> None:
        self.asked: list[ModerationRequest] = []
        self.cancelled = 0
        self.pause, self.revision = pause, revision
        self.errors: list[GuardError] = []
        self.score: float | None = None

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        self.asked.append(request)
        revision = self.revision
        try:
            async with asyncio.timeout(request.deadline):
                await asyncio.sleep(self.pause)
        except TimeoutError:
            return GuardError("timeout")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.errors:
            return self.errors.pop()
        talk = request.conversation
        drawn = tuple(blob.data.decode() for blob in talk.blobs())
        said = label(text_of(talk.messages) + "".join(drawn))
        answer = None if talk.answer is None else label(text_of(talk.messages) + text_of([talk.answer]))
        return Verdict(
            request=said,
            response=answer,
            request_score=self.score if self.score is not None else float(said == "harmful"),
            response_score=None if answer is None else float(answer == "harmful"),
            reasoning="Step 1: The rule.",
            usage=Usage(10, 5, 3),
            model="pieces",
            revision=revision,
            drawn_text=drawn,
            timings=(("generate", 0.1),),
            judging=request.judging,
        )


def label(text: str) -> Label:
    return "harmful" if PHRASE in "".join(re.findall(r"\{(\w+)\}", text)) else "unharmful"


def user(*said: str | Part) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in said))


def model(text: str) -> Message:
    return Message("assistant", (Text(text),))


def image(text: str) -> Blob:
    return Blob("image/png", text.encode())


def question(talk: Conversation, source: Source = "input", deadline: float = 5.0, **more: Any) -> ModerationRequest:
    return ModerationRequest("q", talk, source, deadline, **more)


def memory() -> MemoryStore:
    return MemoryStore(entries=1000, size=10**7, ttl=3600)


class Bench:
    """A cached guard over a scripted one, and the counts of what it told."""

    def __init__(self, guard: PieceGuard | None = None, store: Any = None, **options: Any) -> None:
        self.inner = guard or PieceGuard()
        self.store = memory() if store is None else store
        self.events: Counter[str] = Counter()
        self.cached = CachedGuard(self.inner, self.store, on_event=lambda event: self.events.update([event]), **options)

    async def verdict(self, talk: Conversation, source: Source = "input", **more: Any) -> Verdict:
        outcome = await self.cached.moderate(question(talk, source, **more))
        assert isinstance(outcome, Verdict), outcome
        return outcome

    async def turn(self, talk: Conversation, answer: str | Message, *, settle: bool = True) -> Conversation:
        """One turn as a transaction has it: the input judged, the answer judged, the record settled."""
        said = model(answer) if isinstance(answer, str) else answer
        asked = await self.verdict(talk)
        assert asked.request == "unharmful"
        judged = await self.verdict(replace(talk, answer=said), "output")
        if settle:
            self.cached.settled(record(talk, [said], [("input", None, asked), ("output", 0, judged)]))
            await asyncio.sleep(0)
        return replace(talk, messages=(*talk.messages, said))


def record(
    talk: Conversation, answers: list[Message], verdicts: list[tuple[Source, int | None, Verdict]], **more: Any
) -> Record:
    calls = tuple(
        GuardCall(source, choice, Decision("d", source, Action.ALLOW, Basis.VERDICT, "p", "d", Action.ALLOW, v), 0.1)
        for source, choice, v in verdicts
    )
    base = replace(some_record(), calls=calls, conversation=talk, answers=tuple(answers))
    return replace(base, **more)


def then(talk: Conversation, *said: str | Part) -> Conversation:
    return replace(talk, messages=(*talk.messages, user(*said)))


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


HELLO = Conversation((user("hello"),))
