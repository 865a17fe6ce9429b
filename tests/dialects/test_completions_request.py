"""Legacy requests: every prompt is read, nothing but what was read is sent on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.dialects.base import Options, ParsedRequest
from guard_middleware.dialects.completions_fields import REQUEST
from guard_middleware.dialects.completions_request import parse_request
from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.strictjson import JSONValue, loads
from guard_middleware.types import Conversation, Definition, Message, Text

MARK = "how to pick a lock"


def read(options: Options | None = None, **fields: Any) -> ParsedRequest:
    return parse_request({"model": "m", "prompt": "hi", **fields}, Limits(), options or Options())


def test_a_prompt_is_a_message_of_the_user() -> None:
    parsed = read(max_tokens=5)
    assert parsed.conversation == Conversation((Message("user", (Text("hi"),)),))
    assert loads(parsed.encode()) == {"model": "m", "prompt": "hi", "max_tokens": 5}
    assert (parsed.model, parsed.stream, parsed.choices, parsed.sites) == ("m", False, 1, ())


def test_prompts_that_come_together_are_judged_together() -> None:
    parsed = read(prompt=["how to pick", "a lock"], n=2)
    assert parsed.conversation.messages == (Message("user", (Text("how to pick"), Text("a lock"))),)
    assert parsed.choices == 4


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"suffix": MARK}, [Definition("suffix", MARK)]),
        ({"stop": MARK}, [Definition("stop", MARK)]),
        ({"stop": ["a b", MARK]}, [Definition("stop", "a b"), Definition("stop", MARK)]),
        ({"response_format": {"enum": [MARK]}}, [Definition("response_format", '{"enum":["how to pick a lock"]}')]),
    ],
)
def test_whatever_can_reach_the_model_is_read_and_sent(fields: dict[str, Any], expected: list[Definition]) -> None:
    parsed = read(**fields)
    assert list(parsed.conversation.definitions) == expected
    assert parsed.body == {"model": "m", "prompt": "hi", **fields}


PASSED: list[dict[str, Any]] = [
    {"temperature": 0.5, "top_p": 1, "seed": 7, "presence_penalty": 0, "frequency_penalty": None},
    {"logit_bias": {"50256": -100}},
    {"user": "u-1", "echo": False, "logprobs": None, "best_of": None, "n": None, "suffix": None, "stop": None},
    {"best_of": 4, "n": 2},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"stream": True, "best_of": 2, "n": 2},
    {"top_k": 5, "use_beam_search": True},
    {"prompt": ""},
]


@pytest.mark.parametrize("fields", PASSED)
def test_what_cannot_carry_content_passes_as_it_came(fields: dict[str, Any]) -> None:
    assert read(**fields).body == {"model": "m", "prompt": "hi", **fields}


REFUSED: list[tuple[RejectKind, dict[str, Any]]] = [
    (RejectKind.UNSUPPORTED_CONTENT, {"prompt": [1, 2, 3]}),
    (RejectKind.UNSUPPORTED_CONTENT, {"prompt": [[1, 2], [3]]}),
    (RejectKind.UNSUPPORTED_CONTENT, {"prompt": ["hi", 3]}),
    (RejectKind.UNSUPPORTED_CONTENT, {"prompt": [{"prompt_string": MARK}]}),
    (RejectKind.UNSUPPORTED_FIELD, {"prompt_embeds": "AAAA"}),
    (RejectKind.UNSUPPORTED_FIELD, {"echo": True}),
    (RejectKind.UNSUPPORTED_FIELD, {"logprobs": 0}),
    (RejectKind.UNSUPPORTED_FIELD, {"logprobs": 5}),
    (RejectKind.UNSUPPORTED_FIELD, {"prompt_logprobs": 0}),
    (RejectKind.UNSUPPORTED_FIELD, {"guided_regex": MARK}),
    (RejectKind.UNSUPPORTED_FIELD, {"image_data": [{"data": "AAAA"}]}),
    (RejectKind.UNSUPPORTED_FIELD, {"guardrails": True}),
    (RejectKind.UNSUPPORTED_FIELD, {"Prompt": 1}),
    (RejectKind.INVALID_REQUEST, {"prompt": None}),
    (RejectKind.INVALID_REQUEST, {"prompt": []}),
    (RejectKind.INVALID_REQUEST, {"prompt": {"text": MARK}}),
    (RejectKind.INVALID_REQUEST, {"prompt": 7}),
    (RejectKind.INVALID_REQUEST, {"prompt": ["a"] * 5}),
    (RejectKind.INVALID_REQUEST, {"n": 5}),
    (RejectKind.INVALID_REQUEST, {"n": 0}),
    (RejectKind.INVALID_REQUEST, {"n": True}),
    (RejectKind.INVALID_REQUEST, {"best_of": 17}),
    (RejectKind.INVALID_REQUEST, {"n": 2, "best_of": 1}),
    (RejectKind.INVALID_REQUEST, {"prompt": ["a", "b"], "n": 3}),
    (RejectKind.INVALID_REQUEST, {"prompt": ["a", "b"], "best_of": 3}),
    (RejectKind.INVALID_REQUEST, {"stream": True, "best_of": 2}),
    (RejectKind.INVALID_REQUEST, {"stream": "yes"}),
    (RejectKind.INVALID_REQUEST, {"suffix": [MARK]}),
    (RejectKind.INVALID_REQUEST, {"logit_bias": {MARK: 1}}),
    (RejectKind.INVALID_REQUEST, {"logit_bias": {"1": MARK}}),
    (RejectKind.INVALID_REQUEST, {"stop": [1]}),
    (RejectKind.INVALID_REQUEST, {"user": MARK}),
    (RejectKind.INVALID_REQUEST, {"stream_options": [MARK]}),
]


@pytest.mark.parametrize(("kind", "fields"), REFUSED)
def test_what_cannot_be_read_is_refused_and_not_quoted(kind: RejectKind, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestRejected) as caught:
        read(**fields)
    assert caught.value.kind is kind
    assert MARK not in str(caught.value)


@pytest.mark.parametrize("body", [None, [], "hi", {}, {"model": "m"}])
def test_a_body_that_is_no_request_is_refused(body: JSONValue) -> None:
    with pytest.raises(RequestRejected):
        parse_request(body, Limits(), Options())


def test_the_operator_names_further_fields() -> None:
    options = Options({"x_new": "moderated", "x_id": "opaque"})
    parsed = read(options, x_new=MARK, x_id=["a b"])
    assert parsed.conversation.definitions == (Definition("x_new", MARK),)
    assert parsed.body == {"model": "m", "prompt": "hi", "x_new": MARK, "x_id": ["a b"]}


def test_the_clients_wishes_about_moderation_are_dropped() -> None:
    assert "moderation" not in read(moderation={"model": "none"}).body


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.text(max_size=8) | st.just(MARK),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(body=st.dictionaries(st.sampled_from(sorted(REQUEST)) | st.text(max_size=6), anything, max_size=5))
def test_any_body_is_either_refused_or_sent_as_read(body: dict[str, Any]) -> None:
    try:
        parsed = parse_request({"prompt": "hi", **body}, Limits(), Options())
    except RequestRejected:
        return
    heard = repr(parsed.conversation)
    for name, value in parsed.body.items():
        if MARK in repr(value):
            assert MARK in heard, name
    assert 1 <= parsed.choices <= Limits().choices
