"""The guard in front of the guard: what is asked, what is known, and who waits for what."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import (
    Conversation,
    Definition,
    Judging,
    Message,
    Reasoning,
    Text,
    ToolCall,
    ToolCallResponse,
    Usage,
    Verdict,
)
from guard_middleware.verdicts import REVISION_SECONDS, CachedGuard
from guard_middleware.wire import ModerationRequest
from tests.support.pieces import HELLO, Bench, PieceGuard, image, model, question, record, run, user

# -- kept verdicts --


def test_the_same_content_is_judged_once_and_the_second_verdict_says_so() -> None:
    async def work() -> None:
        bench = Bench()
        first = await bench.verdict(HELLO)
        again = await bench.verdict(HELLO)
        assert len(bench.inner.asked) == 1
        assert (first.cached, first.usage) == (False, Usage(10, 5, 3))
        assert again == replace(first, cached=True, usage=Usage(), timings=())
        assert bench.events == {"miss": 1, "hit": 1}

    run(work())


OTHERS: list[tuple[str, ModerationRequest]] = [
    ("text", question(Conversation((user("hello!"),)))),
    ("a text cut elsewhere", question(Conversation((user("hel", "lo"),)))),
    ("a message cut elsewhere", question(Conversation((user("hel"), user("lo"))))),
    ("role", question(Conversation((Message("tool", (Text("hello"),)),)))),
    ("name", question(Conversation((Message("user", (Text("hello"),), "ann"),)))),
    ("kind of part", question(Conversation((Message("user", (Reasoning("hello"),)),)))),
    ("tool call", question(Conversation((Message("user", (ToolCall("", "hello", ""),)),)))),
    ("tool result", question(Conversation((Message("user", (ToolCallResponse("", "hello"),)),)))),
    ("image", question(Conversation((user("hello", image("x")),)))),
    ("definition", question(replace(HELLO, definitions=(Definition("tool", "hello"),)))),
    ("answer", question(replace(HELLO, answer=model("hello")), "output")),
    ("empty answer", question(replace(HELLO, answer=Message("assistant", ())), "output")),
    ("source", question(HELLO, "output")),
    ("reader on", question(HELLO, reader=True)),
    ("reader off", question(HELLO, reader=False)),
    ("mode label", question(HELLO, judging=Judging("label"))),
    ("mode hybrid", question(HELLO, judging=Judging("hybrid", 0.1, 0.9))),
    ("mode hybrid that thinks elsewhere", question(HELLO, judging=Judging("hybrid", 0.2, 0.9))),
]


@pytest.mark.parametrize("other", [q for _, q in OTHERS], ids=[name for name, _ in OTHERS])
def test_other_content_or_another_mode_is_another_question(other: ModerationRequest) -> None:
    async def work() -> None:
        bench = Bench()
        await bench.verdict(HELLO)
        assert isinstance(await bench.cached.moderate(other), Verdict)
        assert len(bench.inner.asked) == 2

    run(work())


def test_every_question_of_the_table_is_another_one_than_every_other() -> None:
    async def work() -> None:
        bench = Bench()
        for _, asked in OTHERS:
            await bench.cached.moderate(asked)
        assert len(bench.inner.asked) == len(OTHERS)

    run(work())


def test_who_asks_and_under_which_id_changes_nothing() -> None:
    async def work() -> None:
        bench = Bench()
        await bench.cached.moderate(ModerationRequest("a", HELLO, "input", 5.0, None, "00-1"))
        await bench.cached.moderate(ModerationRequest("b", HELLO, "input", 2.0, None, "00-2"))
        assert len(bench.inner.asked) == 1

    run(work())


def test_a_text_with_a_lone_surrogate_is_content_like_any_other() -> None:
    async def work() -> None:
        bench = Bench()
        for text in ("\udc80", "\udc81", "\\udc80"):
            await bench.verdict(Conversation((user(text),)))
        assert len(bench.inner.asked) == 3

    run(work())


def test_errors_are_never_kept() -> None:
    async def work() -> None:
        bench = Bench()
        await bench.verdict(Conversation((user("so that the weights are known"),)))
        for kind in GuardErrorKind:
            bench.inner.errors = [GuardError(kind)]
            outcome = await bench.cached.moderate(question(HELLO))
            assert isinstance(outcome, GuardError)
            assert outcome.kind is kind
        assert not (await bench.verdict(HELLO)).cached
        assert (await bench.verdict(HELLO)).cached

    run(work())


def test_verdicts_of_other_weights_never_answer_not_even_when_those_weights_are_back() -> None:
    async def work() -> None:
        bench = Bench()
        await bench.verdict(HELLO)
        bench.inner.revision = "r2"
        await bench.verdict(Conversation((user("news"),)))
        assert (await bench.verdict(HELLO)).revision == "r2"
        assert len(bench.inner.asked) == 3
        assert (await bench.verdict(HELLO)).cached

    run(work())


def test_a_verdict_that_was_asked_for_before_the_change_does_not_bring_the_old_weights_back() -> None:
    async def work() -> None:
        bench = Bench(PieceGuard(pause=0.05))
        late = asyncio.create_task(bench.verdict(Conversation((user("slow"),))))
        await asyncio.sleep(0.01)
        bench.inner.revision, bench.inner.pause = "r2", 0.0
        await bench.verdict(HELLO)
        assert (await late).revision == "r1"
        assert (await bench.verdict(HELLO)).cached

    run(work())


def test_a_kept_verdict_is_not_believed_for_long_without_a_word_from_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        bench = Bench()
        await bench.verdict(HELLO)
        loop = asyncio.get_running_loop()
        now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: now + REVISION_SECONDS + 1)
        bench.inner.revision = "r2"
        assert (await bench.verdict(HELLO)).revision == "r2"

    run(work())


def test_without_a_store_everything_is_asked_and_the_whole_of_it() -> None:
    async def work() -> None:
        inner = PieceGuard()
        cached = CachedGuard(inner, None)
        for _ in range(2):
            await cached.moderate(question(HELLO))
        cached.settled(record(HELLO, [model("hi")], []))
        assert [asked.conversation for asked in inner.asked] == [HELLO, HELLO]

    run(work())


# -- one question at a time --


def test_the_same_content_at_the_same_time_is_one_question() -> None:
    async def work() -> None:
        bench = Bench(PieceGuard(pause=0.05))
        verdicts = await asyncio.gather(*(bench.verdict(HELLO) for _ in range(20)))
        assert len(bench.inner.asked) == 1
        assert sorted(v.cached for v in verdicts) == [False] + [True] * 19
        assert sum(v.usage.prompt for v in verdicts) == 10
        assert bench.events == {"miss": 1, "coalesced": 19}

    run(work())


def test_different_content_at_the_same_time_is_not_mixed() -> None:
    async def work() -> None:
        bench = Bench(PieceGuard(pause=0.02))
        talks = [Conversation((user(text),)) for text in ("a", "{pickalock}", "b", "{pickalock}!")] * 5
        verdicts = await asyncio.gather(*map(bench.verdict, talks))
        assert [v.request for v in verdicts] == ["unharmful", "harmful"] * 10
        assert len(bench.inner.asked) == 4

    run(work())


def test_one_who_goes_away_does_not_take_the_question_along_and_the_last_one_does() -> None:
    async def work() -> None:
        bench = Bench(PieceGuard(pause=0.1))
        first, second = (asyncio.create_task(bench.verdict(HELLO)) for _ in range(2))
        await asyncio.sleep(0.02)
        first.cancel()
        assert (await second).request == "unharmful"
        assert (bench.inner.cancelled, len(bench.inner.asked)) == (0, 1)

        bench.inner.pause = 10
        others = [asyncio.create_task(bench.verdict(Conversation((user("x"),)))) for _ in range(2)]
        await asyncio.sleep(0.02)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)
        assert bench.inner.cancelled == 1

    run(work())


def test_whoever_comes_after_the_last_one_left_asks_anew() -> None:
    async def work() -> None:
        bench = Bench(PieceGuard(pause=10))
        leaver = asyncio.create_task(bench.verdict(HELLO))
        await asyncio.sleep(0.02)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        bench.inner.pause = 0
        assert (await bench.verdict(HELLO)).request == "unharmful"

    run(work())


def test_each_keeps_its_own_deadline() -> None:
    async def work() -> None:
        bench = Bench(PieceGuard(pause=0.5))
        loop = asyncio.get_running_loop()
        patient = asyncio.create_task(bench.cached.moderate(question(HELLO, deadline=5)))
        await asyncio.sleep(0.01)
        began = loop.time()
        hurried = await bench.cached.moderate(question(HELLO, deadline=0.1))
        assert isinstance(hurried, GuardError)
        assert hurried.kind is GuardErrorKind.TIMEOUT
        assert loop.time() - began < 0.3
        assert isinstance(await patient, Verdict)
        assert len(bench.inner.asked) == 1

    run(work())


def test_a_patient_one_does_not_suffer_from_the_short_deadline_of_the_one_before() -> None:
    async def work() -> None:
        bench = Bench(PieceGuard(pause=0.3))
        hurried = asyncio.create_task(bench.cached.moderate(question(HELLO, deadline=0.1)))
        await asyncio.sleep(0.01)
        patient = await bench.cached.moderate(question(HELLO, deadline=5))
        assert isinstance(await hurried, GuardError)
        assert isinstance(patient, Verdict)
        assert len(bench.inner.asked) == 2

    run(work())


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_that_is_none_is_a_timeout_without_a_question(deadline: float) -> None:
    async def work() -> None:
        bench = Bench()
        outcome = await bench.cached.moderate(question(HELLO, deadline=deadline))
        assert isinstance(outcome, GuardError)
        assert not bench.inner.asked

    run(work())


def test_closing_ends_open_questions_without_a_verdict() -> None:
    async def work() -> None:
        bench = Bench(PieceGuard(pause=10))
        waiting = asyncio.create_task(bench.cached.moderate(question(HELLO)))
        await asyncio.sleep(0.01)
        await bench.cached.aclose()
        outcome = await waiting
        assert isinstance(outcome, GuardError)
        assert outcome.kind is GuardErrorKind.UNAVAILABLE

    run(work())


def test_a_defect_of_the_guard_reaches_whoever_asked_and_is_not_kept() -> None:
    class Broken(PieceGuard):
        async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
            self.asked.append(request)
            raise RuntimeError("a defect")

    async def work() -> None:
        bench = Bench(Broken())
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a defect"):
                await bench.verdict(HELLO)
        assert len(bench.inner.asked) == 2

    run(work())
