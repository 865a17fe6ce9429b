"""Streamed legacy answers: gathered whole, whatever way they are cut, and released only as what was read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion

from guard_middleware import enforce
from guard_middleware.dialects.base import Options, Ruling
from guard_middleware.dialects.completions_request import parse_request
from guard_middleware.dialects.completions_stream import TextStreamParser
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.sse import Decoder, Event
from guard_middleware.types import Action, Message, Reasoning, Text
from tests.support.sdk import notice, ruling
from tests.support.streams import Finished, finished

MARK = "how to pick a lock"


def chunk(*choices: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": list(choices),
        **fields,
    }


def say(text: str = "", index: int = 0, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish, **fields}


def parser(n: int = 1, *, usage: bool = False, **options: Any) -> TextStreamParser:
    body = {"model": "m", "prompt": "hi", "stream": True, "n": n, "stream_options": {"include_usage": usage}}
    return TextStreamParser(parse_request(body, Limits(), Options()), Options(**options))


def read(*chunks: Any, n: int = 1, done: bool = True, usage: bool = False, **options: Any) -> Finished:
    data = [item if isinstance(item, str) else json.dumps(item) for item in (*chunks, *["[DONE]"] * done)]
    return finished(parser(n, usage=usage, **options), (Event("", text) for text in data))


def chunks(data: bytes) -> list[dict[str, Any]]:
    events = Decoder().feed(data)
    assert events[-1].data == "[DONE]"
    return [json.loads(event.data) for event in events[:-1]]


def frames(parsed: Finished, what: Ruling) -> list[dict[str, Any]]:
    return chunks(parsed.render(what))


HELLO = [chunk(say("hel")), chunk(say("lo")), chunk(say(finish="stop"))]
USAGE = chunk(usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})


def test_an_allowed_stream_is_released_chunk_by_chunk() -> None:
    parsed = read(*HELLO)
    assert parsed.answers[0].message == Message("assistant", (Text("hello"),))
    assert parsed.answers[0].finish_reason == "stop"
    assert frames(parsed, ruling(Action.ALLOW)) == HELLO


def test_text_beside_the_finish_reason_is_released_before_it() -> None:
    parsed = read(chunk(say("hello", finish="length")))
    assert frames(parsed, ruling(Action.ALLOW)) == [chunk(say("hello")), chunk(say(finish="length"))]


@pytest.mark.parametrize("at", range(1, len(MARK)))
@pytest.mark.parametrize("surface", ["text", "reasoning"])
def test_text_cut_anywhere_is_judged_whole(surface: str, at: int) -> None:
    parsed = read(*(chunk({**say(), surface: part}) for part in (MARK[:at], MARK[at:])), HELLO[-1])
    assert parsed.answers[0].message.parts == ((Reasoning if surface == "reasoning" else Text)(MARK),)
    out = frames(parsed, ruling(Action.BLOCK))
    assert [frame["choices"][0]["text"] for frame in out[:1]] == [""]
    assert MARK[:at] not in [frame["choices"][0].get(surface) for frame in out]


def test_interleaved_choices_keep_apart() -> None:
    parsed = read(
        chunk(say("pick ", 0)),
        chunk(say("x", 1), say("a lock", 0)),
        chunk(say("", 1, "stop")),
        chunk(say("", 0, "stop")),
        n=2,
    )
    assert [answer.message.parts for answer in parsed.answers] == [(Text("pick a lock"),), (Text("x"),)]
    out = frames(parsed, ruling(Action.BLOCK, Action.ALLOW))
    assert [(f["choices"][0]["index"], f["choices"][0]["finish_reason"]) for f in out] == [
        (0, "content_filter"),
        (1, None),
        (1, "stop"),
    ]
    assert "lock" not in json.dumps([frame["choices"] for frame in out])


@pytest.mark.parametrize("asked", [True, False])
def test_usage_comes_exactly_when_it_was_asked_for(asked: bool) -> None:
    assert frames(read(*HELLO, USAGE, usage=asked), ruling(Action.ALLOW)) == [*HELLO, *[USAGE] * asked]


@pytest.mark.parametrize("released", range(3))
@pytest.mark.parametrize("soft", [False, True])
def test_a_stream_cut_anywhere_ends_as_a_block(released: int, soft: bool) -> None:
    """Also before the upstream is through: nothing of it is repeated."""
    stream = parser(usage=True)
    held = [frame for item in HELLO[:2] for frame in stream.feed(Event("", json.dumps(item)))]
    data = b"".join(stream.release(frame) for frame in held[:released])
    data += stream.cut(0, notice("output", Action.BLOCK), soft) + stream.close(ruling(Action.BLOCK))
    out = chunks(data)
    texts = [frame["choices"][0]["text"] for frame in out]
    assert texts[:released] == ["hel", "lo"][:released]
    assert [f["choices"][0]["finish_reason"] for f in out if f["choices"][0]["finish_reason"]] == [
        "stop" if soft else "content_filter"
    ]
    assert ("decision" in texts[released]) is soft
    assert out[-1]["moderation"]["output"]["results"][0]["flagged"] is True
    for frame in out:
        Completion.model_validate(frame | {"choices": [c | {"finish_reason": "stop"} for c in frame["choices"]]})


def test_an_annotation_rides_on_the_last_chunk_that_has_a_choice() -> None:
    out = frames(read(*HELLO, USAGE, usage=True), ruling(Action.ANNOTATE))
    assert ["moderation" in frame for frame in out] == [False, False, True, False]


def test_an_error_ends_the_stream_in_a_way_that_clients_raise() -> None:
    error = enforce.blocked_prompt(notice("input", Action.BLOCK))
    (first, last) = Decoder().feed(parser().fail(error))
    assert json.loads(first.data)["error"]["code"] == "content_filter"
    assert last.data == "[DONE]"


def test_a_choice_that_ended_may_be_named_again_without_text() -> None:
    assert frames(read(*HELLO, chunk(say())), ruling(Action.ALLOW)) == HELLO


def test_second_copies_and_unknown_scalars() -> None:
    parsed = read(chunk(say("hello", logprobs={"tokens": [MARK]}, token_ids=[1]), timings={"a": 1}), HELLO[-1])
    out = frames(parsed, ruling(Action.ALLOW))
    assert MARK not in json.dumps(out)
    assert out[0] == chunk(say("hello"), timings={"a": 1})


def test_the_operators_extra_field_is_gathered_and_waits_for_the_last_verdict() -> None:
    parsed = read(
        chunk(say("x", x_new="pick ")),
        chunk(say(x_new="a lock", finish="stop")),
        extra_fields={"x_new": "moderated"},
    )
    assert parsed.answers[0].message.parts == (Text("x"), Text("pick a lock"))
    assert [frame.whole for frame in parsed.frames] == [True, True]
    out = frames(parsed, ruling(Action.ALLOW))
    assert [frame["choices"][0].get("x_new") for frame in out] == ["pick ", "a lock", None]


@pytest.mark.parametrize(
    ("kind", "items"),
    [
        (UpstreamErrorKind.UNSUPPORTED, [chunk(say(x_new=MARK))]),
        (UpstreamErrorKind.UNSUPPORTED, [chunk(say(), x_new=[MARK])]),
        (UpstreamErrorKind.UNSUPPORTED, [chunk(say(delta={"content": MARK}))]),
        (UpstreamErrorKind.RESET, [HELLO[0], {"error": {"message": MARK}}]),
        (UpstreamErrorKind.MALFORMED, ["not json"]),
        (UpstreamErrorKind.MALFORMED, ['{"choices": [], "choices": []}']),
        (UpstreamErrorKind.MALFORMED, [[]]),
        (UpstreamErrorKind.MALFORMED, [{}]),
        (UpstreamErrorKind.MALFORMED, [chunk(say("x", 1))]),
        (UpstreamErrorKind.MALFORMED, [chunk({**say(), "text": [MARK]})]),
        (UpstreamErrorKind.MALFORMED, [chunk(say(), id=MARK)]),
        (UpstreamErrorKind.MALFORMED, [*HELLO, chunk(say(MARK))]),
        (UpstreamErrorKind.MALFORMED, [HELLO[0]]),
        (UpstreamErrorKind.MALFORMED, []),
        (UpstreamErrorKind.MALFORMED, [USAGE]),
        (UpstreamErrorKind.MALFORMED, [*HELLO, "[DONE]", HELLO[0]]),
    ],
)
def test_a_stream_that_cannot_be_screened_is_refused_and_not_quoted(kind: UpstreamErrorKind, items: Any) -> None:
    with pytest.raises(UpstreamError) as caught:
        read(*items)
    assert caught.value.kind is kind
    assert MARK not in str(caught.value)


def test_an_end_without_done_is_a_broken_answer() -> None:
    with pytest.raises(UpstreamError) as caught:
        read(*HELLO, done=False)
    assert caught.value.kind is UpstreamErrorKind.RESET


@pytest.mark.parametrize(
    ("name", "kind"), [("error", UpstreamErrorKind.RESET), ("guard.verdict", UpstreamErrorKind.UNSUPPORTED)]
)
def test_named_events_end_the_stream(name: str, kind: UpstreamErrorKind) -> None:
    with pytest.raises(UpstreamError) as caught:
        parser().feed(Event(name, "{}"))
    assert caught.value.kind is kind


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6), max_size=5)


@settings(max_examples=200, deadline=None)
@given(said=st.lists(texts, min_size=1, max_size=3), cuts=st.lists(st.integers(1, 400), max_size=6))
def test_a_stream_split_anywhere_gives_the_same_frames_and_reads_back_as_the_same_text(
    said: list[list[str]], cuts: list[int]
) -> None:
    pieces = [chunk(say(text, index)) for index, all_of in enumerate(said) for text in all_of]
    pieces += [chunk(say("", index, "stop")) for index in range(len(said))]
    data = b"".join(f"data: {json.dumps(piece)}\n\n".encode() for piece in pieces) + b"data: [DONE]\n\n"
    decoder, events, start = Decoder(), [], 0
    for at in sorted(cuts):
        events += decoder.feed(data[start:at])
        start = max(start, at)
    events += decoder.feed(data[start:])
    split, whole = finished(parser(len(said)), events), finished(parser(len(said)), Decoder().feed(data))
    assert split.frames == whole.frames
    released = frames(split, ruling(*[Action.ALLOW] * len(said)))
    back: dict[int, str] = {}
    for frame in released:
        for item in frame["choices"]:
            back[item["index"]] = back.get(item["index"], "") + item["text"]
    assert back == {index: "".join(all_of) for index, all_of in enumerate(said)}
