"""A guard in front of a guard: the same content is judged once, and a conversation grows at the price of its new turn.

``CachedGuard`` implements the guard protocol. It does three things, none of which a client can see or steer:

- **One question at a time** for the same content: whoever asks meanwhile waits for the same answer. Each keeps its own
  deadline, and the question ends only when nobody waits for it.
- **Verdicts are kept** (errors never), under a digest of the whole content, of what is asked about it, and of the
  weights that judged. "What is asked" includes the mode: a verdict without reasoning never stands for one with it.
  The weights are those of the newest verdict, or those that ``serving`` named last; when they change, no older entry
  is found any more.
- **Conversations**: the beginning of a conversation that was judged unharmful as a request of its own, and each answer
  that was judged unharmful, leave a mark. Where a mark is found, the guard is asked about a ``turns.view`` of the
  conversation. Where none is, or the earlier verdict came close to a threshold, or the weights turn out to be others
  than those of the mark, it is asked about the whole.

The bound: all that the client's side wrote is in every question, however long, so a request split over turns is seen
whole when its last part comes. Left out are only answers that we judged, and the sight of old images.

Marks and verdicts are found by content alone. No header, no id and no field of a request takes part.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.evidence import canonical, conversation_value, message_value
from guard_middleware.stores import Store
from guard_middleware.turns import Past, TurnBounds, View, view
from guard_middleware.types import (
    Conversation,
    Message,
    Reasoning,
    Record,
    Usage,
    Verdict,
)
from guard_middleware.wire import Guard, ModerationRequest, WireError, decode_answer, encode_answer, judging_value

Event: TypeAlias = Literal["hit", "miss", "coalesced"]

#: seconds after which a kept verdict is no longer believed unless the worker has said again which weights it runs
REVISION_SECONDS = 10.0
#: what the inner guard may be late, and what its lateness may cost on the way here
_SLACK = 0.1
#: fields of a question that do not change what the verdict would be
_NOT_CONTENT = {"id", "conversation", "deadline", "traceparent"}


class CachedGuard:
    """Asks ``guard`` what ``store`` does not know. Use from one event loop.

    ``clean_below`` is the score under which an unharmful verdict leaves a mark: the lowest threshold of all policies,
    so that no policy finds harm in a beginning that another one passed. ``store`` None keeps nothing. What is kept is
    found again under the same ``name`` only: guards that share a store never answer for each other.
    """

    def __init__(
        self,
        guard: Guard,
        store: Store | None,
        *,
        name: str = "",
        bounds: TurnBounds | None = None,
        clean_below: float = 0.5,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._name, self._guard, self._store, self._bounds = name, guard, store, bounds or TurnBounds()
        self._clean_below, self._on_event = clean_below, on_event
        self._flights: dict[bytes, _Flight] = {}
        self._weights: _Weights | None = None
        self._told = False
        self._chores: set[asyncio.Task[None]] = set()

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        """See ``wire.Guard``."""
        if not 0.0 < request.deadline < math.inf:
            return GuardError(GuardErrorKind.TIMEOUT, "no time was left to ask the guard")
        end = asyncio.get_running_loop().time() + request.deadline
        content = _Content(request, self._bounds)
        while True:
            flight, first = self._flights.get(content.key), False
            if flight is None:
                flight, first = self._launch(content, request, end), True
            outcome = await self._wait(flight, content.key, end)
            if outcome is None:
                return GuardError(GuardErrorKind.TIMEOUT, "no verdict before the deadline")
            hurried = isinstance(outcome, GuardError) and outcome.kind is GuardErrorKind.TIMEOUT and flight.end < end
            if first or not hurried:
                break
        if first or isinstance(outcome, GuardError):
            return outcome
        self._on_event("coalesced")
        return _free(outcome)

    def settled(self, record: Record) -> None:
        """Takes note of a finished request: answers that were judged unharmful, whole, need no second reading."""
        weights, conversation = self._weights, record.conversation
        if self._store is None or weights is None or conversation is None or record.outcome != "allowed":
            return
        judged = {call.choice for call in record.calls if call.source == "output"}
        if judged - set(range(len(record.answers))):
            return
        digests = _chain(conversation)
        marks: dict[bytes, bytes] = {}
        for choice, answer in enumerate(record.answers):
            verdicts = [call.decision.verdict for call in record.calls if call.choice == choice]
            if not verdicts or any(v is None or not self._clean_answer(v, weights) for v in verdicts):
                continue
            how = canonical(judging_value(next(v.judging for v in verdicts if v)))
            for said in (answer, _without_reasoning(answer)):
                marks[_key("answered", weights.revision, how, _next(digests[-1], said))] = b"1"
        if marks:
            self._later(self._store.put(marks))

    def serving(self, model: str, revision: str) -> None:
        """The guard says that from now on these weights judge: what others said answers nothing any more, be it kept or
        still on its way. Whoever waits for it already gets it. Once a guard has said so, no verdict does: one of others
        (a worker that stands in) is kept as theirs."""
        now, self._told = asyncio.get_running_loop().time(), True
        self._weights = _Weights(self._identity(model, revision), now, now)
        self._flights.clear()

    def unknown(self) -> None:
        """The guard went away, and nobody knows which weights will judge next: nothing that is kept answers until one
        has said."""
        self._weights = None

    async def aclose(self) -> None:
        """Ends questions that are still open and writes what is still to be written."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._chores, return_exceptions=True)
        if self._store is not None:
            await self._store.aclose()

    # -- one question, several who wait --

    def _launch(self, content: _Content, request: ModerationRequest, end: float) -> _Flight:
        task = asyncio.create_task(self._answer(content, request, end), name="guard-question")
        flight = self._flights[content.key] = _Flight(task, end)
        task.add_done_callback(lambda _: self._landed(content.key, flight))
        return flight

    def _landed(self, key: bytes, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _wait(self, flight: _Flight, key: bytes, end: float) -> Verdict | GuardError | None:
        flight.waiting += 1
        try:
            left = end + _SLACK - asyncio.get_running_loop().time()
            await asyncio.wait({flight.task}, timeout=max(0.0, left))
            if not flight.task.done():
                return None
            if flight.task.cancelled():
                return GuardError(GuardErrorKind.UNAVAILABLE, "the guard client is closed")
            return flight.task.result()
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._landed(key, flight)
                flight.task.cancel()

    # -- what is known --

    async def _answer(self, content: _Content, request: ModerationRequest, end: float) -> Verdict | GuardError:
        weights = self._weights
        if self._store is None:
            return await self._ask(request, end)
        revision = weights.revision if weights else None
        if weights is not None and asyncio.get_running_loop().time() - weights.learnt < REVISION_SECONDS:
            (kept,) = await self._store.get([_key("verdict", weights.revision, content.key)])
            known = None if kept is None else _thawed(kept)
            still = self._weights is not None and self._weights.revision == weights.revision  # a store takes its time
            if known is not None and still:
                self._on_event("hit")
                return known
        self._on_event("miss")
        past = Past() if revision is None else await self._past(content, revision)
        seen = view(request.conversation, past, self._bounds)
        outcome = await self._ask(replace(request, conversation=seen.conversation), end)
        if isinstance(outcome, Verdict) and self._revision(outcome) != revision:
            past = Past()  # other weights judged it
            if seen.conversation is not request.conversation:
                seen = View(request.conversation)
                outcome = await self._ask(request, end)
        if isinstance(outcome, GuardError):
            return outcome
        return self._keep(content, request, past, seen, outcome)

    async def _ask(self, request: ModerationRequest, end: float) -> Verdict | GuardError:
        loop = asyncio.get_running_loop()
        asked = loop.time()
        if asked >= end:
            return GuardError(GuardErrorKind.TIMEOUT, "no verdict before the deadline")
        outcome = await self._guard.moderate(replace(request, deadline=end - asked))
        if isinstance(outcome, Verdict) and self._names(revision := self._revision(outcome), asked):
            self._weights = _Weights(revision, asked, loop.time())
        return outcome

    def _names(self, revision: str, asked: float) -> bool:
        """Whether a verdict says which weights judge now."""
        weights = self._weights
        if self._told:
            return weights is not None and weights.revision == revision
        return weights is None or weights.asked <= asked

    async def _past(self, content: _Content, revision: str) -> Past:
        """What the store knows of the conversation's beginnings, the longest first."""
        assert self._store is not None
        messages, digests = content.messages, content.digests
        ends = [n for n in range(len(messages) - 1, 0, -1) if messages[n - 1].role != "assistant"]
        said = [n for n in range(len(messages), 0, -1) if messages[n - 1].role == "assistant"]
        keys = [_key("asked", revision, content.mode, digests[n]) for n in ends]
        keys += [_key("answered", revision, content.judging, digests[n]) for n in said]
        found = await self._store.get(keys)
        marked = [(n, past) for n, data in zip(ends, found, strict=False) if data and (past := _past_of(data, n))]
        if not marked:
            return Past()
        judged, past = marked[0]
        answered = {n - 1 for n, data in zip(said, found[len(ends) :], strict=True) if data is not None}
        return Past(judged, past.answers | answered, past.drawn)

    def _keep(self, content: _Content, request: ModerationRequest, past: Past, seen: View, verdict: Verdict) -> Verdict:
        assert self._store is not None
        shown = [blob.digest for blob in seen.conversation.blobs()]
        drawn = dict(past.drawn)
        if len(verdict.drawn_text) == len(shown):
            drawn |= dict(zip(shown, verdict.drawn_text, strict=True))
        blobs = request.conversation.blobs()
        left_out = (("characters", seen.characters), ("images", seen.images))
        verdict = replace(
            verdict,
            drawn_text=tuple(drawn.get(blob.digest, "") for blob in blobs) if drawn else (),
            left_out=tuple(pair for pair in left_out if pair[1]),
        )
        revision = self._revision(verdict)
        entries = {_key("verdict", revision, content.key): _frozen(verdict)}
        if verdict.request == "unharmful" and verdict.request_score < self._clean_below:
            held = {blob.digest: drawn[blob.digest] for blob in blobs if blob.digest in drawn}
            mark = {"answers": sorted(past.answers), "drawn": held}
            entries[_key("asked", revision, content.mode, content.digests[-1])] = canonical(mark)
        self._later(self._store.put(entries))
        return verdict

    def _clean_answer(self, verdict: Verdict, weights: _Weights) -> bool:
        if (
            verdict.response != "unharmful"
            or verdict.response_score is None
            or self._revision(verdict) != weights.revision
        ):
            return False
        return verdict.response_score < self._clean_below

    def _revision(self, verdict: Verdict) -> str:
        return self._identity(verdict.model, verdict.revision)

    def _identity(self, model: str, revision: str) -> str:
        return f"{self._name}\n{model}\n{revision}"

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """A write that nobody waits for; one into memory is done before anybody who waits for the verdict goes on."""
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)


@dataclass(slots=True, eq=False)
class _Flight:
    task: asyncio.Task[Verdict | GuardError]
    end: float
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class _Weights:
    """What judged last: ``asked`` and ``learnt`` are loop times."""

    revision: str
    asked: float
    learnt: float


class _Content:
    """A question's digests: of what is asked (``key``), how (``mode``, its ``judging`` beside), and of each beginning
    of the conversation."""

    __slots__ = ("digests", "judging", "key", "messages", "mode")

    def __init__(self, request: ModerationRequest, bounds: TurnBounds) -> None:
        conversation = request.conversation
        how = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in _NOT_CONTENT}
        how["judging"] = judging_value(request.judging)
        self.judging = canonical(how["judging"])
        self.mode = hashlib.sha256(canonical({**how, "bounds": [bounds.characters, bounds.images]})).digest()
        self.messages = conversation.messages
        self.digests = _chain(conversation)
        answer = b"" if conversation.answer is None else canonical(message_value(conversation.answer))
        self.key = _key("question", self.mode, self.digests[-1], answer)


def _key(domain: str, *parts: str | bytes) -> bytes:
    """A digest of parts that no other parts have."""
    digest = hashlib.sha256()
    for part in (domain, *parts):
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _chain(conversation: Conversation) -> list[bytes]:
    """The digest of the definitions alone, and with the first 1, 2, ... messages."""
    steer = conversation_value(Conversation((), conversation.definitions))
    digests = [_key("definitions", canonical(steer))]
    for message in conversation.messages:
        digests.append(_next(digests[-1], message))
    return digests


def _next(digest: bytes, message: Message) -> bytes:
    return _key("message", digest, canonical(message_value(message)))


def _without_reasoning(message: Message) -> Message:
    """An answer as most clients send it back."""
    return replace(message, parts=tuple(part for part in message.parts if not isinstance(part, Reasoning)))


def _free(verdict: Verdict) -> Verdict:
    """A verdict that cost this caller nothing."""
    return replace(verdict, cached=True, usage=Usage(), timings=())


def _frozen(verdict: Verdict) -> bytes:
    value = {"verdict": encode_answer("", verdict).decode("ascii"), "left_out": verdict.left_out}
    return json.dumps(value).encode("ascii")


def _thawed(data: bytes) -> Verdict | None:
    try:
        value = json.loads(data)
        _, verdict = decode_answer(value["verdict"])
        left_out = tuple((str(name), int(count)) for name, count in value["left_out"])
    except (WireError, ValueError, LookupError, TypeError):
        return None
    return _free(replace(verdict, left_out=left_out)) if isinstance(verdict, Verdict) else None


def _past_of(data: bytes, judged: int) -> Past | None:
    try:
        value: Mapping[str, Any] = json.loads(data)
        answers: Sequence[int] = value["answers"]
        drawn: Mapping[str, str] = value["drawn"]
        return Past(judged, frozenset(map(int, answers)), {str(k): str(v) for k, v in drawn.items()})
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
