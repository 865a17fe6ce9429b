"""Streamed answers: every block a surface, gathered whole however it is cut, released only as what was read."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest
from anthropic import Anthropic
from anthropic.types import RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from guard_middleware.config import StreamRules
from guard_middleware.dialects import messages_fields
from guard_middleware.dialects.base import Frame, Notice, Options, PublicError, Ruling, Said
from guard_middleware.dialects.messages_request import parse_request
from guard_middleware.dialects.messages_stream import MessagesStreamParser
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.holdback import HoldBack
from guard_middleware.limits import Limits
from guard_middleware.sse import Decoder, Event
from guard_middleware.types import Action, Basis, Message, Reasoning, Text, ToolCall, ToolCallResponse
from tests.support.anthropic_events import (
    Events,
    as_events,
    called,
    closed,
    cut_at,
    delta,
    ending,
    opened,
    said,
    start,
    wire,
)
from tests.support.leaves import leaves
from tests.support.streams import Finished, finished

MARK = "how to pick a lock"
SEALED = base64.b64encode(bytes(range(256)) * 3).decode()


def notice(action: Action = Action.BLOCK) -> Notice:
    flagged = action is not Action.ALLOW
    return Notice("d1", "output", action, Basis.VERDICT, "Blocked.", flagged, 0.5, (), "nano", ("text",))


def ruling(action: Action, soft: bool = False) -> Ruling:
    return Ruling(None, {0: notice(action)}, soft)


def parser(stop_sequences: Sequence[str] = (), **options: Any) -> MessagesStreamParser:
    body = {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stop_sequences": list(stop_sequences),
    }
    return MessagesStreamParser(parse_request(body, Limits(), Options()), Options(**options))


def read(*bodies: dict[str, Any], **options: Any) -> Finished:
    return finished(parser(**options), as_events(bodies))


def bodies(data: bytes) -> Events:
    """The events of a stream; every one is named as its data is."""
    found = []
    for event in Decoder().feed(data):
        body = json.loads(event.data)
        assert event.event == body["type"]
        found.append(body)
    return found


HELLO = [start(), *said(0, ["hel", "lo"]), *ending()]
MIXED = [
    start(),
    *said(0, ["let me ", "think"], "thinking"),
    *said(1, ["I will ", "look."]),
    *called(2, ['{"a": ', "1}"]),
    *ending("tool_use"),
]


@pytest.mark.parametrize("stream", [HELLO, MIXED], ids=["text", "mixed"])
def test_an_allowed_stream_is_released_event_by_event(stream: Events) -> None:
    assert bodies(read(*stream).render(ruling(Action.ALLOW))) == stream


def test_empty_names_at_the_start_say_nothing() -> None:
    parsed = read(start(id="", model="", stop_reason=""), *HELLO[1:])
    assert parsed.answers[0].finish_reason == "end_turn"
    (first, *_) = bodies(parsed.render(ruling(Action.ALLOW)))
    assert first == start(id="", model="")


def test_an_answer_may_have_any_number_of_blocks() -> None:
    stream = [start(), *(event for number in range(300) for event in said(number, [f"{number} "])), *ending()]
    assert bodies(read(*stream).render(ruling(Action.ALLOW))) == stream


@pytest.mark.parametrize("index", [False, 0.0, "0", None])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_index_is_a_whole_number(at: int, index: Any) -> None:
    stream = [start(), *said(0, ["hello"]), *ending()]
    stream[at] = {**stream[at], "index": index}
    with pytest.raises(UpstreamError):
        read(*stream)


def test_each_block_is_a_surface_and_calls_wait_for_the_last_verdict() -> None:
    parsed = read(*MIXED)
    assert [(frame.said, frame.whole) for frame in parsed.frames if frame.said or frame.whole] == [
        ((Said("block.0", "let me ", True),), False),
        ((Said("block.0", "think", True),), False),
        ((Said("block.1", "I will "),), False),
        ((Said("block.1", "look."),), False),
        *[((), True)] * 3,
    ]
    assert parsed.answers[0].message == Message(
        "assistant", (Reasoning("let me think"), Text("I will look."), ToolCall("toolu_1", "f", '{"a": 1}'))
    )
    assert parsed.answers[0].finish_reason == "tool_use"


@pytest.mark.parametrize("place", range(1, len(MARK)))
@pytest.mark.parametrize("kind", ["text", "thinking", "tool_use"])
def test_text_cut_anywhere_is_judged_whole(kind: str, place: int) -> None:
    pieces = cut_at(MARK, place)
    block = called(0, pieces) if kind == "tool_use" else said(0, pieces, kind)
    parsed = read(start(), *block, *ending())
    (part,) = parsed.answers[0].message.parts
    assert part == {"text": Text(MARK), "thinking": Reasoning(MARK), "tool_use": ToolCall("toolu_1", "f", MARK)}[kind]
    out = parsed.render(ruling(Action.BLOCK)).decode()
    assert not any(piece in out for piece in pieces if len(piece) > 4)


def test_escapes_in_arguments_are_read_as_their_characters() -> None:
    (part,) = read(start(), *called(0, ['{"a": "\\u00', 'e9"}']), *ending()).answers[0].message.parts
    assert part == ToolCall("toolu_1", "f", '{"a": "\u00e9"}')


CITATION = {
    "type": "char_location",
    "cited_text": MARK,
    "document_index": 0,
    "document_title": None,
    "start_char_index": 0,
    "end_char_index": 1,
}
RESULT = {
    "tool_use_id": "srvtoolu_1",
    "content": {
        "type": "bash_code_execution_result",
        "stdout": MARK,
        "stderr": "",
        "return_code": 0,
        "content": [],
    },
}


def test_citations_are_a_surface_of_their_own() -> None:
    parsed = read(start(), opened(0), delta(0, "citations_delta", citation=CITATION), closed(0), *ending())
    assert parsed.frames[2].said == (Said("block.0.citations", f"{MARK}\n"),)
    assert parsed.answers[0].message.parts == (Text(f"{MARK}\n"),)


def test_what_a_server_run_tool_did_waits_and_is_read() -> None:
    parsed = read(
        start(),
        opened(0, "server_tool_use"),
        delta(0, "input_json_delta", partial_json='{"command": "ls"}'),
        closed(0),
        opened(1, "bash_code_execution_tool_result", **RESULT),
        closed(1),
        opened(2, "redacted_thinking", data=SEALED),
        closed(2),
        *ending(),
    )
    assert parsed.answers[0].message.parts == (
        ToolCall("srvtoolu_1", "bash_code_execution", '{"command": "ls"}'),
        ToolCallResponse("srvtoolu_1", MARK),
    )
    assert [frame.whole for frame in parsed.frames] == [False, True, True, False, True, False, False, False]


@pytest.mark.parametrize(
    ("block", "part"),
    [
        (opened(0, text=MARK), Text(MARK)),
        (opened(0, text="", citations=[CITATION]), Text(f"{MARK}\n")),
        (opened(0, "thinking", thinking=MARK), Reasoning(MARK)),
        (opened(0, "tool_use", name=MARK), ToolCall("toolu_1", MARK, "{}")),
        (opened(0, "tool_use", input={"a": MARK}), ToolCall("toolu_1", "f", f'{{"a":"{MARK}"}}')),
    ],
)
def test_what_a_block_says_at_its_start_is_read(block: dict[str, Any], part: Any) -> None:
    parsed = read(start(), block, closed(0), *ending())
    assert parsed.answers[0].message.parts == (part,)
    frame = parsed.frames[1]
    assert frame.whole or "".join(said.text for said in frame.said) == MARK


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"stop_sequence": "END"}, ()),
        ({"stop_sequence": MARK}, (Text(MARK),)),
        ({"stop_details": {"type": "refusal", "category": None, "explanation": MARK}}, (Text(MARK),)),
    ],
)
def test_what_the_end_says_is_judged_with_the_answer(fields: dict[str, Any], parts: Any) -> None:
    stream = [*HELLO[:-2], *ending("refusal", **fields)]
    parsed = read(*stream, stop_sequences=["END"])
    assert parsed.answers[0].message.parts == (Text("hello"), *parts)
    assert bodies(parsed.render(ruling(Action.ALLOW))) == stream
    assert MARK not in parsed.render(ruling(Action.BLOCK)).decode()


def test_what_the_start_says_is_judged_and_waits() -> None:
    for head, options in (
        (start(stop_sequence=MARK), {}),
        (start(x_new=MARK), {"extra_fields": {"x_new": "moderated"}}),
    ):
        parsed = read(head, *HELLO[1:], **options)
        assert parsed.answers[0].message.parts == (Text("hello"), Text(MARK))
        assert parsed.frames[0].whole
        assert bodies(parsed.render(ruling(Action.ALLOW))) == [head, *HELLO[1:]]


UNSUPPORTED: list[Events] = [
    [start(), {"type": "x_new", "x": MARK}],
    [start(content=None, x_new=MARK)],
    [start(role="user")],
    [start(), opened(0, "x_new", x=MARK)],
    [start(), opened(0, "image", source={"type": "url", "url": "https://x.example"})],
    [start(), opened(0, "web_search_tool_result", tool_use_id="1", content=[])],
    [start(), opened(0, "mcp_tool_use", id="1", name="f", input={}, server_name="s")],
    [start(), opened(0, x_new=MARK)],
    [start(), opened(0), delta(0, "x_delta", x=MARK)],
    [start(), opened(0), delta(0, text="x", x_new=MARK)],
    [start(), opened(0), delta(0, "citations_delta", citation={"type": "x_new", "x": MARK})],
    [start(), opened(0), {**delta(0, text="x"), "x_new": MARK}],
    [start(), opened(0, "compaction"), delta(0, "compaction_delta", content=MARK)],
    [*HELLO[:-2], {"type": "message_delta", "delta": {"stop_reason": "end_turn", "x_new": MARK}, "usage": {}}],
]
MALFORMED: list[Events] = [
    [],
    [opened(0)],
    [{"type": "message_stop"}],
    [start(), start()],
    [start(content=[{"type": "text", "text": MARK}])],
    [start(id=MARK)],
    [start(), *ending("")],
    [{"type": "message_start"}],
    [start(), opened(1)],
    [start(), opened(True)],
    [start(), opened(0), opened(1)],
    [start(), opened(0), closed(0), opened(0)],
    [start(), delta(0, text=MARK)],
    [start(), opened(0), delta(1, text=MARK)],
    [start(), opened(0), delta(False, text=MARK)],
    [start(), opened(0), closed(0), delta(0, text=MARK)],
    [start(), opened(0), closed(0), closed(0)],
    [start(), opened(0), {"type": "content_block_delta", "index": 0}],
    [start(), opened(0), delta(0, text=[MARK])],
    [start(), opened(0), delta(0, "thinking_delta", thinking=MARK)],
    [start(), opened(0), delta(0, "signature_delta", signature="x")],
    [start(), opened(0), delta(0, "input_json_delta", partial_json=MARK)],
    [start(), opened(0, "thinking"), delta(0, text=MARK)],
    [start(), opened(0, "thinking"), delta(0, "signature_delta", signature=MARK)],
    [start(), opened(0, "tool_use"), delta(0, text=MARK)],
    [start(), opened(0, "redacted_thinking", data=SEALED), delta(0, text=MARK)],
    [start(), opened(0), *ending()],
    [start(), *said(0, ["x"]), *ending(None)],
    [start(), *said(0, ["x"]), *ending(MARK)],
    [start(), *said(0, ["x"]), {"type": "message_stop"}],
    [*HELLO, delta(0, text=MARK)],
    [*HELLO, {"type": "ping"}],
    [*HELLO, *HELLO],
]
BROKEN: list[Events] = [
    HELLO[:1],
    HELLO[:-1],
    [HELLO[0], {"type": "error", "error": {"type": "overloaded_error", "message": MARK}}],
]


@pytest.mark.parametrize(
    ("kind", "stream"),
    [
        *((UpstreamErrorKind.UNSUPPORTED, stream) for stream in UNSUPPORTED),
        *((UpstreamErrorKind.MALFORMED, stream) for stream in MALFORMED[1:]),
        *((UpstreamErrorKind.RESET, stream) for stream in [MALFORMED[0], *BROKEN]),
    ],
    ids=lambda value: value.value if isinstance(value, UpstreamErrorKind) else "",
)
def test_a_stream_that_cannot_be_screened_is_refused_and_not_quoted(kind: UpstreamErrorKind, stream: Events) -> None:
    with pytest.raises(UpstreamError) as caught:
        read(*stream)
    assert caught.value.kind is kind
    assert MARK not in str(caught.value)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (Event("ping", json.dumps(HELLO[1])), UpstreamErrorKind.MALFORMED),
        (Event("guard.verdict", json.dumps(HELLO[1])), UpstreamErrorKind.MALFORMED),
        (Event("error", MARK), UpstreamErrorKind.RESET),
        (Event("content_block_start", "not json"), UpstreamErrorKind.MALFORMED),
        (Event("content_block_start", '{"type": "ping", "type": "ping"}'), UpstreamErrorKind.MALFORMED),
        (Event("content_block_start", "[]"), UpstreamErrorKind.MALFORMED),
        (Event("", "[DONE]"), UpstreamErrorKind.MALFORMED),
    ],
)
def test_an_event_that_is_not_what_its_name_says_ends_the_stream(event: Event, kind: UpstreamErrorKind) -> None:
    stream = parser()
    stream.feed(as_events(HELLO)[0])
    with pytest.raises(UpstreamError) as caught:
        stream.feed(event)
    assert caught.value.kind is kind


def test_events_without_a_name_are_named_and_pings_are_dropped() -> None:
    """LiteLLM #38953: clients skip events without a name. vLLM: fields left out, ``[DONE]`` after the end."""
    bare = start()
    del bare["message"]["type"], bare["message"]["role"], bare["message"]["stop_reason"]
    stream = [{"type": "ping"}, bare, {"type": "ping"}, *HELLO[1:]]
    unnamed = [Event("", json.dumps(body)) for body in stream]
    parsed = finished(parser(), [*unnamed, Event("", "[DONE]")])
    assert bodies(parsed.render(ruling(Action.ALLOW))) == HELLO


@pytest.mark.parametrize("released", range(len(MIXED) - 1))
@pytest.mark.parametrize("soft", [False, True])
def test_a_stream_can_be_cut_after_any_event(released: int, soft: bool) -> None:
    stream = parser()
    frames = [frame for event in as_events(MIXED) for frame in stream.feed(event)]
    out = b"".join(stream.release(frame) for frame in frames[:released])
    out += stream.cut(0, notice(), soft) + stream.close(ruling(Action.BLOCK, soft))
    found = bodies(out)
    assert found[: max(1, released)] == MIXED[: max(1, released)]
    starts = [body["index"] for body in found if body["type"] == "content_block_start"]
    assert starts == [body["index"] for body in found if body["type"] == "content_block_stop"]
    assert starts == list(range(len(starts)))
    assert [body["type"] for body in found[-2:]] == ["message_delta", "message_stop"]
    last = found[-2]
    assert last["usage"] == {"output_tokens": 7}
    assert last["x_guard"]["output"][0]["decision_id"] == "d1"
    if soft:
        assert found[-4]["delta"]["text"] == "Blocked."
        assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None, "stop_details": None}
    else:
        details = {"type": "refusal", "category": None, "explanation": "Blocked."}
        assert last["delta"] == {"stop_reason": "refusal", "stop_sequence": None, "stop_details": details}


def test_a_cut_before_the_end_of_the_upstream_tells_the_usage_that_is_known() -> None:
    stream = parser()
    for event in as_events(HELLO[:3]):
        stream.feed(event)
    found = bodies(stream.cut(0, notice(), False) + stream.close(ruling(Action.BLOCK)))
    assert found[-2]["usage"] == {"output_tokens": 1}


def test_an_annotation_rides_on_the_event_that_tells_the_end() -> None:
    found = bodies(read(*HELLO).render(ruling(Action.ANNOTATE)))
    assert found[-2].pop("x_guard")["output"][0]["action"] == "annotate"
    assert found == HELLO


def test_an_error_inside_a_stream_and_a_ping_are_events() -> None:
    error = PublicError(502, "upstream_reset", "server_error", "The model service broke off its answer.")
    (event,) = Decoder().feed(parser().fail(error))
    assert event.event == "error"
    assert json.loads(event.data)["error"]["type"] == "api_error"
    assert parser().keep_alive == b'event: ping\ndata: {"type":"ping"}\n\n'


def test_the_operators_extra_field_is_gathered_and_waits() -> None:
    stream = [start(), opened(0), delta(0, text="x", x_new=MARK), closed(0), *ending(y_new="more")]
    parsed = read(*stream, extra_fields={"x_new": "moderated", "y_new": "moderated"})
    assert parsed.answers[0].message.parts == (Text("x"), Text(MARK), Text("more"))
    assert parsed.frames[2].whole
    event = read(start(), {**opened(0), "x_new": MARK}, closed(0), *ending(), extra_fields={"x_new": "moderated"})
    assert event.frames[1].whole
    assert event.answers[0].message.parts == (Text(MARK),)


def accumulated(data: bytes) -> Any:
    """What the SDK's stream helper makes of the events."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=data)

    client = Anthropic(api_key="k", http_client=httpx2.Client(transport=httpx2.MockTransport(answer)))
    ask: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    with client.messages.stream(**ask) as stream:
        for _ in stream:
            pass
        return stream.get_final_message().to_dict()


words = st.text(st.sampled_from('ab "\\{}\u2028\u00e9\U0001f512\n'), max_size=40)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Events, Message]:
    """A stream of a few blocks, each cut anywhere, pings between, and what it says."""
    events: Events = [start()]
    parts: list[Any] = []
    for index in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["text", "thinking", "tool_use"]))
        text = json.dumps({"a": draw(words)}) if kind == "tool_use" else draw(words)
        places = draw(st.lists(st.integers(0, len(text)), max_size=4))
        pieces = cut_at(text, *places)
        events += called(index, pieces) if kind == "tool_use" else said(index, pieces, kind)
        if kind == "tool_use":
            parts.append(ToolCall("toolu_1", "f", json.loads(text)["a"]))
        elif text:
            parts.append(Reasoning(text) if kind == "thinking" else Text(text))
    events += ending()
    for place in draw(st.lists(st.integers(0, len(events) - 1), max_size=2)):
        events.insert(place, {"type": "ping"})
    return events, Message("assistant", tuple(parts))


def plain(part: Any) -> Any:
    return ToolCall(part.id, part.name, json.loads(part.arguments)["a"]) if isinstance(part, ToolCall) else part


@settings(max_examples=60, deadline=None)
@given(case=streams(), chunk=st.integers(1, 64))
def test_a_stream_cut_anywhere_gives_the_same_frames_and_the_sdk_the_same_message(
    case: tuple[Events, Message], chunk: int
) -> None:
    events, spoken = case
    data = wire(events).encode()
    decoder, stream = Decoder(), parser()
    pieces = [data[at : at + chunk] for at in range(0, len(data), chunk)]
    frames = [frame for piece in pieces for event in decoder.feed(piece) for frame in stream.feed(event)]
    whole = read(*events)
    assert tuple(frames) == whole.frames
    assert stream.finish() == whole.answers
    assert tuple(map(plain, whole.answers[0].message.parts)) == spoken.parts
    assert _surfaces(frames) == [
        (isinstance(part, Reasoning), part.text) for part in spoken.parts if not isinstance(part, ToolCall)
    ]
    assert accumulated(whole.render(ruling(Action.ALLOW))) == accumulated(data)


def _surfaces(frames: Sequence[Frame]) -> list[tuple[bool, str]]:
    texts: dict[str, list[Said]] = {}
    for frame in frames:
        for piece in frame.said:
            texts.setdefault(piece.surface, []).append(piece)
    return [(found[0].reasoning, "".join(piece.text for piece in found)) for found in texts.values()]


@settings(max_examples=60, deadline=None)
@given(case=streams(), overlap=st.integers(0, 8), first=st.integers(16, 40))
def test_window_by_window_the_same_bytes_leave_and_calls_only_at_the_end(
    case: tuple[Events, Message], overlap: int, first: int
) -> None:
    events, _ = case
    stream = parser()
    rules = StreamRules(mode="window", first_window=first, overlap=overlap, growth=1.5, last_window=64)
    hold = HoldBack(stream, rules)
    early = b""
    for event in as_events(events):
        hold.feed(stream.feed(event))
        for window in list(hold.due()):
            hold.cleared(window)
        early += hold.release()
    assert "tool_use" not in early.decode()
    late = b"".join(hold.finish()) + stream.close(ruling(Action.ALLOW))
    assert early + late == read(*events).render(ruling(Action.ALLOW))


names = st.sampled_from(
    sorted({n for tables in (messages_fields.EVENTS, messages_fields.DELTAS) for t in tables.values() for n in t or ()})
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=8) | st.just(MARK),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
pieces = st.sampled_from([*HELLO, *MIXED, opened(0, "bash_code_execution_tool_result", **RESULT)])


@st.composite
def tampered(draw: st.DrawFn) -> dict[str, Any]:
    body = json.loads(json.dumps(draw(pieces)))
    holder = draw(st.sampled_from([body, *(value for value in body.values() if isinstance(value, dict))]))
    holder[draw(names | st.text(max_size=6) | st.sampled_from(sorted(holder)))] = draw(anything)
    return dict(body)


@settings(max_examples=300, deadline=None)
@given(items=st.lists(pieces | tampered(), max_size=6), base=st.sampled_from([[], HELLO, MIXED]), at=st.integers(0, 12))
def test_any_stream_is_either_refused_or_released_as_read(items: Events, base: Events, at: int) -> None:
    try:
        parsed = read(*base[:at], *items, *base[at:])
    except UpstreamError:
        return
    heard = ""
    for part in parsed.answers[0].message.parts:
        heard += f"{part.name}{part.arguments}" if isinstance(part, ToolCall) else getattr(part, "text", "")
    heard += json.dumps(heard, ensure_ascii=False)
    for body in bodies(parsed.render(ruling(Action.ALLOW))):
        for leaf in leaves(body):
            if any(c.isspace() or ord(c) > 126 for c in leaf):
                assert leaf in heard or json.dumps(leaf, ensure_ascii=False)[1:-1] in heard


@pytest.mark.parametrize("stream", [HELLO, MIXED], ids=["text", "mixed"])
def test_every_event_that_leaves_is_one_of_the_sdks(stream: Events) -> None:
    known: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    for action in (Action.ALLOW, Action.ANNOTATE, Action.BLOCK):
        for body in bodies(read(*stream).render(ruling(action))):
            known.validate_python(body, strict=True)
