"""Streamed Responses answers: gathered whole, whatever way they are cut, and released only as what was read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware import enforce
from guard_middleware.config import StreamRules
from guard_middleware.dialects import responses_fields as table
from guard_middleware.dialects.base import Options, ParsedRequest, Ruling
from guard_middleware.dialects.responses_request import parse_request
from guard_middleware.dialects.responses_response import parse_response
from guard_middleware.dialects.responses_stream import ResponseStreamParser
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.holdback import HoldBack
from guard_middleware.limits import Limits
from guard_middleware.sse import Decoder, Event
from guard_middleware.types import Action, Message, Reasoning, Text, ToolCall
from tests.dialects.test_responses_response import (
    CITATION,
    COMPUTER,
    CUSTOM,
    FILE,
    MARK,
    USAGE,
    answer,
    call,
    part,
    say,
    think,
)
from tests.support.responses import encoded, events, streamed
from tests.support.sdk import notice, ruling
from tests.support.streams import Finished, finished


def asked(**fields: Any) -> ParsedRequest:
    return parse_request({"model": "m", "input": "hi", "stream": True, **fields}, Limits(), Options())


def parser(**options: Any) -> ResponseStreamParser:
    return ResponseStreamParser(asked(), Options(**options))


def read(told: Iterable[dict[str, Any] | str], **options: Any) -> Finished:
    return finished(parser(**options), events(told))


def frames(data: bytes) -> list[dict[str, Any]]:
    """The events as they were sent: named by their type, and numbered from 0 on."""
    told = Decoder().feed(data)
    values = [json.loads(event.data) for event in told]
    assert [event.event for event in told] == [value["type"] for value in values]
    assert [value.pop("sequence_number") for value in values] == list(range(len(values)))
    return values


def plain(told: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a stream of ``streamed`` should be on release."""
    dropped = ("sequence_number", "obfuscation")
    return [{name: value for name, value in event.items() if name not in dropped} for event in told]


FULL = answer(
    think("sum", "deep thoughts"),
    say(part("Bread needs an hour."), part("And salt.", annotations=[CITATION])),
    say({"type": "refusal", "refusal": "No more."}, id="msg_2"),
    call('{"a": "b"}'),
    CUSTOM,
    COMPUTER,
)


def test_an_allowed_stream_is_released_event_by_event() -> None:
    told = streamed(FULL)
    parsed = read(told)
    assert parsed.parser.answer_id == "resp_1"
    assert frames(parsed.render(ruling(Action.ALLOW))) == plain(told)


def test_a_stream_is_judged_as_the_same_answer_in_one_piece() -> None:
    whole = parse_response(FULL, asked(), Options())
    assert read(streamed(FULL)).answers == whole.answers
    assert read(streamed(FULL, pieces=1)).answers == whole.answers


@pytest.mark.parametrize("at", range(1, len(MARK)))
@pytest.mark.parametrize("kind", ["output_text", "refusal", "reasoning_text", "summary_text"])
def test_text_cut_anywhere_is_judged_whole(kind: str, at: int) -> None:
    item = {
        "output_text": say(part(MARK)),
        "refusal": say({"type": "refusal", "refusal": MARK}),
        "reasoning_text": think("", MARK),
        "summary_text": think(MARK),
    }[kind]
    parsed = read(streamed(answer(item), pieces=at))
    assert parsed.answers[0].message == Message(
        "assistant", ((Reasoning if kind in ("reasoning_text", "summary_text") else Text)(MARK),)
    )
    said = "".join(said.text for frame in parsed.frames for said in frame.said)
    assert said == MARK
    surfaces = {said.surface for frame in parsed.frames for said in frame.said}
    assert len(surfaces) == 1
    deltas = [frame["delta"] for frame in frames(parsed.render(ruling(Action.BLOCK))) if "delta" in frame]
    assert deltas == [notice("output", Action.BLOCK).message]


def test_calls_wait_for_the_last_verdict_and_text_does_not() -> None:
    parsed = read(streamed(answer(say(), call("{}"), CUSTOM, COMPUTER)))
    waits = {frame.value["type"]: frame.whole for frame in parsed.frames if frame.value.get("output_index") != 0}
    assert {kind for kind, whole in waits.items() if not whole} == {"response.created", "response.in_progress"}
    assert not any(frame.whole for frame in parsed.frames if frame.value.get("output_index") == 0)


def test_citations_wait_for_the_last_verdict() -> None:
    parsed = read(streamed(answer(say(part("a", annotations=[CITATION])))))
    assert [frame.value["type"] for frame in parsed.frames if frame.whole] == ["response.output_text.annotation.added"]
    assert parsed.answers[0].message.parts == (Text("a"), Text(MARK), Text("https://x.example"))


@pytest.mark.parametrize("annotations", [{"annotations": None}, {}])
def test_a_part_that_begins_without_citations_may_get_some(annotations: dict[str, Any]) -> None:
    told = streamed(answer(say(part("a", annotations=[CITATION]))))
    (opened,) = (event for event in told if event["type"] == "response.content_part.added")
    opened["part"] = {"type": "output_text", "text": "", **annotations}
    assert frames(read(told).render(ruling(Action.ALLOW))) == plain(told)
    stream = parser()
    held = [frame for event in events(told[:-3]) for frame in stream.feed(event)]
    data = b"".join(stream.release(frame) for frame in held) + stream.cut(0, notice("output", Action.BLOCK), False)
    closed, _ = (event["part"] for event in frames(data) if event["type"] == "response.content_part.done")
    assert closed["annotations"] == [CITATION]


def test_window_by_window_the_same_stream_leaves() -> None:
    told = streamed(answer(think("", "abcdefgh" * 8), say(part("ijklmnop" * 8))), pieces=1)
    stream = parser()
    hold = HoldBack(stream, StreamRules(mode="window", first_window=16, overlap=4))
    out = b""
    shown_early = 0
    for event in events(told):
        hold.feed(stream.feed(event))
        for window in list(hold.due()):
            hold.cleared(window)
        out += hold.release()
        shown_early = max(shown_early, out.count(b".delta"))
    stream.finish()
    assert shown_early > 60
    out += b"".join(hold.finish()) + stream.close(ruling(Action.ALLOW))
    assert frames(out) == plain(told)


def test_usage_and_the_end_wait_for_close() -> None:
    parsed = read(streamed(answer()))
    assert not any("completed" in frame.value["type"] for frame in parsed.frames)
    last = frames(parsed.render(ruling(Action.ANNOTATE)))[-1]
    assert (last["type"], last["response"]["usage"]) == ("response.completed", USAGE)
    assert last["response"]["moderation"]["output"]["type"] == "moderation_result"


def test_an_incomplete_answer_ends_as_one() -> None:
    body = answer(say(status="incomplete"), status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    parsed = read(streamed(body))
    assert parsed.answers[0].finish_reason == "max_output_tokens"
    assert frames(parsed.render(ruling(Action.ALLOW)))[-1] == {"type": "response.incomplete", "response": body}


def test_a_blocked_stream_that_showed_nothing_is_a_refusal() -> None:
    out = frames(read(streamed(FULL)).render(ruling(Action.BLOCK)))
    assert [frame["type"] for frame in out] == [
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        "response.refusal.delta",
        "response.refusal.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    last = out[-1]["response"]
    assert last["incomplete_details"] == {"reason": "content_filter"}
    assert last["usage"] == USAGE
    assert last["output"] == [out[-2]["item"]]
    assert MARK not in json.dumps(out)


SPOKEN = answer(
    think("sum", "deep thoughts"), say(part("Bread needs an hour."), part("And salt.")), say(part("x"), id="m2")
)
TOLD = streamed(SPOKEN)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("released", range(len(TOLD)))
def test_a_stream_cut_anywhere_agrees_with_itself(released: int, soft: bool) -> None:
    """What is closed is what was shown, and a second gateway reads the result as a whole answer."""
    stream = parser()
    held = [frame for event in events(TOLD[:-1]) for frame in stream.feed(event)]
    data = b"".join(stream.release(frame) for frame in held[:released])
    data += stream.cut(0, notice("output", Action.BLOCK), soft) + stream.close(ruling(Action.BLOCK))
    out = frames(data)
    assert out[-1]["type"] == ("response.completed" if soft else "response.incomplete")
    shown = "".join(event["delta"] for event in TOLD[:released] if event["type"].endswith(".delta"))
    again = finished(parser(), Decoder().feed(data))
    (whole,) = again.answers
    public = notice("output", Action.BLOCK).message
    texts = [part.text for part in whole.message.parts if isinstance(part, Text | Reasoning)]
    assert texts.count(public) == 1
    assert sorted("".join(text for text in texts if text != public)) == sorted(shown)
    assert whole.finish_reason == ("completed" if soft else "content_filter")


def test_a_cut_repeats_nothing_that_was_not_shown() -> None:
    stream = parser()
    held = [frame for event in events(streamed(FULL)) for frame in stream.feed(event)]
    stream.finish()
    data = b"".join(stream.release(frame) for frame in held[:5])
    data += stream.cut(0, notice("output", Action.BLOCK), False) + stream.close(ruling(Action.BLOCK))
    assert b"Bread" not in data
    assert b'"f"' not in data


def test_an_error_after_the_head_is_one_that_clients_raise() -> None:
    (event,) = Decoder().feed(parser().fail(enforce.blocked_prompt(notice("input", Action.BLOCK))))
    value = json.loads(event.data)
    assert event.event == value["type"] == "error"
    assert value["code"] == value["error"]["code"] == "content_filter"
    assert value["sequence_number"] == 0


# -- what cannot be screened --


def changed(told: list[dict[str, Any]], number: int, **fields: Any) -> list[dict[str, Any]]:
    copy = json.loads(json.dumps(told))
    copy[number] |= fields
    return list(copy)


def at(kind: str, which: int = 0) -> int:
    return [number for number, event in enumerate(FULL_TOLD) if event["type"] == kind][which]


FULL_TOLD = streamed(FULL)
END = len(FULL_TOLD) - 1
OTHER: dict[str, tuple[str, Any]] = {
    "text done": ("response.output_text.done", {"text": MARK}),
    "refusal done": ("response.refusal.done", {"refusal": MARK}),
    "reasoning done": ("response.reasoning_text.done", {"text": MARK}),
    "summary done": ("response.reasoning_summary_text.done", {"text": MARK}),
    "part done": ("response.content_part.done", {"part": {"type": "reasoning_text", "text": MARK}}),
    "summary part done": ("response.reasoning_summary_part.done", {"part": {"type": "summary_text", "text": MARK}}),
    "arguments done": ("response.function_call_arguments.done", {"arguments": MARK}),
    "arguments done by another name": ("response.function_call_arguments.done", {"name": MARK}),
    "input done": ("response.custom_tool_call_input.done", {"input": MARK}),
    "item done": ("response.output_item.done", {"item": think("sum", MARK)}),
    "item of another type": ("response.output_item.done", {"item": say(part(MARK))}),
    "output": ("response.completed", {"response": answer(say(part(MARK)))}),
    "one item more": ("response.completed", {"response": {**FULL, "output": [*FULL["output"], say(part(MARK))]}}),
    "another call": (
        "response.completed",
        {"response": {**FULL, "output": [*FULL["output"][:3], call(MARK), *FULL["output"][4:]]}},
    ),
    "a citation more": (
        "response.completed",
        {
            "response": {
                **FULL,
                "output": [
                    FULL["output"][0],
                    say(
                        part("Bread needs an hour.", annotations=[CITATION]), part("And salt.", annotations=[CITATION])
                    ),
                    *FULL["output"][2:],
                ],
            }
        },
    ),
    "other actions": (
        "response.completed",
        {"response": {**FULL, "output": [*FULL["output"][:5], {**COMPUTER, "action": {"type": "wait"}}]}},
    ),
    "another id in progress": ("response.in_progress", {"response": {**FULL, "id": "resp_2", "output": []}}),
    "another id": ("response.completed", {"response": {**FULL, "id": "resp_2"}}),
    "another status": ("response.completed", {"response": {**FULL, "status": "incomplete"}}),
    "output at the start": ("response.created", {"response": {**FULL, "status": "in_progress"}}),
    "content at the start of an item": ("response.output_item.added", {"item": think("", MARK)}),
    "an index twice": ("response.output_item.added", {"output_index": 300}),
    "a part out of order": ("response.content_part.added", {"content_index": 1}),
    "a delta without a part": ("response.output_text.delta", {"content_index": 7}),
    "a delta without an item": ("response.output_text.delta", {"output_index": 7}),
    "no citation of the part": ("response.output_text.annotation.added", {"content_index": 7}),
    "a delta for another type": ("response.output_text.delta", {"output_index": 0}),
    "a delta that is no text": ("response.output_text.delta", {"delta": [MARK]}),
    "a name that is prose": ("response.output_text.delta", {"item_id": MARK}),
}


@pytest.mark.parametrize(("kind", "fields"), OTHER.values(), ids=list(OTHER))
def test_what_is_repeated_otherwise_breaks_the_stream(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError) as caught:
        read(changed(FULL_TOLD, at(kind), **fields))
    assert caught.value.kind is UpstreamErrorKind.MALFORMED, caught.value
    assert MARK not in str(caught.value)


def without(kind: str, which: int = 0) -> list[dict[str, Any]]:
    number = at(kind, which)
    return FULL_TOLD[:number] + FULL_TOLD[number + 1 :]


def but(number: int, event: dict[str, Any]) -> list[dict[str, Any]]:
    return [*FULL_TOLD[:number], event, *FULL_TOLD[number:]]


DELTA = FULL_TOLD[at("response.output_text.delta")]
BROKEN: dict[str, tuple[UpstreamErrorKind, list[Any]]] = {
    "no created": (UpstreamErrorKind.MALFORMED, without("response.created")),
    "created twice": (UpstreamErrorKind.MALFORMED, but(1, FULL_TOLD[0])),
    "no item": (UpstreamErrorKind.MALFORMED, without("response.output_item.added", 1)),
    "no part": (UpstreamErrorKind.MALFORMED, without("response.content_part.added", 1)),
    "a delta lost": (UpstreamErrorKind.MALFORMED, without("response.output_text.delta", 1)),
    "an item not closed": (UpstreamErrorKind.MALFORMED, without("response.output_item.done")),
    "a delta after its end": (UpstreamErrorKind.MALFORMED, but(at("response.output_text.done") + 1, DELTA)),
    "a delta after its item": (UpstreamErrorKind.MALFORMED, but(END, DELTA)),
    "data after the end": (UpstreamErrorKind.MALFORMED, [*FULL_TOLD, DELTA]),
    "not json": (UpstreamErrorKind.MALFORMED, [*FULL_TOLD[:4], "not json"]),
    "no object": (UpstreamErrorKind.MALFORMED, ["[]"]),
    "no type": (UpstreamErrorKind.MALFORMED, [{"response": FULL}]),
    "cut off": (UpstreamErrorKind.RESET, FULL_TOLD[:-1]),
    "nothing": (UpstreamErrorKind.RESET, []),
    "failed": (
        UpstreamErrorKind.RESET,
        [*FULL_TOLD[:4], {"type": "response.failed", "response": {**FULL, "error": {"message": MARK}}}],
    ),
    "error": (UpstreamErrorKind.RESET, [*FULL_TOLD[:4], {"type": "error", "code": "x", "message": MARK}]),
    "error object": (UpstreamErrorKind.RESET, [*FULL_TOLD[:4], {"error": {"message": MARK}}]),
    "done instead of an end": (UpstreamErrorKind.MALFORMED, [*FULL_TOLD[:4], "[DONE]"]),
    **{
        kind: (UpstreamErrorKind.UNSUPPORTED, but(5, {"type": kind, "output_index": 0, "item_id": "x", "delta": MARK}))
        for kind, rules in table.EVENTS.items()
        if rules is None
    },
    "an unknown event": (UpstreamErrorKind.UNSUPPORTED, but(5, {"type": "response.x_new", "delta": MARK})),
    "guard's own event": (UpstreamErrorKind.UNSUPPORTED, but(5, {"type": "guard.verdict"})),
    "an unknown field": (UpstreamErrorKind.UNSUPPORTED, but(5, {**DELTA, "x_new": MARK})),
    "an unknown field of the response": (
        UpstreamErrorKind.UNSUPPORTED,
        changed(FULL_TOLD, END, response={**FULL, "x": MARK}),
    ),
    "an item of the upstream's own tools": (
        UpstreamErrorKind.UNSUPPORTED,
        but(2, {"type": "response.output_item.added", "output_index": 0, "item": {"type": "mcp_call", "id": "x"}}),
    ),
    "a part of another kind": (
        UpstreamErrorKind.UNSUPPORTED,
        changed(FULL_TOLD, at("response.content_part.added", 1), part={"type": "output_audio", "transcript": MARK}),
    ),
}


@pytest.mark.parametrize(("kind", "told"), BROKEN.values(), ids=list(BROKEN))
def test_a_stream_that_cannot_be_screened_is_refused_and_not_quoted(kind: UpstreamErrorKind, told: list[Any]) -> None:
    with pytest.raises(UpstreamError) as caught:
        read(told)
    assert caught.value.kind is kind, caught.value
    assert MARK not in str(caught.value)


def test_an_event_that_is_named_otherwise_is_refused() -> None:
    with pytest.raises(UpstreamError):
        parser().feed(Event("response.completed", json.dumps(FULL_TOLD[0])))


@pytest.mark.parametrize("name", ["", "message"])
def test_events_without_a_name_and_a_final_done_are_what_some_servers_send(name: str) -> None:
    told = [Event(name, json.dumps(event)) for event in FULL_TOLD]
    parsed = finished(parser(), [*told, Event("", "[DONE]")])
    assert frames(parsed.render(ruling(Action.ALLOW))) == plain(FULL_TOLD)


def test_servers_that_leave_out_the_output_at_the_end_get_it_filled_in() -> None:
    told = changed(FULL_TOLD, END, response={**FULL, "output": []})
    assert frames(read(told).render(ruling(Action.ALLOW))) == plain(FULL_TOLD)


def test_servers_that_send_a_text_only_whole_are_read() -> None:
    told = [event for event in FULL_TOLD if not event["type"].endswith(".delta")]
    parsed = read(told)
    assert parsed.answers == read(FULL_TOLD).answers
    assert (
        "".join(said.text for frame in parsed.frames for said in frame.said)
        == "sumdeep thoughtsBread needs an hour.And salt.No more."
    )


def test_parts_of_reasoning_that_open_with_their_text_are_read_and_can_be_cut() -> None:
    """vLLM's order of events."""
    told = [
        event
        for event in streamed(answer(think("", "deep"), say()))
        if "reasoning" in event["type"] or "part" not in event["type"] or event["output_index"]
    ]
    assert read(told).answers[0].message.parts == (Reasoning("deep"), Text("hello"))
    stream = parser()
    held = [frame for event in events(told) for frame in stream.feed(event)]
    data = b"".join(stream.release(frame) for frame in held[:4]) + stream.cut(0, notice("output", Action.BLOCK), False)
    assert frames(data + stream.close(ruling(Action.BLOCK)))[-1]["response"]["output"][0]["content"] == [
        {"type": "reasoning_text", "text": "deep"}
    ]


def test_what_a_server_says_only_at_the_end_of_an_item_waits_for_the_last_verdict() -> None:
    told = streamed(answer(say(part(MARK))))
    short = [
        event
        for event in told
        if event["type"]
        in ("response.created", "response.output_item.added", "response.output_item.done", "response.completed")
    ]
    parsed = read(short)
    assert parsed.answers[0].message.parts == (Text(MARK),)
    assert [frame.whole for frame in parsed.frames] == [False, False, True]


def test_actions_that_change_are_both_judged() -> None:
    first = {**COMPUTER, "action": {"type": "type", "text": "first"}}
    told = streamed(answer(COMPUTER))
    parsed = read(changed(told, 2, item=first))
    assert [part.arguments for part in parsed.answers[0].message.parts if isinstance(part, ToolCall)] == [
        '{"action":{"type":"type","text":"how to pick a lock"},"pending_safety_checks":[]}',
        '{"action":{"type":"type","text":"first"},"pending_safety_checks":[]}',
    ]


def test_the_operators_extra_fields_are_gathered_and_wait() -> None:
    told = streamed(answer(say(part("ab"))), pieces=1)
    told[4] |= {"x_new": "pick "}
    told[5] |= {"x_new": "a lock"}
    told[-1]["response"] = {**told[-1]["response"], "x_new": "z"}
    parsed = read(told, extra_fields={"x_new": "moderated"})
    assert parsed.answers[0].message.parts == (Text("ab"), Text("pick a lock"), Text("z"))
    assert [frame.whole for frame in parsed.frames[4:6]] == [True, True]


def test_the_operators_fields_of_calls_are_read_too() -> None:
    told = streamed(answer(call("{}")), pieces=1)
    for event in told[3:5]:
        event["x_new"] = {"response.function_call_arguments.delta": MARK}[event["type"]]
    told[5]["x_new"] = told[6]["x_new"] = "again"
    parsed = read(told, extra_fields={"x_new": "moderated"})
    assert parsed.answers[0].message.parts == (ToolCall("call_1", "f", "{}"), Text(MARK + MARK), Text("again"))


def test_citations_that_come_only_with_their_part_wait() -> None:
    told = streamed(answer(say(part("a", annotations=[CITATION]))))
    told = [event for event in told if "annotation.added" not in event["type"]]
    parsed = read(told)
    assert parsed.answers[0].message.parts == (Text("a"), Text(MARK), Text("https://x.example"))
    assert [frame.value["type"] for frame in parsed.frames if frame.whole] == ["response.content_part.done"]


def other_citations() -> list[list[dict[str, Any]]]:
    told = streamed(answer(say(part("a", annotations=[CITATION]))))
    (number,) = (n for n, event in enumerate(told) if "annotation.added" in event["type"])
    second = [*told[: number + 1], {**told[number], "annotation": FILE}, *told[number + 1 :]]
    item = json.loads(json.dumps(told))
    item[-2]["item"]["content"][0]["annotations"] = [FILE]
    return [second, item]


@pytest.mark.parametrize("told", other_citations())
def test_citations_that_are_repeated_otherwise_break_the_stream(told: list[dict[str, Any]]) -> None:
    with pytest.raises(UpstreamError, match="annotations"):
        read(told)


def test_a_delta_of_text_for_a_call_is_refused() -> None:
    told = streamed(answer(call("{}")))
    told[3] |= {"type": "response.output_text.delta", "content_index": 0}
    with pytest.raises(UpstreamError, match="another type"):
        read(told)


@pytest.mark.parametrize("where", ["item", "part"])
def test_the_operators_fields_of_a_whole_item_wait_too(where: str) -> None:
    told = streamed(answer(say(part("ab"))))
    item = say(part("ab", x_new=MARK)) if where == "part" else say(part("ab"), x_new=MARK)
    told[-2] |= {"item": item}
    told[-1]["response"] = {**told[-1]["response"], "output": [item]}
    parsed = read(told, extra_fields={"x_new": "moderated"})
    assert parsed.answers[0].message.parts == (Text("ab"), Text(MARK))
    assert [frame.whole for frame in parsed.frames][-2:] == [False, True]


# -- any stream --

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
items = st.one_of(
    st.builds(lambda a, b: say(part(a), part(b)), words, words),
    st.builds(lambda a: say({"type": "refusal", "refusal": a}), words),
    st.builds(think, words, words),
    st.builds(call, words),
    st.builds(lambda a: {**CUSTOM, "input": a}, words),
)


@settings(max_examples=150, deadline=None)
@given(
    output=st.lists(items, max_size=4),
    pieces=st.integers(1, 5),
    cuts=st.lists(st.integers(1, 3000), max_size=6),
)
def test_a_stream_split_anywhere_gives_the_same_frames_and_the_same_answer(
    output: list[Any], pieces: int, cuts: list[int]
) -> None:
    body = {**answer(), "output": output}
    told = streamed(body, pieces)
    data = encoded(told)
    decoder, gathered, start = Decoder(), list[Event](), 0
    for place in sorted(cuts):
        gathered += decoder.feed(data[start:place])
        start = max(start, place)
    gathered += decoder.feed(data[start:])
    split, whole = finished(parser(), gathered), read(told)
    assert split.frames == whole.frames
    assert split.answers == parse_response(body, asked(), Options()).answers
    assert frames(split.render(ruling(Action.ALLOW))) == plain(told)


anything = st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from([MARK, "message", "output_text"])
anything = (
    anything | st.lists(anything, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "id"]), anything)
)
changes = st.tuples(
    st.integers(0, END),
    st.dictionaries(
        st.sampled_from(
            ["type", "delta", "text", "item", "part", "output_index", "content_index", "response", "x_new"]
        ),
        anything | st.sampled_from([say(part(MARK)), part(MARK), think("", MARK)]),
        max_size=2,
    ),
    st.sampled_from(["change", "drop", "repeat"]),
)


@settings(max_examples=400, deadline=None)
@given(changed_events=st.lists(changes, max_size=3))
def test_any_stream_is_either_refused_or_released_as_read(changed_events: list[Any]) -> None:
    told = list(SAFE)
    for number, fields, how in changed_events:
        event = told[number % len(told)]
        told[number % len(told) : number % len(told) + 1] = {
            "change": [{**event, **fields}],
            "drop": [],
            "repeat": [event, event],
        }[how] or ([] if len(told) > 1 else [event])
    try:
        parsed = read(told)
    except UpstreamError:
        return
    if MARK.encode() in parsed.render(ruling(Action.ALLOW)):
        assert MARK in repr(parsed.answers)


SAFE = streamed(answer(think("sum", "deep thoughts"), say(part("Bread")), call("{}"), CUSTOM))


def test_an_answer_with_content_and_no_decision_is_never_released() -> None:
    with pytest.raises(ValueError, match="no decision"):
        read(FULL_TOLD).render(Ruling(None, {}))
