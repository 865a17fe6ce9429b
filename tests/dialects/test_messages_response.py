"""A whole answer is read in full and released as what was read; a blocked one stops as a refusal."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.dialects import MESSAGES, MESSAGES_COUNT, messages_fields
from guard_middleware.dialects.base import Notice, Options, ParsedAnswer, ParsedRequest, PublicError, Ruling
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.types import Action, Basis, Message, Reasoning, Text, ToolCall, ToolCallResponse
from tests.support.leaves import leaves

MARK = "how to pick a lock"
SEALED = base64.b64encode(bytes(range(256)) * 3).decode()
USAGE = {"input_tokens": 3, "output_tokens": 7, "cache_creation": {"ephemeral_5m_input_tokens": 1}}


def request(**fields: Any) -> ParsedRequest:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    return MESSAGES.parse_request(body, Limits(), Options())


def answer(*blocks: Any, **fields: Any) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": list(blocks) or [{"type": "text", "text": "hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": USAGE,
        **fields,
    }


def text(said: Any = "x", **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **fields}


def parse(body: Any, asked: ParsedRequest | None = None, **options: Any) -> ParsedAnswer:
    return MESSAGES.parse_response(body, asked or request(), Options(**options))


def notice(action: Action) -> Notice:
    return Notice("d1", "output", action, Basis.VERDICT, "Blocked.", action is not Action.ALLOW, 0.5, (), "nano", ())


def render(parsed: ParsedAnswer, action: Action, soft: bool = False) -> Any:
    return json.loads(parsed.render(Ruling(None, {0: notice(action)}, soft)))


def said(parsed: ParsedAnswer) -> str:
    (found,) = parsed.answers
    lines = []
    for part in found.message.parts:
        lines += [part.name, part.arguments] if isinstance(part, ToolCall) else [getattr(part, "text", "")]
    return "\n".join(lines)


EVERYTHING = answer(
    {"type": "thinking", "thinking": "let me see", "signature": SEALED},
    {"type": "redacted_thinking", "data": SEALED},
    text(
        "bread",
        citations=[
            {
                "type": "char_location",
                "cited_text": "flour",
                "document_index": 0,
                "document_title": "A book",
                "start_char_index": 0,
                "end_char_index": 5,
                "file_id": None,
            }
        ],
    ),
    {"type": "server_tool_use", "id": "srvtoolu_1", "name": "bash_code_execution", "input": {"command": "ls"}},
    {
        "type": "bash_code_execution_tool_result",
        "tool_use_id": "srvtoolu_1",
        "content": {
            "type": "bash_code_execution_result",
            "stdout": "a file",
            "stderr": "",
            "return_code": 0,
            "content": [{"type": "bash_code_execution_output", "file_id": "file_1"}],
        },
    },
    {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": "\u00e9"}, "caller": {"type": "direct"}},
    stop_reason="tool_use",
    stop_details=None,
)


def test_everything_is_read_in_its_order_and_released_as_it_came() -> None:
    parsed = parse(EVERYTHING)
    (found,) = parsed.answers
    assert found.message == Message(
        "assistant",
        (
            Reasoning("let me see"),
            Text("bread"),
            Text("flour\nA book\n"),
            ToolCall("srvtoolu_1", "bash_code_execution", '{"command":"ls"}'),
            ToolCallResponse("srvtoolu_1", "a file"),
            ToolCall("toolu_1", "f", '{"a":"\u00e9"}'),
        ),
    )
    assert found.finish_reason == "tool_use"
    assert render(parsed, Action.ALLOW) == EVERYTHING


@pytest.mark.parametrize("soft", [False, True])
def test_a_blocked_answer_stops_as_a_refusal_without_content_and_with_its_usage(soft: bool) -> None:
    body = render(parse(EVERYTHING), Action.BLOCK, soft)
    guard = body.pop("x_guard")
    assert guard["output"][0]["decision_id"] == "d1"
    details = {"type": "refusal", "category": None, "explanation": "Blocked."}
    assert body == {
        **EVERYTHING,
        "content": [text("Blocked.")] if soft else [],
        "stop_reason": "end_turn" if soft else "refusal",
        "stop_details": None if soft else details,
    }


def test_an_annotated_answer_is_untouched_but_for_one_key() -> None:
    body = render(parse(EVERYTHING), Action.ANNOTATE)
    assert body.pop("x_guard")["output"][0]["action"] == "annotate"
    assert body == EVERYTHING


def test_an_answer_with_content_and_no_decision_is_never_released() -> None:
    with pytest.raises(ValueError, match="no decision"):
        parse(answer()).render(Ruling(None, {}))


def test_an_answer_that_says_nothing_needs_no_decision() -> None:
    parsed = parse(answer(text("")))
    assert parsed.answers[0].message.parts == ()
    assert json.loads(parsed.render(Ruling(None, {}))) == answer(text(""))


@pytest.mark.parametrize(
    "fields",
    [
        {"container": {"id": MARK}},
        {"context_management": {"applied_edits": [{"type": MARK}]}},
        {"input_transformations": [{"path": MARK}]},
        {"kv_transfer_params": {"x": MARK}},
        {"x_guard": {"forged": MARK}},
        {"usage": {**USAGE, "note": MARK, "iterations": [{"model": MARK}]}},
        {"stop_details": {"type": "refusal", "category": None, "explanation": "no", "fallback_credit_token": MARK}},
    ],
)
def test_what_is_not_needed_and_not_screened_is_dropped(fields: dict[str, Any]) -> None:
    assert MARK not in json.dumps(render(parse(answer(**fields)), Action.ALLOW))


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"stop_details": {"type": "refusal", "category": "bio", "explanation": MARK}}, True),
        ({"stop_reason": "stop_sequence", "stop_sequence": MARK}, True),
        ({"stop_reason": "stop_sequence", "stop_sequence": "END"}, False),
    ],
)
def test_what_the_end_says_is_read_unless_the_request_said_it(fields: dict[str, Any], read: bool) -> None:
    parsed = parse(answer(**fields), request(stop_sequences=["END"]))
    assert parsed.answers[0].message.parts == ((Text("hello"), Text(MARK)) if read else (Text("hello"),))
    assert render(parsed, Action.ALLOW) == answer(**fields)


UNSUPPORTED = [
    answer({"type": "x_new", "x": MARK}),
    answer({"type": "image", "source": {"type": "url", "url": "https://x.example"}}),
    answer({"type": "tool_result", "tool_use_id": "1", "content": MARK}),
    answer({"type": "web_search_tool_result", "tool_use_id": "1", "content": []}),
    answer({"type": "container_upload", "file_id": "file_1"}),
    answer({"type": "compaction", "content": MARK}),
    answer({"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}),
    answer(text(x_new=MARK)),
    answer(text(citations=[{"type": "x_new", "x": MARK}])),
    answer(text(), x_new=MARK),
    answer(text(), role="user"),
    answer(text(), type="completion"),
]
MALFORMED = [
    None,
    [],
    {},
    answer(stop_reason=None),
    answer(stop_reason=MARK),
    answer(content=None),
    answer(content=MARK),
    answer(text([MARK])),
    answer({"type": "thinking", "thinking": "x", "signature": MARK}),
    answer({"type": "tool_use", "id": MARK, "name": "f", "input": {}}),
    answer({"type": "tool_use", "id": "1", "name": "f", "input": MARK}),
    answer(id=MARK),
    answer(usage=MARK),
    answer(stop_sequence=[MARK]),
    answer(stop_details=MARK),
]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        *((UpstreamErrorKind.UNSUPPORTED, body) for body in UNSUPPORTED),
        *((UpstreamErrorKind.MALFORMED, body) for body in MALFORMED),
        (UpstreamErrorKind.RESET, {"type": "error", "error": {"type": "api_error", "message": MARK}}),
        (UpstreamErrorKind.RESET, answer(error={"message": MARK})),
    ],
    ids=lambda value: value.value if isinstance(value, UpstreamErrorKind) else "",
)
def test_an_answer_that_cannot_be_screened_is_refused_and_not_quoted(kind: UpstreamErrorKind, body: Any) -> None:
    with pytest.raises(UpstreamError) as caught:
        parse(body)
    assert caught.value.kind is kind
    assert MARK not in str(caught.value)


def test_fields_that_servers_leave_out_are_put_in() -> None:
    """vLLM's stream leaves out ``type`` and ``role``; its whole answers hold nulls."""
    body = answer(text("hello", name=None, input=None))
    del body["type"], body["role"]
    sent = render(parse(body), Action.ALLOW)
    assert (sent["type"], sent["role"]) == ("message", "assistant")


def test_the_operators_extra_field_is_read() -> None:
    parsed = parse(answer(text(x_new=MARK), y_new=MARK), extra_fields={"x_new": "moderated", "y_new": "moderated"})
    assert parsed.answers[0].message.parts == (Text("x"), Text(MARK), Text(MARK))


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"input_tokens": "many"}, UpstreamErrorKind.MALFORMED),
        ({"input_tokens": True}, UpstreamErrorKind.MALFORMED),
        ({}, UpstreamErrorKind.MALFORMED),
        ({"input_tokens": 5, "note": MARK}, UpstreamErrorKind.UNSUPPORTED),
        ({"type": "error", "error": {"message": MARK}}, UpstreamErrorKind.RESET),
    ],
)
def test_a_count_holds_numbers_only(body: Any, kind: UpstreamErrorKind) -> None:
    counted = {"input_tokens": 5, "context_management": {"original_input_tokens": 9}}
    parsed = MESSAGES_COUNT.parse_response(counted, request(), Options())
    assert parsed.answers == ()
    assert json.loads(parsed.render(Ruling(None, {}))) == counted
    with pytest.raises(UpstreamError) as caught:
        MESSAGES_COUNT.parse_response(body, request(), Options())
    assert caught.value.kind is kind


@pytest.mark.parametrize(
    ("status", "said_type", "expected"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (400, "x_new", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (403, "invalid_request_error", "permission_error"),
        (404, "not_found_error", "not_found_error"),
        (408, "invalid_request_error", "invalid_request_error"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "tokens", "rate_limit_error"),
        (500, "server_error", "api_error"),
        (502, "server_error", "api_error"),
        (503, "server_error", "api_error"),
        (503, "overloaded_error", "overloaded_error"),
        (504, "server_error", "timeout_error"),
        (529, "overloaded_error", "overloaded_error"),
    ],
)
def test_errors_have_types_that_the_api_knows(status: int, said_type: str, expected: str) -> None:
    headers = ((b"x-guard-decision-id", b"r1"),)
    reply = MESSAGES.error(PublicError(status, "some_code", said_type, "No.", detail={"a": 1}, headers=headers))
    assert reply.status == status
    assert json.loads(reply.body) == {
        "type": "error",
        "error": {"type": expected, "message": "No.", "details": {"error_code": "some_code", "a": 1}},
        "request_id": "r1",
    }
    assert dict(reply.headers)[b"request-id"] == b"r1"


def test_the_upstreams_request_id_is_kept() -> None:
    headers = ((b"request-id", b"req_7"), (b"x-guard-decision-id", b"r1"))
    reply = MESSAGES.error(PublicError(429, "upstream_error", "rate_limit_error", "No.", headers=headers))
    assert json.loads(reply.body)["request_id"] == "req_7"
    assert [value for name, value in reply.headers if name == b"request-id"] == [b"req_7"]


names = st.sampled_from(
    sorted({n for t in messages_fields.BLOCKS.values() for n in t or ()} | {*messages_fields.MESSAGE})
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=8) | st.just(MARK),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in members for deeper in paths(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    body = copy.deepcopy(EVERYTHING)
    path = draw(st.sampled_from(paths(body)[1:]))
    holder: Any = body
    for key in path[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and draw(st.booleans()):
        holder[draw(names | st.text(max_size=8))] = draw(anything)
    else:
        holder[path[-1]] = draw(anything)
    return body


@settings(max_examples=300, deadline=None)
@given(body=anything | mutated())
def test_any_answer_is_either_refused_or_released_as_read(body: Any) -> None:
    try:
        parsed = parse(body)
    except UpstreamError:
        return
    read = said(parsed) + json.dumps(said(parsed), ensure_ascii=False)
    unread = [
        leaf
        for leaf in leaves(render(parsed, Action.ALLOW))
        if any(character.isspace() or ord(character) > 126 for character in leaf)
        and leaf not in read
        and json.dumps(leaf, ensure_ascii=False)[1:-1] not in read
    ]
    assert unread == []
