"""Responses answers in one piece: every item is read, and only what was read is released."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response

from guard_middleware.dialects import responses_fields as table
from guard_middleware.dialects.base import Options, Ruling
from guard_middleware.dialects.responses_request import parse_request
from guard_middleware.dialects.responses_response import ParsedResponse, parse_response
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.types import Action, Message, Part, Reasoning, Text, ToolCall
from tests.support.sdk import ruling

MARK = "how to pick a lock"
USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 2,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 5,
}


def part(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], **fields}


def say(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": list(parts) or [part()],
        **fields,
    }


def think(summary: str = "", content: str = "", **fields: Any) -> dict[str, Any]:
    return {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": summary}] if summary else [],
        **({"content": [{"type": "reasoning_text", "text": content}]} if content else {}),
        **fields,
    }


def call(arguments: str = "{}", name: str = "f", **fields: Any) -> dict[str, Any]:
    said = {"name": name, "arguments": arguments, "status": "completed"}
    return {"id": "fc_1", "type": "function_call", "call_id": "call_1", **said, **fields}


def answer(*output: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "m",
        "output": list(output) or [say()],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "reasoning": {"effort": None, "summary": None},
        "text": {"format": {"type": "text"}},
        "usage": USAGE,
        **fields,
    }


def parse(body: Any, asked: dict[str, Any] | None = None, **options: Any) -> ParsedResponse:
    request = parse_request({"model": "m", "input": "hi", **(asked or {})}, Limits(), Options())
    return parse_response(body, request, Options(**options))


def test_an_allowed_answer_is_released_as_it_was_read() -> None:
    parsed = parse(answer())
    assert parsed.answer_id == "resp_1"
    assert [(a.index, a.message, a.finish_reason) for a in parsed.answers] == [
        (0, Message("assistant", (Text("hello"),)), "completed")
    ]
    assert json.loads(parsed.render(ruling(Action.ALLOW))) == answer()


CITATION = {"type": "url_citation", "title": MARK, "url": "https://x.example", "start_index": 0, "end_index": 1}
FILE = {"type": "file_citation", "file_id": "file-1", "filename": MARK, "index": 0}
CUSTOM = {"id": "ct_1", "type": "custom_tool_call", "call_id": "call_1", "name": "g", "input": "\\u0070"}
COMPUTER = {
    "id": "cu_1",
    "type": "computer_call",
    "call_id": "call_1",
    "status": "completed",
    "pending_safety_checks": [],
    "action": {"type": "type", "text": MARK},
}
READ: list[tuple[dict[str, Any], tuple[Part, ...]]] = [
    (say(part("a"), part("b")), (Text("a"), Text("b"))),
    (say({"type": "refusal", "refusal": MARK}), (Text(MARK),)),
    (say(part("a", annotations=[CITATION, FILE])), (Text("a"), Text(MARK), Text("https://x.example"), Text(MARK))),
    (say(phase="commentary"), (Text("hello"),)),
    (think("a", "b", encrypted_content="gAAAAAB"), (Reasoning("a"), Reasoning("b"))),
    (think(content=None, summary=""), ()),  # type: ignore[arg-type]
    (call('{"a":"\\u0070ick"}'), (ToolCall("call_1", "f", '{"a":"pick"}'),)),
    (call(namespace="n", caller={"type": "direct"}), (ToolCall("call_1", "n.f", "{}"),)),
    (CUSTOM, (ToolCall("call_1", "g", "\\u0070"),)),
    (
        COMPUTER,
        (
            ToolCall(
                "call_1",
                "computer",
                '{"action":{"type":"type","text":"how to pick a lock"},"pending_safety_checks":[]}',
            ),
        ),
    ),
]


@pytest.mark.parametrize(("item", "expected"), READ, ids=lambda v: v["type"] if isinstance(v, dict) else "")
def test_every_item_is_read_and_released_as_it_was_read(item: dict[str, Any], expected: tuple[Part, ...]) -> None:
    parsed = parse(answer(item))
    assert parsed.answers[0].message.parts == expected
    if expected:
        assert json.loads(parsed.render(ruling(Action.ALLOW)))["output"] == [item]


def test_all_items_are_one_answer() -> None:
    parsed = parse(answer(think("a"), say(part("b")), call("{}")))
    assert parsed.answers[0].message.parts == (Reasoning("a"), Text("b"), ToolCall("call_1", "f", "{}"))


def test_a_blocked_answer_is_a_refusal_and_nothing_else() -> None:
    body = answer(think(MARK), say(part(MARK)), call(MARK), completed_at=7)
    out = json.loads(parse(body).render(ruling(Action.BLOCK)))
    assert MARK not in json.dumps(out)
    assert (out["status"], out["incomplete_details"], out["completed_at"]) == (
        "incomplete",
        {"reason": "content_filter"},
        None,
    )
    (item,) = out["output"]
    (said,) = item["content"]
    assert item["status"] == "incomplete"
    assert said["type"] == "refusal"
    assert "decision d.output.0" in said["refusal"]
    assert out["usage"] == USAGE
    assert out["moderation"]["output"]["flagged"] is True
    read = Response.model_validate(out)
    assert read.moderation is not None
    assert (read.output_text, read.moderation.output.type) == ("", "moderation_result")


def test_soft_mode_gives_an_ordinary_answer() -> None:
    out = Response.model_validate_json(parse(answer(say(part(MARK)))).render(ruling(Action.BLOCK, soft=True)))
    assert (out.status, out.incomplete_details) == ("completed", None)
    assert "decision d.output.0" in out.output_text


def test_an_annotation_is_one_result_for_each_side() -> None:
    out = Response.model_validate_json(parse(answer()).render(ruling(Action.ANNOTATE)))
    assert out.output_text == "hello"
    assert out.moderation is not None
    assert (out.moderation.input.type, out.moderation.output.type) == ("moderation_result", "moderation_result")


def test_what_the_request_said_comes_back_as_it_said_it() -> None:
    asked: dict[str, Any] = {
        "instructions": "be kind",
        "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
        "tool_choice": "required",
        "metadata": {"a": "b"},
    }
    told = answer(instructions=MARK, tools=[{"description": MARK}], tool_choice={"name": MARK}, metadata={"a": MARK})
    out = json.loads(parse(told, asked).render(ruling(Action.ALLOW)))
    assert {name: out[name] for name in asked} == asked
    assert out["text"] == {"format": {"type": "text"}}


def test_second_copies_of_the_text_are_dropped() -> None:
    body = answer(
        say(part(logprobs=[{"token": MARK}])), output_text=MARK, input_messages=[MARK], output_messages=[MARK]
    )
    assert MARK.encode() not in parse(body).render(ruling(Action.ALLOW))


def test_why_an_answer_is_incomplete_is_kept() -> None:
    body = answer(say(status="incomplete"), status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    parsed = parse(body)
    assert parsed.answers[0].finish_reason == "max_output_tokens"
    assert json.loads(parsed.render(ruling(Action.ALLOW))) == body


def test_an_answer_without_items_needs_no_decision() -> None:
    parsed = parse({**answer(), "output": []})
    assert parsed.answers[0].message.parts == ()
    assert json.loads(parsed.render(Ruling(None, {})))["output"] == []


def test_the_operators_extra_fields_are_read() -> None:
    body = answer(say(part(x_new="a"), x_new="b"), x_new="c")
    assert parse(body, extra_fields={"x_new": "moderated"}).answers[0].message.parts == (
        Text("hello"),
        Text("a"),
        Text("b"),
        Text("c"),
    )


UNSUPPORTED, MALFORMED, RESET = UpstreamErrorKind.UNSUPPORTED, UpstreamErrorKind.MALFORMED, UpstreamErrorKind.RESET
BROKEN: list[tuple[UpstreamErrorKind, Any]] = [
    *((UNSUPPORTED, answer({"type": kind, "id": "x"})) for kind, rules in table.OUTPUT_ITEMS.items() if rules is None),
    (UNSUPPORTED, answer({"type": "x_new", "text": MARK})),
    (UNSUPPORTED, answer(say(x_new=MARK))),
    (UNSUPPORTED, answer(say(part(x_new=MARK)))),
    (UNSUPPORTED, answer(say({"type": "output_audio", "transcript": MARK}))),
    (UNSUPPORTED, answer(say({"type": "reasoning_text", "text": MARK}))),
    (UNSUPPORTED, answer(say({"type": "input_text", "text": MARK}))),
    (UNSUPPORTED, answer(say(part(annotations=[{"type": "x_new", "x": MARK}])))),
    (UNSUPPORTED, answer(say(role="user"))),
    (UNSUPPORTED, answer(x_new=MARK)),
    (UNSUPPORTED, answer(status="queued")),
    (UNSUPPORTED, answer(status="in_progress")),
    (RESET, answer(status="failed")),
    (RESET, answer(status="cancelled")),
    (RESET, answer(error={"code": "server_error", "message": MARK})),
    (MALFORMED, answer(status=None)),
    (MALFORMED, answer(id=None)),
    (MALFORMED, answer(id=MARK)),
    (MALFORMED, answer(output=None)),
    (MALFORMED, answer(output={"a": 1})),
    (MALFORMED, answer(incomplete_details={"reason": MARK})),
    (MALFORMED, answer(reasoning={"summary": MARK})),
    (MALFORMED, answer(say(content=None))),
    (MALFORMED, answer(say(content=MARK))),
    (MALFORMED, answer(say(part(text=None)))),  # type: ignore[arg-type]
    (MALFORMED, answer(call(arguments=None))),  # type: ignore[arg-type]
    (MALFORMED, answer(call(call_id=None))),
    (MALFORMED, answer(call(call_id=MARK))),
    (MALFORMED, answer(think(encrypted_content=MARK))),
    (MALFORMED, answer(think(summary_index=0, summary="") | {"summary": MARK})),
    (MALFORMED, []),
    (MALFORMED, {}),
]


@pytest.mark.parametrize(("kind", "body"), BROKEN)
def test_an_answer_that_cannot_be_screened_is_refused_and_not_quoted(kind: UpstreamErrorKind, body: Any) -> None:
    with pytest.raises(UpstreamError) as caught:
        parse(body)
    assert caught.value.kind is kind, caught.value
    assert MARK not in str(caught.value)


def test_an_answer_with_content_and_no_decision_is_never_released() -> None:
    with pytest.raises(ValueError, match="no decision"):
        parse(answer()).render(Ruling(None, {}))


anything = st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from([MARK, "completed"])
anything = anything | st.lists(anything, max_size=2) | st.dictionaries(st.sampled_from(["a", "type"]), anything)
outputs = st.sampled_from([say(), think("a", "b"), call(), CUSTOM, COMPUTER]).flatmap(
    lambda item: st.dictionaries(st.sampled_from([*item, "x_new", "content", "summary"]), anything, max_size=3).map(
        lambda changed: {**item, **changed}
    )
)


@settings(max_examples=400, deadline=None)
@given(
    top=st.dictionaries(st.sampled_from(sorted(table.RESPONSE)) | st.text(max_size=5), anything, max_size=3),
    output=st.lists(outputs, max_size=3),
)
def test_any_answer_is_either_refused_or_released_as_read(top: dict[str, Any], output: list[Any]) -> None:
    try:
        parsed = parse({**answer(*output), **top})
    except UpstreamError:
        return
    if MARK.encode() in parsed.render(ruling(Action.ALLOW)):
        assert MARK in repr(parsed.answers)
    assert MARK.encode() not in parsed.render(ruling(Action.BLOCK))
