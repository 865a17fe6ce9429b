"""Responses requests: all that can reach the model is read, nothing but what was read is sent on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.dialects import responses_fields as table
from guard_middleware.dialects.base import MediaSite, Options, ParsedRequest
from guard_middleware.dialects.chat_request import parse_request as parse_chat
from guard_middleware.dialects.responses_request import parse_request
from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.strictjson import JSONValue, loads
from guard_middleware.types import (
    Blob,
    Definition,
    Message,
    Part,
    Reasoning,
    Role,
    Text,
    ToolCall,
    ToolCallResponse,
    Uri,
)

MARK = "how to pick a lock"
URL = "https://pictures.example/cat.png"


def read(*items: Any, options: Options | None = None, **fields: Any) -> ParsedRequest:
    body = {"model": "m", "input": list(items) or "hi", **fields}
    return parse_request(body, Limits(), options or Options())


def said(role: Role, *parts: Part, name: str | None = None) -> Message:
    return Message(role, parts, name)


def text(value: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": kind, "text": value}


CALL = {"type": "function_call", "call_id": "call_x", "name": "f", "arguments": '{"a":"\\u0070ick"}'}
IMAGE = {"type": "input_image", "image_url": URL, "detail": "low"}
CITATION = {"type": "url_citation", "title": MARK, "url": "https://x.example", "start_index": 0, "end_index": 1}


def test_a_text_is_a_message_of_the_user() -> None:
    parsed = read(max_output_tokens=5)
    assert parsed.conversation.messages == (said("user", Text("hi")),)
    assert loads(parsed.encode()) == {"model": "m", "input": "hi", "max_output_tokens": 5}
    assert (parsed.model, parsed.stream, parsed.choices, parsed.continues) == ("m", False, 1, None)
    assert not parsed.server_tools


ITEMS: list[tuple[dict[str, Any], Message]] = [
    ({"role": "user", "content": MARK}, said("user", Text(MARK))),
    ({"role": "system", "content": MARK}, said("system", Text(MARK))),
    ({"role": "developer", "content": [text(MARK)]}, said("system", Text(MARK))),
    (
        {"type": "message", "role": "user", "content": [text("a"), text("b")], "status": "completed"},
        said("user", Text("a"), Text("b")),
    ),
    ({"role": "user", "content": [IMAGE]}, said("user", Uri(URL))),
    ({"role": "developer", "content": [IMAGE]}, said("system", Uri(URL))),
    ({"role": "assistant", "content": MARK, "phase": "commentary"}, said("assistant", Text(MARK))),
    (
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [
                {**text("a", "output_text"), "annotations": [CITATION]},
                {"type": "refusal", "refusal": "b"},
                {**text("", "output_text"), "annotations": None},
            ],
        },
        said("assistant", Text("a"), Text(MARK), Text("https://x.example"), Text("b")),
    ),
    (CALL | {"id": "fc_1", "status": "completed"}, said("assistant", ToolCall("call00001", "f", '{"a":"pick"}'))),
    (CALL | {"id": "", "status": ""}, said("assistant", ToolCall("call00001", "f", '{"a":"pick"}'))),  # as it came
    (CALL | {"namespace": "n"}, said("assistant", ToolCall("call00001", "n.f", '{"a":"pick"}'))),
    (
        {"type": "function_call_output", "call_id": "call_x", "output": MARK},
        said("tool", ToolCallResponse("call00001", MARK)),
    ),
    (
        {"type": "function_call_output", "call_id": "call_x", "output": [text(MARK), IMAGE], "name": "f"},
        said("tool", ToolCallResponse("call00001", MARK), Uri(URL), name="f"),
    ),
    (
        {"type": "custom_tool_call", "call_id": "call_x", "name": "g", "input": "raw \\u0070"},
        said("assistant", ToolCall("call00001", "g", "raw \\u0070")),
    ),
    (
        {"type": "custom_tool_call_output", "call_id": "call_x", "output": [IMAGE, text(MARK)]},
        said("tool", Uri(URL), ToolCallResponse("call00001", MARK)),
    ),
    (
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [text("a", "summary_text")],
            "content": [text("b", "reasoning_text")],
            "encrypted_content": "gAAAAB",
        },
        said("assistant", Reasoning("a"), Reasoning("b")),
    ),
    ({"type": "reasoning", "id": "rs_1", "summary": [], "content": None}, said("assistant")),
    (
        {
            "type": "computer_call",
            "id": "cu_1",
            "call_id": "call_x",
            "status": "completed",
            "pending_safety_checks": [],
            "action": {"type": "type", "text": MARK},
        },
        said(
            "assistant",
            ToolCall(
                "call00001",
                "computer",
                '{"action":{"type":"type","text":"how to pick a lock"},"pending_safety_checks":[]}',
            ),
        ),
    ),
    (
        {
            "type": "computer_call_output",
            "call_id": "call_x",
            "output": {"type": "computer_screenshot", "image_url": URL},
            "acknowledged_safety_checks": [{"id": "1", "message": MARK}],
        },
        said("tool", Uri(URL), Text('[{"id":"1","message":"how to pick a lock"}]')),
    ),
]


@pytest.mark.parametrize(
    ("item", "expected"), ITEMS, ids=lambda v: v.get("type", "easy") if isinstance(v, dict) else ""
)
def test_every_item_is_read_and_sent_as_it_was_read(item: dict[str, Any], expected: Message) -> None:
    parsed = read(item)
    assert parsed.conversation.messages == (expected,)
    renamed = item | ({"call_id": "call00001"} if "call_id" in item else {})
    assert parsed.body["input"] == [renamed]


def test_instructions_come_first() -> None:
    parsed = read({"role": "user", "content": "hi"}, instructions=MARK)
    assert parsed.conversation.messages == (said("system", Text(MARK)), said("user", Text("hi")))


def test_a_conversation_reads_like_that_of_the_chat_dialect() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat: JSONValue = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "u"}, {"type": "image_url", "image_url": {"url": URL}}],
            },
            {"role": "assistant", "reasoning_content": "r", "content": "c", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "out"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
        ],
    }
    parsed = read(
        {"role": "user", "content": [text("u"), IMAGE]},
        {"type": "reasoning", "summary": [text("r", "summary_text")]},
        {"role": "assistant", "content": [text("c", "output_text")]},
        {"type": "function_call", "call_id": "b", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "b", "output": "out"},
        instructions="s",
        tools=[{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": None}],
    )
    assert parsed.conversation == parse_chat(chat, Limits(), Options()).conversation


def test_canonical_bytes_replace_every_picture_wherever_it_stands() -> None:
    parsed = read(
        {"role": "user", "content": [text("x"), IMAGE]},
        CALL,
        {"type": "function_call_output", "call_id": "call_x", "output": [IMAGE]},
        {"type": "custom_tool_call_output", "call_id": "call_x", "output": [text("x"), IMAGE]},
        {
            "type": "computer_call_output",
            "call_id": "call_y",
            "output": {"type": "computer_screenshot", "image_url": URL},
        },
    )
    assert parsed.sites == (
        MediaSite(URL, ("input", 0, "content", 1, "image_url")),
        MediaSite(URL, ("input", 2, "output", 0, "image_url")),
        MediaSite(URL, ("input", 3, "output", 1, "image_url")),
        MediaSite(URL, ("input", 4, "output", "image_url")),
    )
    blob = Blob("image/png", b"plain")
    filled = parsed.with_media({URL: blob})
    assert URL not in filled.encode().decode()
    assert filled.encode().count(b"data:image/png;base64,cGxhaW4=") == 4
    assert filled.conversation.blobs() == (blob,) * 4


def test_ids_of_calls_are_renamed_alike_and_tell_the_model_nothing() -> None:
    parsed = read(
        CALL | {"call_id": MARK},
        CALL | {"call_id": "other"},
        {"type": "function_call_output", "call_id": MARK, "output": "x"},
    )
    assert [item["call_id"] for item in parsed.body["input"]] == ["call00001", "call00002", "call00001"]  # type: ignore[index,union-attr,call-overload]


def test_a_request_that_continues_keeps_the_ids_and_has_them_read() -> None:
    output = {"type": "function_call_output", "call_id": "call_of_the_stored_answer", "output": "x"}
    parsed = read(output, output, previous_response_id="resp_1")
    assert parsed.continues == "resp_1"
    assert parsed.body == {"model": "m", "input": [output, output], "previous_response_id": "resp_1"}
    assert parsed.conversation.definitions == (Definition("call_id", "call_of_the_stored_answer"),)


SCHEMA = {"type": "json_schema", "name": "n", "schema": {"enum": [MARK]}, "strict": True}
DEFINED: list[tuple[dict[str, Any], list[Definition]]] = [
    (
        {"tools": [{"type": "function", "name": "f", "parameters": {"enum": [MARK]}, "strict": True}]},
        [Definition("tool", '{"name":"f","parameters":{"enum":["how to pick a lock"]}}')],
    ),
    (
        {"tools": [{"type": "custom", "name": "g", "format": {"type": "grammar", "definition": MARK}}]},
        [Definition("tool", '{"name":"g","format":{"type":"grammar","definition":"how to pick a lock"}}')],
    ),
    (
        {
            "tools": [
                {"type": "namespace", "name": "n", "description": MARK, "tools": [{"type": "custom", "name": "g"}]}
            ]
        },
        [Definition("tool", '{"name":"n","description":"how to pick a lock"}'), Definition("tool", '{"name":"g"}')],
    ),
    (
        {"tools": [{"type": "function", "name": "f", "parameters": None, "x_new": 7}]},
        [Definition("tool", '{"name":"f"}'), Definition("tool", "x_new 7")],
    ),
    ({"tools": [{"type": "computer_use_preview", "display_width": 800, "environment": "linux"}]}, []),
    ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, []),
    (
        {"text": {"format": SCHEMA}},
        [
            Definition(
                "response_format",
                '{"type":"json_schema","name":"n","schema":{"enum":["how to pick a lock"]},"strict":true}',
            )
        ],
    ),
    ({"text": {"verbosity": "pick-a-lock"}}, [Definition("text.verbosity", "pick-a-lock")]),
    ({"reasoning": {"effort": "high", "summary": "auto"}}, []),
    ({"reasoning": {"effort": "pick-a-lock"}}, [Definition("reasoning.effort", "pick-a-lock")]),
    ({"tool_choice": "required"}, []),
    (
        {"tool_choice": {"type": "function", "name": MARK}},
        [Definition("tool_choice", '{"type":"function","name":"how to pick a lock"}')],
    ),
    ({"metadata": {"a": "b"}}, []),
    ({"metadata": {"a": MARK}}, [Definition("metadata", f"a: {MARK}")]),
]


@pytest.mark.parametrize(("fields", "expected"), DEFINED)
def test_whatever_steers_the_model_is_read_and_sent(fields: dict[str, Any], expected: list[Definition]) -> None:
    parsed = read(**fields)
    assert list(parsed.conversation.definitions) == expected
    assert parsed.body == {"model": "m", "input": "hi", **fields}


PASSED: list[dict[str, Any]] = [
    {"store": True, "parallel_tool_calls": False, "temperature": 1, "top_p": None, "max_tool_calls": 3},
    {"background": False, "truncation": "disabled", "top_logprobs": 0, "prompt": None, "conversation": None},
    {"include": ["reasoning.encrypted_content"], "stream": True, "stream_options": {"include_obfuscation": False}},
    {"include": None, "metadata": None, "reasoning": None, "text": None, "tools": None, "truncation": None},
    {"safety_identifier": "", "user": "", "service_tier": ""},
    {"safety_identifier": "s-1", "user": "u-1", "prompt_cache_key": "k", "service_tier": "auto"},
    {"prompt_cache_options": {"mode": "implicit"}, "image": {"context_compression": "auto"}, "top_k": 4},
]


@pytest.mark.parametrize("fields", PASSED)
def test_what_cannot_carry_content_passes_as_it_came(fields: dict[str, Any]) -> None:
    parsed = read(**fields)
    assert parsed.body == {"model": "m", "input": "hi", **fields}
    assert parsed.conversation.definitions == ()
    assert parsed.include_usage is parsed.stream is bool(fields.get("stream"))


CONTENT, FIELD, INVALID = RejectKind.UNSUPPORTED_CONTENT, RejectKind.UNSUPPORTED_FIELD, RejectKind.INVALID_REQUEST
REFUSED_FIELDS: list[tuple[RejectKind, dict[str, Any]]] = [
    (FIELD, {"prompt": {"id": "pmpt_1"}}),
    (FIELD, {"conversation": "conv_1"}),
    (FIELD, {"conversation": {"id": "conv_1"}}),
    (FIELD, {"background": True}),
    (FIELD, {"truncation": "auto"}),
    (FIELD, {"context_management": [{"type": "compaction"}]}),
    (FIELD, {"include": ["message.output_text.logprobs"]}),
    (FIELD, {"include": ["web_search_call.results"]}),
    (FIELD, {"include": [MARK]}),
    (FIELD, {"include": [[MARK]]}),
    (FIELD, {"top_logprobs": 3}),
    (FIELD, {"previous_input_messages": [{"role": "user", "content": MARK}]}),
    (FIELD, {"chat_template": MARK}),
    (FIELD, {"guardrails": False}),
    (FIELD, {"x_new": MARK}),
    (FIELD, {"Input": 1}),
    (FIELD, {"metadata": {"guardrails": "off"}}),
    (FIELD, {"reasoning": {"x_new": MARK}}),
    (FIELD, {"text": {"x_new": [MARK]}}),
    (FIELD, {"tools": [{"type": "function", "name": "f", "x_new": MARK}]}),
    (CONTENT, {"text": {"format": {"type": "grammar", "grammar": MARK}}}),
    *((CONTENT, {"tools": [{"type": kind}]}) for kind, rules in table.TOOLS.items() if rules is None),
    (CONTENT, {"tools": [{"type": "x_new"}]}),
    (CONTENT, {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "mcp", "server_url": URL}]}]}),
    (
        CONTENT,
        {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "namespace", "name": "o", "tools": []}]}]},
    ),
    (INVALID, {"tools": [{"type": "function"}]}),
    (INVALID, {"tools": [{"type": "function", "name": [MARK]}]}),
    (INVALID, {"tools": [{"name": "f"}]}),
    (INVALID, {"tools": {}}),
    (INVALID, {"tools": [{"type": "custom", "name": "f"}] * 129}),
    (INVALID, {"instructions": [MARK]}),
    (INVALID, {"previous_response_id": MARK}),
    (INVALID, {"include": "reasoning.encrypted_content"}),
    (INVALID, {"stream": "yes"}),
    (INVALID, {"store": MARK}),
    (INVALID, {"text": MARK}),
    (INVALID, {"text": {"format": {"name": "n"}}}),
    (INVALID, {"reasoning": {"summary": MARK}}),
    (INVALID, {"input": None}),
    (INVALID, {"input": []}),
    (INVALID, {"input": {"role": "user"}}),
    (INVALID, {"input": [1, 2, 3]}),
    (INVALID, {"input": ["hi"]}),
]
REFUSED_ITEMS: list[tuple[RejectKind, dict[str, Any]]] = [
    *((CONTENT, {"type": kind, "id": "x"}) for kind, rules in table.INPUT_ITEMS.items() if rules is None),
    (CONTENT, {"type": "x_new", "content": MARK}),
    (CONTENT, {"role": "tool", "content": MARK}),
    (CONTENT, {"role": "critic", "content": MARK}),
    (CONTENT, {"role": "user", "content": [text(MARK, "output_text")]}),
    (CONTENT, {"role": "user", "content": [text(MARK, "text")]}),
    (CONTENT, {"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}),
    (CONTENT, {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
    (CONTENT, {"role": "user", "content": [{"type": "x_new", "x": MARK}]}),
    (CONTENT, {"role": "assistant", "content": [IMAGE]}),
    (CONTENT, {"role": "assistant", "content": [text(MARK, "reasoning_text")]}),
    (CONTENT, {"type": "reasoning", "summary": [text(MARK, "reasoning_text")]}),
    (CONTENT, {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_file", "file_url": URL}]}),
    (CONTENT, {"type": "computer_call_output", "call_id": "a", "output": IMAGE}),
    (CONTENT, {"role": "assistant", "content": [{**text("a", "output_text"), "annotations": [{"type": "x"}]}]}),
    (FIELD, {"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}),
    (FIELD, {"role": "user", "content": [IMAGE | {"x_new": MARK}]}),
    (FIELD, {"role": "user", "content": "hi", "x_new": MARK}),
    (FIELD, CALL | {"x_new": {"a": MARK}}),
    (INVALID, {"id": "msg_1"}),
    (INVALID, {"content": MARK}),
    (INVALID, {"role": "user"}),
    (INVALID, {"role": "user", "content": None}),
    (INVALID, {"role": "user", "content": {"text": MARK}}),
    (INVALID, {"role": "user", "content": [MARK]}),
    (INVALID, {"role": "user", "content": [{"type": "input_text"}]}),
    (INVALID, {"role": "user", "content": [{"type": "input_image"}]}),
    (INVALID, {"role": "user", "content": [{"type": "input_image", "image_url": {"url": URL}}]}),
    (INVALID, {"type": "function_call", "call_id": "a", "name": "f"}),
    (INVALID, {"type": "function_call", "name": "f", "arguments": "{}"}),
    (INVALID, {"type": "function_call", "call_id": "a", "name": "f", "arguments": {"a": MARK}}),
    (INVALID, {"type": "function_call_output", "call_id": "a"}),
    (INVALID, {"type": "function_call_output", "call_id": 7, "output": "x"}),
    (INVALID, {"type": "computer_call_output", "call_id": "a", "output": MARK}),
    (INVALID, {"type": "reasoning", "summary": MARK}),
    (INVALID, {"type": "reasoning", "summary": [], "encrypted_content": MARK}),
    (INVALID, {"role": "user", "content": "hi", "id": MARK}),
]


@pytest.mark.parametrize(("kind", "fields"), REFUSED_FIELDS)
def test_a_field_that_cannot_be_read_is_refused_and_not_quoted(kind: RejectKind, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestRejected) as caught:
        read(**fields)
    assert caught.value.kind is kind, caught.value
    assert MARK not in str(caught.value)


@pytest.mark.parametrize(("kind", "item"), REFUSED_ITEMS)
def test_an_item_that_cannot_be_read_is_refused_and_not_quoted(kind: RejectKind, item: dict[str, Any]) -> None:
    with pytest.raises(RequestRejected) as caught:
        read({"role": "user", "content": "hi"}, item)
    assert caught.value.kind is kind, caught.value
    assert MARK not in str(caught.value)
    assert (caught.value.param or "").startswith("input[1]")


def test_a_call_id_that_could_say_something_cannot_continue() -> None:
    with pytest.raises(RequestRejected):
        read({"type": "function_call_output", "call_id": MARK, "output": "x"}, previous_response_id="resp_1")


def test_one_picture_too_many_is_refused() -> None:
    with pytest.raises(RequestRejected) as caught:
        read(*[{"type": "function_call_output", "call_id": "a", "output": [IMAGE]}] * (Limits().images + 1))
    assert caught.value.kind is RejectKind.TOO_MANY_IMAGES


@pytest.mark.parametrize("body", [None, [], "hi", {}, {"model": "m"}])
def test_a_body_that_is_no_request_is_refused(body: JSONValue) -> None:
    with pytest.raises(RequestRejected):
        parse_request(body, Limits(), Options())


def test_unknown_names_in_items_are_read_because_templates_may_print_them() -> None:
    parsed = read({"role": "user", "content": [text("hi") | {"pick_a_lock": 1}], "x_new": True})
    assert parsed.conversation.messages == (said("user", Text("hi"), Text("pick_a_lock 1"), Text("x_new true")),)


def test_the_operator_names_further_fields() -> None:
    options = Options({"x_new": "moderated", "x_id": "opaque"})
    parsed = read({"role": "user", "content": "hi", "x_new": MARK}, options=options, x_new=MARK, x_id=["a b"])
    assert parsed.conversation.definitions == (Definition("x_new", MARK),)
    assert parsed.conversation.messages == (said("user", Text("hi"), Text(MARK)),)


def test_the_clients_wishes_about_moderation_are_dropped() -> None:
    assert "moderation" not in read(moderation={"model": "none", "policy": {"input": {"mode": "score"}}}).body


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["", "user", "assistant", "message", MARK, URL]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(sorted(table.PARTS))},
    optional={name: anything | st.just(MARK) for name in ("text", "refusal", "image_url", "annotations", "x_new")},
)
items = st.fixed_dictionaries(
    {"type": st.sampled_from(sorted(table.INPUT_ITEMS))},
    optional={
        "role": st.sampled_from(["user", "assistant", "developer", "tool"]),
        "call_id": st.sampled_from(["a", "b", MARK]),
        **{name: anything for name in ("name", "arguments", "input", "action", "id", "status", "x_new", "namespace")},
        **{name: st.just(MARK) | st.lists(parts, max_size=2) | parts for name in ("content", "output", "summary")},
    },
)
bodies = st.dictionaries(st.sampled_from(sorted(table.REQUEST)) | st.text(max_size=6), anything, max_size=4)


@settings(max_examples=400, deadline=None)
@given(body=bodies, asked=st.just("hi") | st.lists(items, max_size=4))
def test_any_body_is_either_refused_or_sent_as_read(body: dict[str, Any], asked: Any) -> None:
    try:
        parsed = parse_request({**body, "input": asked}, Limits(), Options())
    except RequestRejected:
        return
    heard = repr(parsed.conversation)
    assert (MARK in heard) or MARK not in repr(parsed.body)
    assert sorted(site.uri for site in parsed.sites) == sorted(
        part.uri for message in parsed.conversation.messages for part in message.parts if isinstance(part, Uri)
    )
