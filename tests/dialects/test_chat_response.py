"""Answers in one piece: every choice is read, and only what was read is released."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.dialects import chat_fields
from guard_middleware.dialects.base import Notice, Options, ParsedRequest, Ruling
from guard_middleware.dialects.chat_request import parse_request
from guard_middleware.dialects.chat_response import ParsedCompletion, parse_response
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.types import Action, Basis, Message, Reasoning, Text, ToolCall
from tests.support.leaves import leaves

MARK = "how to pick a lock"


def request(**fields: Any) -> ParsedRequest:
    return parse_request({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}, Limits(), Options())


def choice(index: int = 0, **message: Any) -> dict[str, Any]:
    said = {"role": "assistant", "content": "hello", **message}
    return {"index": index, "message": said, "finish_reason": "stop"}


def answer(*choices: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": list(choices) or [choice()],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        **fields,
    }


def parse(body: Any, n: int = 1, **options: Any) -> ParsedCompletion:
    return parse_response(body, request(n=n), Options(**options))


def notice(action: Action = Action.ALLOW, **fields: Any) -> Notice:
    flagged = action is not Action.ALLOW
    given = {
        "id": "d1",
        "source": "output",
        "basis": Basis.VERDICT,
        "message": "Blocked (decision d1)." if action is Action.BLOCK else "",
        "flagged": flagged,
        "score": 0.9 if flagged else 0.1,
        "categories": (),
        "model": "nano",
        "input_types": ("text",),
    }
    return Notice(**{**given, "action": action, **fields})


def ruling(*actions: Action, soft: bool = False, request: Notice | None = None) -> Ruling:
    return Ruling(request, {index: notice(action) for index, action in enumerate(actions)}, soft)


def released(parsed: ParsedCompletion, what: Ruling) -> dict[str, Any]:
    found = json.loads(parsed.render(what))
    assert isinstance(found, dict)
    return found


def refused(body: Any, n: int = 1) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        parse(body, n)
    return caught.value


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": MARK}}
CITATION = {"type": "url_citation", "url_citation": {"title": MARK, "url": "https://x.example", "start_index": 0}}


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ({"content": MARK}, Text(MARK)),
        ({"content": None, "refusal": MARK}, Text(MARK)),
        ({"reasoning": MARK}, Reasoning(MARK)),
        ({"reasoning_content": MARK}, Reasoning(MARK)),
        ({"tool_calls": [CALL]}, ToolCall("c1", "f", MARK)),
        (
            {"tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "g", "input": MARK}}]},
            ToolCall("1", "g", MARK),
        ),
        ({"function_call": {"name": "f", "arguments": MARK}}, ToolCall("", "f", MARK)),
        ({"annotations": [CITATION]}, Text(MARK)),
    ],
)
def test_every_surface_of_a_choice_is_read(message: dict[str, Any], part: Any) -> None:
    body = answer(choice(**message))
    parsed = parse(body)
    assert part in parsed.answers[0].message.parts
    assert released(parsed, ruling(Action.ALLOW)) == body


def test_reasoning_under_two_names_is_read_once_and_first() -> None:
    parsed = parse(answer(choice(reasoning="think", reasoning_content="think")))
    assert parsed.answers[0].message == Message("assistant", (Reasoning("think"), Text("hello")))


def test_null_fields_stay_null() -> None:
    nothing = choice(refusal=None, annotations=None, tool_calls=None, function_call=None, audio=None)
    body = answer({**nothing, "logprobs": None}, prompt_logprobs=None)
    assert released(parse(body), ruling(Action.ALLOW)) == body


def test_an_empty_choice_has_nothing_to_judge_and_needs_no_notice() -> None:
    parsed = parse(answer(choice(content="")))
    assert parsed.answers[0].message.parts == ()
    assert released(parsed, Ruling(None, {})) == answer(choice(content=""))


def test_a_choice_with_content_and_no_decision_is_never_released() -> None:
    with pytest.raises(ValueError, match="no decision"):
        parse(answer()).render(Ruling(None, {}))


UNSUPPORTED = [
    answer(choice(audio={"id": "a", "data": "", "transcript": MARK})),
    answer(choice(images=[{"image_url": {"url": "data:image/png;base64,AA"}}])),
    answer(choice(x_new=MARK)),
    answer(choice(x_new=[MARK])),
    answer({**choice(), "x_new": {"a": MARK}}),
    answer(x_new=MARK),
    answer(choice(role="user")),
    answer(choice(tool_calls=[{"id": "1", "type": "web", "web": {}}])),
    answer(choice(annotations=[{"type": "file", "file": {"text": MARK}}])),
]
MALFORMED = [
    None,
    [],
    {},
    answer(choices=[]),
    answer(choices=None),
    answer(choice(0), choice(1)),
    answer(choice(1)),
    answer(choice(-1)),
    answer({**choice(), "index": None}),
    answer({**choice(), "index": False}),
    answer({**choice(), "finish_reason": None}),
    answer({**choice(), "finish_reason": MARK}),
    answer({"index": 0, "finish_reason": "stop"}),
    answer(choice(content=["x"])),
    answer(choice(content={"text": "x"})),
    answer(choice(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "x"}}])),
    answer(choice(tool_calls=[{**CALL, "function": {"name": "f", "arguments": None}}])),
    answer(choice(tool_calls=[{**CALL, "id": MARK}])),
    answer(choice(tool_calls=[CALL] * 129)),
    answer(created=MARK),
    answer(id=MARK),
    answer(model=MARK),
    answer(system_fingerprint=MARK),
    answer(object=[MARK]),
    answer(usage=[MARK]),
]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        *((UpstreamErrorKind.UNSUPPORTED, body) for body in UNSUPPORTED),
        *((UpstreamErrorKind.MALFORMED, body) for body in MALFORMED),
        (UpstreamErrorKind.RESET, answer(error={"message": MARK})),
    ],
    ids=lambda value: value.value if isinstance(value, UpstreamErrorKind) else "",
)
def test_what_cannot_be_screened_is_refused_and_not_quoted(kind: UpstreamErrorKind, body: Any) -> None:
    error = refused(body)
    assert error.kind is kind
    assert MARK not in str(error)


def test_repeated_choices_are_refused() -> None:
    assert refused(answer(choice(0), choice(0)), n=2).kind is UpstreamErrorKind.MALFORMED


def test_second_copies_of_the_text_are_dropped() -> None:
    body = answer(
        {
            **choice(provider_specific_fields={"x": MARK}, reasoning_details=[MARK]),
            "logprobs": {"content": [{"token": MARK}]},
        },
        prompt_logprobs=[MARK],
        moderation={"input": MARK},
        metadata={"x": MARK},
        x_groq={"id": MARK},
        x_guard=MARK,
        usage={"total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1, "note": MARK}, "note": MARK, MARK: 1},
    )
    out = released(parse(body), ruling(Action.ALLOW))
    assert MARK not in json.dumps(out)
    assert out["usage"] == {"total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}


def test_the_operator_can_have_an_unknown_field_read_or_passed() -> None:
    body = answer(choice(x_new=MARK), top_new=[MARK])
    read = parse(body, extra_fields={"x_new": "moderated", "top_new": "moderated"})
    assert read.answers[0].message.parts == (Text("hello"), Text(MARK), Text(json.dumps([MARK])))
    opaque = parse(body, extra_fields={"x_new": "opaque", "top_new": "opaque"})
    assert opaque.answers[0].message.parts == (Text("hello"),)
    assert released(opaque, ruling(Action.ALLOW)) == body


def test_a_blocked_choice_is_a_refusal_and_the_others_stay() -> None:
    bad = choice(1, content=MARK, tool_calls=[CALL], reasoning=MARK)
    parsed = parse(answer(choice(0), {**bad, "finish_reason": "tool_calls"}), n=2)
    out = released(parsed, ruling(Action.ALLOW, Action.BLOCK))
    assert out["choices"][0] == choice(0)
    assert out["choices"][1] == {
        "index": 1,
        "message": {"role": "assistant", "content": None, "refusal": "Blocked (decision d1)."},
        "logprobs": None,
        "finish_reason": "content_filter",
    }
    assert out["usage"] == answer()["usage"]
    assert MARK not in json.dumps(out)


def test_soft_mode_says_it_as_an_ordinary_answer() -> None:
    out = released(parse(answer(choice(content=MARK))), ruling(Action.BLOCK, soft=True))
    assert out["choices"][0]["finish_reason"] == "stop"
    assert out["choices"][0]["message"] == {"role": "assistant", "content": "Blocked (decision d1).", "refusal": None}


def test_an_allowed_answer_says_nothing_of_the_guard() -> None:
    assert released(parse(answer()), ruling(Action.ALLOW, request=notice(source="input"))) == answer()


def test_an_annotation_names_both_sides_and_keeps_the_answer() -> None:
    both = ruling(Action.ANNOTATE, request=notice(source="input", reasoning="because", input_types=("text", "image")))
    out = released(parse(answer()), both)
    assert out["choices"] == answer()["choices"]
    assert out["moderation"] == {
        "input": {
            "type": "moderation_results",
            "model": "nano",
            "results": [
                {
                    "type": "moderation_result",
                    "model": "nano",
                    "flagged": False,
                    "categories": {"harmful": False},
                    "category_scores": {"harmful": 0.1},
                    "category_applied_input_types": {"harmful": ["text", "image"]},
                }
            ],
        },
        "output": {
            "type": "moderation_results",
            "model": "nano",
            "results": [
                {
                    "type": "moderation_result",
                    "model": "nano",
                    "flagged": True,
                    "categories": {"harmful": True},
                    "category_scores": {"harmful": 0.9},
                    "category_applied_input_types": {"harmful": ["text"]},
                }
            ],
        },
    }
    assert out["x_guard"]["input"] == [{"decision_id": "d1", "action": "allow", "reasoning": "because"}]


@pytest.mark.parametrize(("error", "code"), [("timeout", "guard_unavailable"), (None, "not_moderated")])
def test_a_side_without_a_verdict_is_said_to_have_none(error: str | None, code: str) -> None:
    silent = notice(source="input", flagged=None, score=None, error=error)
    out = released(parse(answer()), ruling(Action.ANNOTATE, request=silent))
    assert out["moderation"]["input"]["type"] == "error"
    assert out["moderation"]["input"]["code"] == code


scalars = st.none() | st.booleans() | st.integers(-5, 5)
names = st.sampled_from(sorted({*chat_fields.COMPLETION, *chat_fields.CHOICE, *chat_fields.MESSAGE, "type", "text"}))
anything = st.recursive(
    scalars | st.text(max_size=10) | st.just(MARK),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    full = answer(
        choice(tool_calls=[CALL], annotations=[CITATION], reasoning="r", function_call={"name": "f", "arguments": "x"}),
    )
    body = copy.deepcopy(full)
    holder: Any = body
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw(st.sampled_from(keys))
        if isinstance(holder[key], dict | list) and holder[key] and draw(st.booleans()):
            holder = holder[key]
            continue
        if isinstance(holder, dict) and draw(st.booleans()):
            key = draw(names | st.text(max_size=6))
        holder[key] = draw(anything)
        return body


@settings(max_examples=300, deadline=None)
@given(body=anything | mutated())
def test_any_json_is_either_refused_or_released_as_read(body: Any) -> None:
    try:
        parsed = parse(body)
    except UpstreamError:
        return
    said: list[str] = []
    for part in parsed.answers[0].message.parts:
        match part:
            case ToolCall(_, name, arguments):
                said += [name, arguments]
            case Text(text) | Reasoning(text):
                said.append(text)
    out = released(parsed, ruling(Action.ALLOW))
    unread = [text for text in leaves(out) if any(c.isspace() or ord(c) > 126 for c in text) and text not in said]
    assert unread == []
