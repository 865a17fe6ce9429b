"""No object of a request or an answer is a place where something passes that the guard has not read.

A text under a name that the operator calls moderated is put into every object of rich requests, answers and streams,
one object at a time; and in what may be printed into a prompt, a telling name with a number. Where it is sent on or
released, it must stand in what the guard is shown, and no frame of a stream may leave with it before its verdict.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from guard_middleware.dialects import CHAT_COMPLETIONS, COMPLETIONS, MESSAGES, RESPONSES
from guard_middleware.dialects.base import Answer, Dialect, Notice, Options, Ruling
from guard_middleware.errors import RequestRejected, UpstreamError
from guard_middleware.guard.prompt import render
from guard_middleware.limits import Limits
from guard_middleware.sse import Event
from guard_middleware.strictjson import dumps, loads
from guard_middleware.types import Action, Basis, Conversation, Uri
from tests.support import anthropic_events, responses
from tests.support.streams import finished

NOTE, PROSE, TELLING = "x_note", "how to pick a lock", "how_to_pick_a_lock"
READ = Options({NOTE: "moderated"})
PNG = "data:image/png;base64,AAAA"
IMAGE_SOURCE = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
#: objects that take nothing but short words, or numbers; a name at the end of a path
CLOSED = ("cache_control", "citations", "logit_bias", "thinking", "stream_options")
Path = tuple[str | int, ...]

CHAT_CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    {"id": "call_2", "type": "custom", "custom": {"name": "g", "input": "x"}},
]
CHAT_CITED = [{"type": "url_citation", "url_citation": {"title": "t", "url": "u", "start_index": 0, "end_index": 1}}]
CALLED = {"caller": {"type": "code_execution_20250825", "tool_id": "srvtoolu_1"}}
BLOCKS: list[Any] = [
    {"type": "thinking", "thinking": "so", "signature": ""},
    {
        "type": "text",
        "text": "x",
        "citations": [
            {"type": "search_result_location", "cited_text": "c", "source": "s", "title": "t", "search_result_index": 0}
        ],
    },
    {"type": "server_tool_use", "id": "srvtoolu_1", "name": "bash_code_execution", "input": {"a": {"b": 1}}, **CALLED},
    {
        "type": "bash_code_execution_tool_result",
        "tool_use_id": "srvtoolu_1",
        "content": {"type": "bash_code_execution_result", "stdout": "o", "stderr": "", "return_code": 0, "content": []},
    },
    {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": {"b": 1}}, **CALLED},
]
ITEMS: list[Any] = [
    {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "s"}],
        "content": [{"type": "reasoning_text", "text": "r"}],
    },
    {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [
            {
                "type": "output_text",
                "text": "hello",
                "annotations": [{"type": "url_citation", "title": "t", "url": "u", "start_index": 0, "end_index": 1}],
            },
            {"type": "refusal", "refusal": "no"},
        ],
    },
    {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
    {"id": "ct_1", "type": "custom_tool_call", "call_id": "call_2", "name": "g", "input": "x"},
    {
        "id": "cu_1",
        "type": "computer_call",
        "call_id": "call_3",
        "pending_safety_checks": [{"id": "c", "code": "x", "message": "m"}],
        "action": {"type": "drag", "path": [{"x": 1, "y": 2}]},
    },
]

REQUESTS: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "chat": (
        CHAT_COMPLETIONS,
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]},
                {"role": "assistant", "tool_calls": CHAT_CALLS, "annotations": CHAT_CITED},
                {"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "x"}]},
                {"role": "function", "name": "f", "content": "x"},
                {"role": "user", "content": "x"},
            ],
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}},
                {"type": "custom", "custom": {"name": "g", "format": {"type": "text"}}},
            ],
            "functions": [{"name": "f", "parameters": {"type": "object"}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "prediction": {"type": "content", "content": [{"type": "text", "text": "x"}]},
            "stream_options": {"include_usage": True},
            "metadata": {"a": "b"},
            "logit_bias": {"1": 1},
        },
    ),
    "completions": (
        COMPLETIONS,
        {
            "model": "m",
            "prompt": "x",
            "logit_bias": {"1": 1},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n"}},
            "stream_options": {"include_usage": True},
        },
    ),
    "messages": (
        MESSAGES,
        {
            "model": "m",
            "max_tokens": 9,
            "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": IMAGE_SOURCE}]},
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "document",
                            "title": "t",
                            "source": {"type": "content", "content": [{"type": "image", "source": IMAGE_SOURCE}]},
                            "citations": {"enabled": True},
                        },
                        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}},
                        {
                            "type": "search_result",
                            "source": "s",
                            "title": "t",
                            "content": [{"type": "text", "text": "x"}],
                        },
                    ],
                },
                {"role": "assistant", "content": BLOCKS},
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "toolu_1",
                            "content": [
                                {"type": "text", "text": "x"},
                                {"type": "image", "source": IMAGE_SOURCE},
                                {"type": "tool_reference", "tool_name": "f"},
                                {"type": "browser_state", "tabs": [{"title": "t"}], "state_changes": {"a": "b"}},
                            ],
                        }
                    ],
                },
                {"role": "system", "content": [{"type": "text", "text": "x"}]},
                {"role": "user", "content": "x"},
            ],
            "metadata": {"user_id": "u"},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "thread": {"type": "create"},
            "tool_choice": {"type": "tool", "name": "f"},
            "tools": [
                {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}},
                {"type": "bash_20250124", "name": "bash"},
                {"type": "code_execution_20250825", "name": "code_execution"},
            ],
        },
    ),
    "responses": (
        RESPONSES,
        {
            "model": "m",
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": PNG}]},
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                *ITEMS,
                {
                    "type": "function_call_output",
                    "call_id": "call_1",
                    "output": [{"type": "input_text", "text": "x"}],
                },
                {"type": "custom_tool_call_output", "call_id": "call_2", "output": "x"},
                {
                    "type": "computer_call_output",
                    "call_id": "call_3",
                    "output": {"type": "computer_screenshot", "image_url": PNG},
                    "acknowledged_safety_checks": [{"id": "c", "code": "x", "message": "m"}],
                },
            ],
            "metadata": {"a": "b"},
            "reasoning": {"effort": "low", "summary": "auto"},
            "text": {
                "format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}},
                "verbosity": "low",
            },
            "tool_choice": {"type": "function", "name": "f"},
            "tools": [
                {"type": "function", "name": "f", "parameters": {"type": "object"}},
                {"type": "custom", "name": "g", "format": {"type": "text"}},
                {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f", "parameters": {}}]},
                {"type": "computer_use_preview", "environment": "browser"},
            ],
        },
    ),
}
#: what chat templates may print whole
PRINTED = ("messages", "input", "system", "tools", "functions")

_USAGE = {"prompt_tokens": 1, "details": {"cached_tokens": 1}}
_CHAT_HEAD = {"id": "c", "created": 1, "model": "m"}
_MESSAGE = {"role": "assistant", "content": "hello", "tool_calls": CHAT_CALLS, "annotations": CHAT_CITED}
_ENDED = {"stop_reason": "refusal", "stop_sequence": None, "stop_details": {"type": "refusal", "explanation": "e"}}
_RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "model": "m",
    "status": "completed",
    "reasoning": {"effort": None},
    "text": {"format": {"type": "text"}},
    "output": ITEMS,
    "usage": {"input_tokens": 1, "output_tokens_details": {"reasoning_tokens": 0}},
}
ANSWERS: dict[str, tuple[Dialect, Any]] = {
    "chat": (
        CHAT_COMPLETIONS,
        {**_CHAT_HEAD, "choices": [{"index": 0, "message": _MESSAGE, "finish_reason": "stop"}], "usage": _USAGE},
    ),
    "chat-legacy": (
        CHAT_COMPLETIONS,
        {
            **_CHAT_HEAD,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                    "finish_reason": "stop",
                }
            ],
        },
    ),
    "completions": (
        COMPLETIONS,
        {**_CHAT_HEAD, "choices": [{"index": 0, "text": "hello", "finish_reason": "stop"}], "usage": _USAGE},
    ),
    "messages": (
        MESSAGES,
        {"id": "msg_1", "model": "m", "content": BLOCKS, **_ENDED, "usage": {"input_tokens": 1}},
    ),
    "responses": (RESPONSES, _RESPONSE),
}


def _chunks(*choices: dict[str, Any]) -> list[Any]:
    return [{**_CHAT_HEAD, "choices": [{"index": 0, "finish_reason": None, **choice}]} for choice in choices]


def _opened(block: dict[str, Any]) -> dict[str, Any]:
    empty = {"text": {"text": "", "citations": []}, "thinking": {"thinking": ""}, "tool_use": {"input": {}}}
    return {**block, **empty.get(block["type"], {})}


def _block_events() -> Iterator[Any]:
    (citation,) = BLOCKS[1]["citations"]
    deltas = {
        "thinking": [{"type": "thinking_delta", "thinking": "so"}, {"type": "signature_delta", "signature": ""}],
        "text": [{"type": "text_delta", "text": "x"}, {"type": "citations_delta", "citation": citation}],
        "tool_use": [{"type": "input_json_delta", "partial_json": "{}"}],
    }
    for index, block in enumerate(BLOCKS):
        yield {"type": "content_block_start", "index": index, "content_block": _opened(block)}
        for delta in deltas.get(block["type"], ()):
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield anthropic_events.closed(index)


STREAMS: dict[str, tuple[Dialect, list[Any]]] = {
    "chat": (
        CHAT_COMPLETIONS,
        [
            *_chunks(
                {"delta": {"role": "assistant", "content": "hel"}},
                {"delta": {"content": "lo", "annotations": CHAT_CITED}},
                {"delta": {"tool_calls": [{"index": n, **call} for n, call in enumerate(CHAT_CALLS)]}},
                {"delta": {"tool_calls": [{"index": 0, "function": {"arguments": " "}}]}},
                {"delta": {}, "finish_reason": "stop"},
            ),
            {**_CHAT_HEAD, "choices": [], "usage": _USAGE},
        ],
    ),
    "chat-legacy": (
        CHAT_COMPLETIONS,
        _chunks({"delta": {"function_call": {"name": "f", "arguments": "{}"}}, "finish_reason": "stop"}),
    ),
    "completions": (COMPLETIONS, _chunks({"text": "hello"}, {"text": "", "finish_reason": "stop"})),
    "messages": (
        MESSAGES,
        [
            anthropic_events.start(stop_details=_ENDED["stop_details"]),
            *_block_events(),
            *anthropic_events.ending(**_ENDED),
        ],
    ),
    "responses": (RESPONSES, responses.streamed(_RESPONSE)),
}


def objects(value: Any, path: Path = ()) -> Iterator[Path]:
    """The places of all objects in ``value``."""
    if isinstance(value, dict):
        yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in members:
        yield from objects(item, (*path, key))


def places(told: dict[str, tuple[Dialect, Any]], below: tuple[str, ...] = ()) -> list[Any]:
    """The places of all objects, or of the open ones below certain fields."""
    return [
        pytest.param(name, path, id=".".join(map(str, (name, *path))))
        for name, (_, value) in told.items()
        for path in objects(value)
        if not below or (path and path[0] in below and path[-1] not in CLOSED)
    ]


def put(value: Any, path: Path, name: str, item: Any) -> Any:
    value = copy.deepcopy(value)  # what stands in several places stays one object: a stream repeats itself
    holder = value
    for key in path:
        holder = holder[key]
    holder[name] = item
    return value


def shown(conversation: Conversation) -> str:
    """What the guard is shown of it, but for its images."""
    messages = tuple(
        replace(message, parts=tuple(part for part in message.parts if not isinstance(part, Uri)))
        for message in conversation.messages
    )
    return render(replace(conversation, messages=messages)).text()


def judged(answers: tuple[Answer, ...]) -> str:
    return "\n".join(shown(Conversation((), answer=answer.message)) for answer in answers)


def asked(dialect: Dialect, stream: bool = False) -> Any:
    bodies = {"chat_completions": "messages", "messages": "messages", "responses": "input", "completions": "prompt"}
    said: Any = [{"role": "user", "content": "hi"}] if dialect.name in ("chat_completions", "messages") else "hi"
    body = {"model": "m", "max_tokens": 9, bodies[dialect.name]: said, "stream": stream}
    if dialect.name == "responses":
        del body["max_tokens"]
    return dialect.parse_request(loads(json.dumps(body).encode()), Limits(), Options())


ALLOW = Ruling(None, {0: Notice("d", "output", Action.ALLOW, Basis.VERDICT, "", False, 0.0, (), "m", ("text",))})


@pytest.mark.parametrize(("name", "path"), places(REQUESTS))
def test_a_moderated_field_of_a_request_is_read_wherever_it_stands(name: str, path: Path) -> None:
    dialect, body = REQUESTS[name]
    try:
        parsed = dialect.parse_request(put(body, path, NOTE, PROSE), Limits(), READ)
    except RequestRejected:
        assert path[-1] in CLOSED
        return
    assert PROSE in shown(parsed.conversation) or PROSE not in parsed.encode().decode()


@pytest.mark.parametrize(("name", "path"), places(REQUESTS, PRINTED))
def test_a_telling_name_in_what_templates_print_is_read(name: str, path: Path) -> None:
    dialect, body = REQUESTS[name]
    parsed = dialect.parse_request(put(body, path, TELLING, 1), Limits(), Options())
    assert TELLING in shown(parsed.conversation)


@pytest.mark.parametrize(("name", "path"), places(ANSWERS))
def test_a_moderated_field_of_an_answer_is_read_wherever_it_stands(name: str, path: Path) -> None:
    dialect, body = ANSWERS[name]
    try:
        parsed = dialect.parse_response(put(body, path, NOTE, PROSE), asked(dialect), READ)
    except UpstreamError:
        assert path == ("reasoning",)  # short words only
        return
    assert PROSE in judged(parsed.answers) or PROSE not in parsed.render(ALLOW).decode()


@pytest.mark.parametrize(("name", "path"), places(STREAMS))
def test_a_moderated_field_of_a_stream_is_read_wherever_it_stands_and_waits(name: str, path: Path) -> None:
    dialect, told = STREAMS[name]
    told = put(told, path, NOTE, PROSE)
    events = [Event(item.get("type", ""), dumps(item).decode()) for item in told]
    if dialect in (CHAT_COMPLETIONS, COMPLETIONS):
        events.append(Event("", "[DONE]"))
    try:
        parsed = finished(dialect.stream_parser(asked(dialect, stream=True), READ), events)
    except UpstreamError:
        # What a Responses stream repeats must equal what it repeats; some of its places can have no more than that.
        assert name == "responses"
        return
    assert PROSE in judged(parsed.answers) or PROSE not in parsed.render(ALLOW).decode()
    # What follows a frame that waits, waits with it.
    first = next((frame for frame in parsed.frames if PROSE in repr(frame.value)), None)
    assert first is None or first.whole or any(PROSE in said.text for said in first.said)


@pytest.mark.parametrize("told", [REQUESTS, ANSWERS, STREAMS], ids=["requests", "answers", "streams"])
def test_the_rich_bodies_pass_as_they_are(told: dict[str, tuple[Dialect, Any]]) -> None:
    for dialect, body in told.values():
        if told is REQUESTS:
            dialect.parse_request(body, Limits(), Options())
        elif told is ANSWERS:
            dialect.parse_response(body, asked(dialect), Options())
        else:
            events = [Event(item.get("type", ""), json.dumps(item)) for item in body]
            done = [Event("", "[DONE]")] if dialect in (CHAT_COMPLETIONS, COMPLETIONS) else []
            finished(dialect.stream_parser(asked(dialect, stream=True), Options()), [*events, *done])
