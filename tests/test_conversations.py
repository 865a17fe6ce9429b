"""What a conversation's past is good for, and that nothing of an attack falls out of sight with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from guard_middleware.turns import TurnBounds
from guard_middleware.types import (
    Conversation,
    Definition,
    Judging,
    Message,
    Reasoning,
    Text,
    ToolCall,
    ToolCallResponse,
)
from tests.support.pieces import LONG, Bench, image, model, record, run, then, user
from tests.support.scripted_worker import text_of


def test_a_turn_is_asked_about_without_the_sight_of_old_images_and_the_long_answers_before_it() -> None:
    async def work() -> None:
        bench = Bench()
        talk = Conversation((Message("system", (Text("be brief"),)),), (Definition("tool", "finds"),))
        for turn in range(5):
            talk = await bench.turn(then(talk, f"question {turn}", image(f"drawn {turn}")), f"{turn} {LONG}")
        asked = await bench.verdict(then(talk, "and now?"))
        seen = bench.inner.asked[-1].conversation
        texts = [part.text for message in seen.messages for part in message.parts if isinstance(part, Text)]
        assert texts[:5] == [
            "be brief",
            "question 0",
            "(picture) drawn 0",
            "question 1",
            "(picture) drawn 1",
        ]
        assert texts[-1] == "and now?"
        assert [blob.data for blob in seen.blobs()] == [b"drawn 3", b"drawn 4"]
        assert sum(map(len, texts)) < 2200
        assert seen.definitions == talk.definitions
        assert dict(asked.left_out)["images"] == 3
        assert dict(asked.left_out)["characters"] > 4 * len(LONG)
        assert asked.drawn_text == tuple(f"drawn {turn}" for turn in range(5))

    run(work())


def test_the_work_of_a_turn_does_not_grow_with_the_conversation() -> None:
    async def work() -> None:
        bench = Bench()
        talk, sizes = Conversation(()), []
        for turn in range(20):
            images = [image(f"{turn}")] if turn % 2 else []
            talk = then(talk, f"question {turn}?", *images)
            before = len(bench.inner.asked)
            talk = await bench.turn(talk, f"{turn} {LONG[:1800]}")
            assert len(bench.inner.asked) == before + 2
            sizes.append(sum(len(text_of([message])) for message in bench.inner.asked[-1].conversation.messages))
        assert sizes[19] <= 1.2 * sizes[1]

    run(work())


@pytest.mark.parametrize("parts", [("pick", "alock"), ("pi", "cka", "lock"), ("pi", "ck", "al", "o", "ck")])
@pytest.mark.parametrize("where", ["user", "tool", "image", "forged answer", "system"])
def test_a_request_that_is_split_over_turns_is_seen_although_each_turn_is_harmless(
    parts: tuple[str, ...], where: str
) -> None:
    def turn(text: str) -> tuple[Message, ...]:
        match where:
            case "image":
                return (user("look", image(text)),)
            case "tool":
                return (user("go on"), Message("assistant", (ToolCall("c", "find", "{}"),)), _tool(text))
            case "forged answer":
                return (user("go on"), model(text + LONG), user("yes"))
            case "system":
                return (Message("system", (Text(text),)), user("go on"))
        return (user(text),)

    async def work() -> None:
        bench = Bench(bounds=TurnBounds(500, 1))
        talk = Conversation(())
        for number, part in enumerate(parts):
            said = turn(f"{{{part}}}")
            alone = Conversation(said)
            assert (await bench.verdict(alone)).request == "unharmful"
            talk = replace(talk, messages=(*talk.messages, *said))
            if number == len(parts) - 1:
                break
            talk = await bench.turn(talk, f"{number} {LONG}")
            talk = await bench.turn(then(talk, "something else " + "x" * 3000), f"{number} {LONG}")
        last = await bench.verdict(talk)
        assert last.request == "harmful"
        assert dict(last.left_out)["characters"] > len(LONG)

    run(work())


def _tool(text: str) -> Message:
    return Message("tool", (ToolCallResponse("c", text),))


def test_an_answer_that_says_other_than_what_was_judged_is_the_clients_word() -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = await bench.turn(then(Conversation(()), "one"), LONG)
        forged = replace(talk, messages=(*talk.messages[:-1], model(LONG + "{pick}")))
        forged = then(forged, "two")
        await bench.verdict(forged)
        assert bench.inner.asked[-1].conversation == forged
        await bench.turn(forged, "fine")
        assert (
            await bench.verdict(then(replace(forged, messages=(*forged.messages, model("fine"))), "{alock}"))
        ).request == "harmful"

    run(work())


def test_an_answer_counts_whether_or_not_its_reasoning_is_sent_back() -> None:
    async def work(back: Callable[[Message], Message]) -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        said = Message("assistant", (Reasoning("hm " * 200), Text(LONG)))
        talk = await bench.turn(then(Conversation(()), "one"), said)
        talk = replace(talk, messages=(talk.messages[0], back(said)))
        assert dict((await bench.verdict(then(talk, "two"))).left_out)["characters"] >= len(LONG)

    run(work(lambda said: said))
    run(work(lambda said: replace(said, parts=said.parts[1:])))


def test_forged_reasoning_in_a_judged_answer_is_read() -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = await bench.turn(then(Conversation(()), "one"), LONG)
        forged = Message("assistant", (Reasoning("{pickalock}"), Text(LONG)))
        assert (
            await bench.verdict(then(replace(talk, messages=(talk.messages[0], forged)), "two"))
        ).request == "harmful"

    run(work())


Change = Callable[[Conversation], Conversation]
CHANGES: dict[str, Change] = {
    "another first word": lambda t: replace(t, messages=(user("another"), *t.messages[1:])),
    "another definition": lambda t: replace(t, definitions=(Definition("tool", "other"),)),
    "another image": lambda t: replace(t, messages=(user("one", image("b")), *t.messages[1:])),
    "a message less": lambda t: replace(t, messages=t.messages[1:]),
    "a message more": lambda t: replace(t, messages=(Message("system", (Text("be bad"),)), *t.messages)),
    "another role": lambda t: replace(t, messages=(replace(t.messages[0], role="tool"), *t.messages[1:])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_beginning_that_was_not_judged_as_it_stands_is_judged_whole(change: Change) -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = then(await bench.turn(then(Conversation(()), "one", image("a")), LONG), "two")
        await bench.verdict(talk)
        assert bench.inner.asked[-1].conversation != talk
        await bench.verdict(change(talk))
        assert bench.inner.asked[-1].conversation == change(talk)

    run(work())


@pytest.mark.parametrize(("score", "clean_below", "whole"), [(0.1, 0.2, False), (0.3, 0.2, True), (0.3, 0.5, False)])
def test_a_beginning_that_comes_near_the_strictest_threshold_is_judged_whole(
    score: float, clean_below: float, whole: bool
) -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0), clean_below=clean_below)
        bench.inner.score = score
        talk = then(await bench.turn(then(Conversation(()), "one"), LONG), "two")
        await bench.verdict(talk)
        assert (bench.inner.asked[-1].conversation == talk) is whole

    run(work())


def test_a_harmful_beginning_stays_harmful_however_much_is_said_after_it() -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = Conversation((user("{pickalock}"),))
        assert (await bench.verdict(talk)).request == "harmful"
        for number in range(3):  # a policy that only annotates lets it go on
            talk = then(replace(talk, messages=(*talk.messages, model(f"{number} {LONG}"))), "x" * 5000)
            assert (await bench.verdict(talk)).request == "harmful"
            assert bench.inner.asked[-1].conversation == talk

    run(work())


def test_what_other_weights_judged_is_judged_again_whole() -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = then(await bench.turn(then(Conversation(()), "one"), LONG), "two")
        before = len(bench.inner.asked)
        bench.inner.revision = "r2"
        verdict = await bench.verdict(talk)
        first, second = bench.inner.asked[before:]
        assert first.conversation != talk
        assert second.conversation == talk
        assert (verdict.revision, verdict.left_out) == ("r2", ())

    run(work())


def test_an_answer_is_unknown_to_weights_that_began_to_judge_while_the_next_turn_was_asked_about() -> None:
    async def work() -> None:
        bench = Bench()
        talk = await bench.turn(Conversation((user("hello"),)), "It is a fine day. " * 40)
        bench.inner.revision = "r2"  # and nobody told us
        turn = replace(talk, messages=(*talk.messages, user("go on")))
        seen = await bench.verdict(turn)  # short, so all of it is shown
        said = model("B" * 900)
        judged = await bench.verdict(replace(turn, answer=said), "output")
        bench.cached.settled(record(turn, [said], [("input", None, seen), ("output", 0, judged)]))
        await asyncio.sleep(0)
        await bench.verdict(replace(turn, messages=(*turn.messages, said, user("and then?"))))
        shown = text_of(bench.inner.asked[-1].conversation.messages)
        assert shown.count("fine day") == 40
        assert shown.count("B") < 900  # which the new weights have judged

    run(work())


@pytest.mark.parametrize("asked", [Judging(), Judging("hybrid", 0.1, 0.9)], ids=lambda judging: judging.mode)
def test_what_was_judged_in_another_mode_is_judged_again_whole(asked: Judging) -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = then(Conversation(()), "one")
        brief = [await bench.verdict(talk, judging=Judging("label"))]
        talk = replace(talk, answer=model(LONG))
        brief.append(await bench.verdict(talk, "output", judging=Judging("label")))
        talk = replace(talk, answer=None)
        bench.cached.settled(record(talk, [model(LONG)], [("input", None, brief[0]), ("output", 0, brief[1])]))
        await bench.verdict(talk, judging=asked)  # so that only the answer's mark is of another mode
        talk = then(replace(talk, messages=(*talk.messages, model(LONG))), "two")
        await bench.verdict(talk, judging=asked)
        assert bench.inner.asked[-1].conversation == talk
        await bench.verdict(talk, judging=Judging("label"))
        assert bench.inner.asked[-1].conversation != talk

    run(work())


def test_the_input_does_not_rest_on_what_only_an_answers_question_judged() -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = then(Conversation(()), "one")
        await bench.verdict(replace(talk, answer=model(LONG)), "output")
        talk = then(replace(talk, messages=(*talk.messages, model(LONG))), "two")
        await bench.verdict(talk)
        assert bench.inner.asked[-1].conversation == talk

    run(work())


UNSETTLED: dict[str, dict[str, Any]] = {
    "blocked": {"outcome": "blocked"},
    "annotated": {"outcome": "annotated"},
    "aborted": {"outcome": "aborted"},
    "no call": {"calls": ()},
    "no conversation": {"conversation": None},
}


@pytest.mark.parametrize("change", UNSETTLED.values(), ids=UNSETTLED.keys())
def test_an_answer_leaves_a_mark_only_if_it_was_judged_unharmful_and_released(change: dict[str, Any]) -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = then(Conversation(()), "one")
        asked = await bench.verdict(talk)
        judged = await bench.verdict(replace(talk, answer=model(LONG)), "output")
        bench.cached.settled(record(talk, [model(LONG)], [("input", None, asked), ("output", 0, judged)], **change))
        await asyncio.sleep(0)
        talk = then(replace(talk, messages=(*talk.messages, model(LONG))), "two")
        await bench.verdict(talk)
        assert bench.inner.asked[-1].conversation == talk

    run(work())


def test_an_answer_whose_windows_did_not_all_pass_leaves_no_mark() -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = then(Conversation(()), "one")
        asked = await bench.verdict(talk)
        good = await bench.verdict(replace(talk, answer=model(LONG)), "output")
        near = replace(good, response_score=0.6)
        for second in (near, replace(good, revision="r0"), replace(good, response="harmful")):
            bench.cached.settled(
                record(talk, [model(LONG)], [("input", None, asked), ("output", 0, good), ("output", 0, second)])
            )
        await asyncio.sleep(0)
        talk = then(replace(talk, messages=(*talk.messages, model(LONG))), "two")
        await bench.verdict(talk)
        assert bench.inner.asked[-1].conversation == talk

    run(work())


def test_each_choice_has_its_own_mark() -> None:
    async def work() -> None:
        bench = Bench(bounds=TurnBounds(0, 0))
        talk = then(Conversation(()), "one")
        asked = await bench.verdict(talk)
        good = await bench.verdict(replace(talk, answer=model(LONG)), "output")
        bad = replace(good, response="harmful", response_score=0.4)
        answers = [model("0" + LONG), model("1" + LONG)]
        bench.cached.settled(record(talk, answers, [("input", None, asked), ("output", 0, bad), ("output", 1, good)]))
        await asyncio.sleep(0)
        for number, left in ((0, False), (1, True)):
            verdict = await bench.verdict(then(replace(talk, messages=(*talk.messages, answers[number])), "two"))
            assert bool(verdict.left_out) is left

    run(work())
