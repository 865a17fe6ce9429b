"""Streamed answers: gathered whole, whatever way they are cut, and released only as what was read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.dialects import chat_fields
from guard_middleware.dialects.base import Notice, Options, Ruling
from guard_middleware.dialects.chat_request import parse_request
from guard_middleware.dialects.chat_stream import ChatStreamParser
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.sse import Decoder, Event
from guard_middleware.types import Action, Basis, Message, Reasoning, Text, ToolCall
from tests.support.streams import Finished, finished

MARK = "how to pick a lock"


def chunk(*choices: dict[str, Any], **fields: Any) -> dict[str, Any]:
    envelope = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**envelope, "choices": list(choices), **fields}


def say(index: int = 0, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": finish}


def parser(n: int = 1, *, usage: bool = False, **options: Any) -> ChatStreamParser:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "n": n,
        "stream_options": {"include_usage": usage},
    }
    return ChatStreamParser(parse_request(body, Limits(), Options()), Options(**options))


def read(*chunks: Any, n: int = 1, done: bool = True, usage: bool = False, **options: Any) -> Finished:
    data = [item if isinstance(item, str) else json.dumps(item) for item in (*chunks, *["[DONE]"] * done)]
    return finished(parser(n, usage=usage, **options), (Event("", text) for text in data))


def ruling(*actions: Action, soft: bool = False) -> Ruling:
    def notice(action: Action) -> Notice:
        flagged = action is not Action.ALLOW
        return Notice("d1", "output", action, Basis.VERDICT, "Blocked.", flagged, 0.5, (), "nano", ("text",))

    return Ruling(None, {index: notice(action) for index, action in enumerate(actions)}, soft)


def frames(parsed: Finished, what: Ruling) -> list[dict[str, Any]]:
    events = Decoder().feed(parsed.render(what))
    assert events[-1].data == "[DONE]"
    return [json.loads(event.data) for event in events[:-1]]


HELLO = [
    chunk(say(role="assistant", content="", refusal=None)),
    chunk(say(content="hel")),
    chunk(say(content="lo")),
    chunk(say(finish="stop")),
]
USAGE = chunk(usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})


def test_an_allowed_stream_is_released_chunk_by_chunk() -> None:
    parsed = read(*HELLO)
    assert parsed.answers[0].message == Message("assistant", (Text("hello"),))
    assert parsed.answers[0].finish_reason == "stop"
    assert frames(parsed, ruling(Action.ALLOW)) == HELLO


@pytest.mark.parametrize("cut", range(1, len(MARK)))
@pytest.mark.parametrize("surface", ["content", "refusal", "reasoning", "reasoning_content"])
def test_text_cut_anywhere_is_judged_whole(surface: str, cut: int) -> None:
    parsed = read(chunk(say(**{surface: MARK[:cut]})), chunk(say(**{surface: MARK[cut:]})), chunk(say(finish="stop")))
    kind = Reasoning if surface.startswith("reasoning") else Text
    assert parsed.answers[0].message.parts == (kind(MARK),)
    out = parsed.render(ruling(Action.BLOCK))
    assert MARK[:cut] not in [f["choices"][0]["delta"].get(surface) for f in frames(parsed, ruling(Action.BLOCK))]
    assert MARK.encode() not in out


def test_parallel_calls_and_interleaved_choices_keep_apart() -> None:
    def piece(number: int, **fields: Any) -> dict[str, Any]:
        return {"index": number, **fields}

    parsed = read(
        chunk(say(0, tool_calls=[piece(0, id="a", type="function", function={"name": "f", "arguments": ""})])),
        chunk(say(1, content="x")),
        chunk(say(0, tool_calls=[piece(1, id="b", type="function", function={"name": "g", "arguments": "{"})])),
        chunk(say(0, tool_calls=[piece(0, function={"arguments": "pi"}), piece(1, function={"arguments": "}"})])),
        chunk(say(1, content="y"), say(0, tool_calls=[piece(0, function={"arguments": "ck"})])),
        chunk(say(1, finish="stop")),
        chunk(say(0, finish="tool_calls")),
        n=2,
    )
    assert [answer.message.parts for answer in parsed.answers] == [
        (ToolCall("a", "f", "pick"), ToolCall("b", "g", "{}")),
        (Text("xy"),),
    ]


def test_an_empty_id_of_a_later_piece_does_not_replace_the_first() -> None:
    first = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "x"}}
    parsed = read(
        chunk(say(tool_calls=[first])),
        chunk(say(tool_calls=[{"index": 0, "id": "", "function": {"name": None, "arguments": "y"}}])),
        chunk(say(finish="tool_calls")),
    )
    assert parsed.answers[0].message.parts == (ToolCall("a", "f", "xy"),)


def test_custom_calls_legacy_calls_and_citations_are_read() -> None:
    citation = {"type": "url_citation", "url_citation": {"title": MARK, "url": "https://x.example"}}
    parsed = read(
        chunk(say(tool_calls=[{"index": 0, "id": "a", "type": "custom", "custom": {"name": "g", "input": "i"}}])),
        chunk(say(tool_calls=[{"index": 0, "custom": {"input": "j"}}], function_call={"name": "f", "arguments": "1"})),
        chunk(say(annotations=[citation], function_call={"arguments": "2"})),
        chunk(say(finish="stop")),
    )
    assert parsed.answers[0].message.parts == (
        Text(MARK),
        Text("https://x.example"),
        ToolCall("a", "g", "ij"),
        ToolCall("", "f", "12"),
    )


UNSUPPORTED = [
    [chunk(say(audio={"transcript": MARK}))],
    [chunk(say(x_new=MARK))],
    [chunk(say(x_new={"a": MARK}))],
    [chunk({**say(), "x_new": [MARK]})],
    [chunk(say(), x_new=MARK)],
    [chunk(say(role="user", content="x"))],
    [chunk(say(tool_calls=[{"index": 0, "type": "web"}]))],
    [chunk(say(tool_calls=[{"index": 0, "function": {"name": "f"}, "custom": {"input": MARK}}]))],
]
MALFORMED = [
    ["not json"],
    ['{"choices": [], "choices": []}'],
    ["[]"],
    [{}],
    [chunk(choices=None)],
    [chunk(say(1))],
    [chunk(say(content=["x"]))],
    [chunk(say(content="x"), id=MARK)],
    [chunk(say(tool_calls=[{"function": {"name": "f"}}]))],
    [chunk(say(tool_calls=[{"index": 0, "id": MARK}]))],
    [
        chunk(say(tool_calls=[{"index": 0, "type": "function"}])),
        chunk(say(tool_calls=[{"index": 0, "type": "custom"}])),
    ],
    [*HELLO, chunk(say(content=MARK))],
    [*HELLO, chunk(say(function_call={"arguments": "x"}))],
    [HELLO[1]],
    [],
    [USAGE],
    [*HELLO, "[DONE]", HELLO[1]],
    [*HELLO, "[DONE]"],
]


@pytest.mark.parametrize(
    ("kind", "chunks"),
    [
        *((UpstreamErrorKind.UNSUPPORTED, chunks) for chunks in UNSUPPORTED),
        *((UpstreamErrorKind.MALFORMED, chunks) for chunks in MALFORMED),
        (UpstreamErrorKind.RESET, [HELLO[0], {"error": {"message": MARK}}]),
    ],
    ids=lambda value: value.value if isinstance(value, UpstreamErrorKind) else "",
)
def test_a_stream_that_cannot_be_screened_is_refused_and_not_quoted(kind: UpstreamErrorKind, chunks: Any) -> None:
    with pytest.raises(UpstreamError) as caught:
        read(*chunks)
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


def test_vendors_annotation_chunks_and_second_copies_are_dropped() -> None:
    filters = {"index": 0, "finish_reason": None, "content_filter_results": {"x": MARK}}
    parsed = read(
        chunk(prompt_filter_results=[{"x": MARK}]),
        chunk(
            {**say(content="hello"), "logprobs": {"content": [{"token": MARK}]}},
            obfuscation=MARK,
            moderation={"x": MARK},
        ),
        chunk(say(finish="stop")),
        chunk(filters),
    )
    out = frames(parsed, ruling(Action.ALLOW))
    assert out == [chunk(say(content="hello")), chunk(say(finish="stop"))]


NAMELESS = {"choices": [], "created": 0, "id": "", "model": "", "object": "", "prompt_filter_results": [{"x": MARK}]}


def test_the_chunks_that_we_add_are_named_as_the_answer_even_behind_a_nameless_first_chunk() -> None:
    stream = parser(usage=True)
    for item in (NAMELESS, HELLO[1], USAGE):
        stream.feed(Event("", json.dumps(item)))
    blocked = ruling(Action.BLOCK)
    out = stream.cut(0, blocked.choices[0], False) + stream.close(blocked)
    said = [json.loads(event.data) for event in Decoder().feed(out)[:-1]]
    assert [{name: item[name] for name in ("id", "created", "model", "object")} for item in said] == [
        {"id": "chatcmpl-1", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    ] * 2


def test_a_nameless_chunk_is_released_under_the_names_of_its_answer() -> None:
    """Azure's asynchronous filter ends an answer so."""
    choice = {"index": 0, "finish_reason": "content_filter", "content_filter_results": {"x": MARK}}
    parsed = read(HELLO[1], {"id": "", "object": "", "created": 0, "model": "", "choices": [choice]})
    assert parsed.answers[0].finish_reason == "content_filter"
    assert frames(parsed, ruling(Action.ALLOW)) == [HELLO[1], chunk(say(finish="content_filter"))]


def test_a_stream_that_never_gives_its_id_keeps_its_other_names() -> None:
    parsed = read(*({**item, "id": ""} for item in HELLO))
    (out,) = frames(parsed, ruling(Action.BLOCK))
    assert (out["id"], out["model"]) == ("", "m")


def test_empty_names_roles_and_ends_say_nothing() -> None:
    names: dict[str, Any] = {"system_fingerprint": "", "service_tier": "", "model": ""}
    parsed = read(chunk(say(0, "", role="", content="hello"), **names), chunk(say(0, "stop", role=""), **names))
    assert parsed.answers[0].message.parts == (Text("hello"),)
    assert [item["choices"][0]["finish_reason"] for item in frames(parsed, ruling(Action.ALLOW))] == [None, "stop"]


@pytest.mark.parametrize("kind", ["function", "custom"])
def test_an_empty_type_of_a_later_piece_does_not_replace_the_first(kind: str) -> None:
    name = "arguments" if kind == "function" else "input"
    first = {"index": 0, "id": "a", "type": kind, kind: {"name": "f", name: "x"}}
    parsed = read(
        chunk(say(tool_calls=[first])),
        chunk(say(tool_calls=[{"index": 0, "id": "", "type": "", kind: {name: "y"}}])),
        chunk(say(finish="tool_calls")),
    )
    assert parsed.answers[0].message.parts == (ToolCall("a", "f", "xy"),)
    told = [
        piece
        for item in frames(parsed, ruling(Action.ALLOW))[:2]
        for piece in item["choices"][0]["delta"]["tool_calls"]
    ]
    assert [piece.get("type") for piece in told] == [kind, None]


@pytest.mark.parametrize(("asked", "expected"), [(True, [*HELLO, USAGE]), (False, HELLO)])
def test_usage_comes_exactly_when_it_was_asked_for(asked: bool, expected: Any) -> None:
    assert frames(read(*HELLO, USAGE, usage=asked), ruling(Action.ALLOW)) == expected


@pytest.mark.parametrize("own_chunk", [True, False])
def test_a_blocked_stream_is_one_chunk_then_usage_then_done(own_chunk: bool) -> None:
    chunks: Sequence[Any] = [*HELLO, USAGE] if own_chunk else [*HELLO[:-1], {**HELLO[-1], "usage": USAGE["usage"]}]
    out = frames(read(*chunks, usage=True), ruling(Action.BLOCK))
    assert [frame["choices"] for frame in out] == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": None, "refusal": "Blocked."},
                "logprobs": None,
                "finish_reason": "content_filter",
            }
        ],
        [],
    ]
    assert out[-1]["usage"] == USAGE["usage"]


def test_one_blocked_choice_leaves_the_other_and_keeps_their_order() -> None:
    parsed = read(
        chunk(say(0, content=MARK)),
        chunk(say(1, content="x"), say(0, content=MARK)),
        chunk(say(0, finish="stop")),
        chunk(say(1, finish="stop")),
        n=2,
    )
    out = frames(parsed, ruling(Action.BLOCK, Action.ALLOW))
    assert [[c["index"] for c in frame["choices"]] for frame in out] == [[0], [1], [1]]
    assert out[1:2] == [chunk(say(1, content="x"))]
    assert MARK not in json.dumps(out)


def test_soft_mode_streams_an_ordinary_answer() -> None:
    (frame,) = frames(read(*HELLO), ruling(Action.BLOCK, soft=True))
    assert frame["choices"][0]["delta"]["content"] == "Blocked."
    assert frame["choices"][0]["finish_reason"] == "stop"


def test_an_annotation_rides_on_the_last_chunk_that_has_a_choice() -> None:
    out = frames(read(*HELLO, USAGE, usage=True), ruling(Action.ANNOTATE))
    assert ["moderation" in frame for frame in out] == [False, False, False, True, False]
    assert [frame["choices"] for frame in out] == [frame["choices"] for frame in [*HELLO, USAGE]]


def test_a_choice_with_content_and_no_decision_is_never_released() -> None:
    with pytest.raises(ValueError, match="no decision"):
        read(*HELLO).render(Ruling(None, {}))


def test_the_operators_extra_field_is_gathered_over_chunks() -> None:
    parsed = read(
        chunk(say(x_new="pick ")), chunk(say(x_new="a lock", finish="stop")), extra_fields={"x_new": "moderated"}
    )
    assert parsed.answers[0].message.parts == (Text("pick a lock"),)


names = st.sampled_from(sorted({*chat_fields.CHUNK, *chat_fields.CHUNK_CHOICE, *chat_fields.DELTA, "index", "type"}))
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=8) | st.just(MARK),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
deltas = st.dictionaries(st.sampled_from(sorted(chat_fields.DELTA)), anything, max_size=3)
events = st.builds(
    lambda i, d, f: chunk(say(i, f, **d)), st.integers(0, 2), deltas, st.sampled_from([None, None, "stop"])
)


@settings(max_examples=300, deadline=None)
@given(items=st.lists(events | anything | st.sampled_from(HELLO), max_size=6))
def test_any_stream_is_either_refused_or_released_as_read(items: list[Any]) -> None:
    try:
        parsed = read(*(json.dumps(item) for item in items), n=2)
    except UpstreamError:
        return
    said = ""
    for answer in parsed.answers:
        for part in answer.message.parts:
            said += f"{part.name}{part.arguments}" if isinstance(part, ToolCall) else getattr(part, "text", "")
    for frame in frames(parsed, ruling(Action.ALLOW, Action.ALLOW)):
        for item in frame["choices"]:
            for text in item["delta"].values():
                assert not isinstance(text, str) or text in said or text == "assistant"
