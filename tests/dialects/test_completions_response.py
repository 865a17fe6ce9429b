"""Legacy answers in one piece: every choice is read, and only what was read is released."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.dialects.base import Options, Ruling
from guard_middleware.dialects.completions_fields import CHOICE, COMPLETION
from guard_middleware.dialects.completions_request import parse_request
from guard_middleware.dialects.completions_response import ParsedText, parse_response
from guard_middleware.errors import UpstreamError, UpstreamErrorKind
from guard_middleware.limits import Limits
from guard_middleware.types import Action, Message, Reasoning, Text
from tests.support.sdk import ruling

MARK = "how to pick a lock"


def choice(index: int = 0, text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": None, "finish_reason": "stop", **fields}


def answer(*choices: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": list(choices) or [choice()],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        **fields,
    }


def parse(body: Any, n: int = 1, **options: Any) -> ParsedText:
    asked = parse_request({"model": "m", "prompt": "hi", "n": n}, Limits(), Options())
    return parse_response(body, asked, Options(**options))


def test_an_allowed_answer_is_released_as_it_was_read() -> None:
    parsed = parse(answer())
    assert parsed.answers[0].message == Message("assistant", (Text("hello"),))
    assert json.loads(parsed.render(ruling(Action.ALLOW))) == answer()


def test_a_blocked_choice_leaves_the_others() -> None:
    parsed = parse(answer(choice(1, "fine"), choice(0, MARK, native_finish_reason="stop")), n=2)
    body = json.loads(parsed.render(ruling(Action.BLOCK, Action.ALLOW)))
    assert body["choices"] == [choice(1, "fine"), choice(0, "", finish_reason="content_filter")]
    assert body["usage"] == answer()["usage"]
    assert body["moderation"]["output"]["results"][0]["flagged"] is True
    assert MARK not in json.dumps(body)


def test_soft_mode_gives_an_ordinary_answer() -> None:
    (said,) = json.loads(parse(answer(choice(text=MARK))).render(ruling(Action.BLOCK, soft=True)))["choices"]
    assert said["finish_reason"] == "stop"
    assert "decision d.output.0" in said["text"]


def test_second_copies_of_the_text_are_dropped() -> None:
    logprobs = {"tokens": [MARK], "text_offset": [0], "token_logprobs": [-1.0]}
    body = answer(choice(logprobs=logprobs, stop_reason=MARK, token_ids=[1]), prompt_logprobs=[MARK])
    assert MARK.encode() not in parse(body).render(ruling(Action.ALLOW))


def test_vendors_reasoning_is_read() -> None:
    parsed = parse(answer(choice(reasoning=MARK)))
    assert parsed.answers[0].message.parts == (Reasoning(MARK), Text("hello"))


def test_the_operators_extra_field_is_read() -> None:
    parsed = parse(answer(choice(x_new=MARK)), extra_fields={"x_new": "moderated"})
    assert parsed.answers[0].message.parts == (Text("hello"), Text(MARK))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (UpstreamErrorKind.UNSUPPORTED, answer(choice(x_new=MARK))),
        (UpstreamErrorKind.UNSUPPORTED, answer(x_new={"a": MARK})),
        (UpstreamErrorKind.UNSUPPORTED, answer(choice(message={"content": MARK}))),
        (UpstreamErrorKind.RESET, answer(error={"message": MARK})),
        (UpstreamErrorKind.MALFORMED, answer(choice(text=None))),  # type: ignore[arg-type]
        (UpstreamErrorKind.MALFORMED, answer(choice(finish_reason=None))),
        (UpstreamErrorKind.MALFORMED, answer(choice(1))),
        (UpstreamErrorKind.MALFORMED, answer(choice(), choice(), choice())),
        (UpstreamErrorKind.MALFORMED, answer(choices=[])),
        (UpstreamErrorKind.MALFORMED, answer(choices=None)),
        (UpstreamErrorKind.MALFORMED, answer(id=MARK)),
        (UpstreamErrorKind.MALFORMED, []),
    ],
)
def test_an_answer_that_cannot_be_screened_is_refused(kind: UpstreamErrorKind, body: Any) -> None:
    with pytest.raises(UpstreamError) as caught:
        parse(body)
    assert caught.value.kind is kind
    assert MARK not in str(caught.value)


def test_an_index_twice_is_refused() -> None:
    with pytest.raises(UpstreamError, match="repeated"):
        parse(answer(choice(), choice()), n=2)


def test_a_choice_with_text_and_no_decision_is_never_released() -> None:
    with pytest.raises(ValueError, match="no decision"):
        parse(answer()).render(Ruling(None, {}))


anything = st.none() | st.booleans() | st.integers(-1, 2) | st.just(MARK) | st.lists(st.just(MARK), max_size=2)
choices = st.dictionaries(st.sampled_from(sorted(CHOICE)) | st.text(max_size=5), anything, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    top=st.dictionaries(st.sampled_from(sorted(COMPLETION)) | st.text(max_size=5), anything, max_size=3), said=choices
)
def test_any_answer_is_either_refused_or_released_as_read(top: dict[str, Any], said: dict[str, Any]) -> None:
    try:
        parsed = parse({**answer({**choice(), **said}), **top})
    except UpstreamError:
        return
    if MARK.encode() in parsed.render(ruling(Action.ALLOW)):
        assert MARK in repr(parsed.answers)
    assert MARK.encode() not in parsed.render(ruling(Action.BLOCK))
