"""A server's answer is one completion with text or it is an error; a score is read where the label was written."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Blob, Usage
from guard_middleware.worker.completions import TOP_LOGPROBS, Completion, Token, body, read, score
from guard_middleware.worker.guards.base import Output, Question, Turn, Words
from tests.support.scripted_endpoint import completion

SAFE = Words(("unsafe",), ("safe",))
SEVERITY = Words(("Unsafe", "Controversial"), ("Safe",))


def answer(**changes):
    said = completion("safe", reasoning="because")
    choice = said["choices"][0]
    for name, value in changes.items():
        place = choice["message"] if name in choice["message"] else choice if name in choice else said
        place[name] = value
    return json.dumps(said).encode()


def test_a_completion_is_read_with_its_usage_and_its_servers_reasoning():
    read_ = read(answer())
    assert (read_.output, read_.usage, read_.tokens) == (Output("safe", "because"), Usage(30, 7, 2), ())


def test_the_older_name_of_reasoning_is_known():
    said = json.loads(answer(reasoning=None))
    said["choices"][0]["message"]["reasoning_content"] = "because"
    assert read(json.dumps(said).encode()).output.reasoning == "because"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"finish_reason": "length"}, GuardErrorKind.TRUNCATED),
        ({"finish_reason": "length", "content": None}, GuardErrorKind.TRUNCATED),
        ({"finish_reason": "content_filter"}, GuardErrorKind.UNPARSEABLE),
        ({"finish_reason": None}, GuardErrorKind.UNPARSEABLE),
        ({"tool_calls": [{"id": "1"}]}, GuardErrorKind.UNPARSEABLE),
        ({"refusal": "No."}, GuardErrorKind.UNPARSEABLE),
        ({"content": None}, GuardErrorKind.UNPARSEABLE),
        ({"content": [{"type": "text", "text": "safe"}]}, GuardErrorKind.UNPARSEABLE),
        ({"reasoning": 5}, GuardErrorKind.UNPARSEABLE),
        ({"choices": []}, GuardErrorKind.UNAVAILABLE),
        ({"choices": None}, GuardErrorKind.UNAVAILABLE),
        ({"usage": 5}, GuardErrorKind.UNAVAILABLE),
        ({"logprobs": {"content": [{"token": "a", "top_logprobs": [{"token": "a"}]}]}}, GuardErrorKind.UNAVAILABLE),
    ],
)
def test_every_other_answer_is_an_error(changes, kind):
    with pytest.raises(GuardError) as caught:
        read(answer(**changes))
    assert caught.value.kind is kind


@pytest.mark.parametrize("raw", [b"", b"nope", b"[]", b"{}", b"5", b"[" * 100_000, b'{"choices": [{}]}', b"\xff"])
def test_what_is_no_completion_is_an_unavailable_endpoint(raw):
    with pytest.raises(GuardError) as caught:
        read(raw)
    assert caught.value.kind is GuardErrorKind.UNAVAILABLE


def test_two_choices_are_not_chosen_between():
    said = json.loads(answer())
    said["choices"] *= 2
    with pytest.raises(GuardError):
        read(json.dumps(said).encode())


def test_a_cut_is_no_error_where_the_question_asks_for_one_token():
    assert read(answer(finish_reason="length"), may_be_cut=True).output.text == "safe"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PLACES = ["choices", "usage", "content", "reasoning", "tool_calls", "refusal", "finish_reason", "logprobs", "message"]


@given(st.sampled_from(PLACES), json_values)
@settings(max_examples=300)
def test_only_a_guard_error_escapes(place, value):
    with contextlib.suppress(GuardError):
        read(answer(**{place: value}))


def test_a_question_becomes_a_greedy_chat_completion():
    turns = (Turn("system", ("rules",)), Turn("user", ("a", Blob("image/png", b"\x00\xff"), "b")))
    question = Question(("request",), turns, 64, template=(("thinking_type", "fast"),))
    assert json.loads(body(question, "m", logprobs=True)) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "rules"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AP8="}},
                    {"type": "text", "text": "b"},
                ],
            },
        ],
        "max_tokens": 64,
        "temperature": 0.0,
        "stream": False,
        "chat_template_kwargs": {"thinking_type": "fast"},
        "logprobs": True,
        "top_logprobs": TOP_LOGPROBS,
    }
    assert "logprobs" not in json.loads(body(Question((), turns, 1), "m", logprobs=False))


def written(*tokens, text=None):
    """Tokens as (text, {alternative: probability}); the output's text is theirs put together."""
    made = [Token(t.encode(), tuple((o.encode(), math.log(p) if p else -math.inf) for o, p in a)) for t, a in tokens]
    return Completion(Output("".join(t for t, _ in tokens) if text is None else text), Usage(), tuple(made))


@pytest.mark.parametrize(
    ("tokens", "at", "words", "expected"),
    [
        ([("safe", [("safe", 0.6), ("unsafe", 0.2)])], 0, SAFE, 0.25),
        ([("un", [("un", 0.9), ("safe", 0.1)]), ("safe", [("safe", 1.0)])], 0, SAFE, 0.9),
        ([("\n\n", [("\n\n", 1.0)]), ("safe", [("safe", 0.9), ("un", 0.1)])], 2, SAFE, 0.1),
        ([(" harmful", [(" harmful", 0.5), (" un", 0.5)])], 1, Words(("harmful",), ("unharmful",)), 0.5),
        ([(" Safe", [(" Safe", 0.4), (" Unsafe", 0.3), (" Con", 0.3)])], 1, SEVERITY, 0.6),
        ([('":1', [('":1', 0.75), ('":0', 0.25), ("1", 1.0)])], 2, Words(("1",), ("0",)), 0.75),
        ([("safe", [("safe", 0.5), ("The", 0.5)])], 0, SAFE, 0.0),
        ([("safe", [("safe", 0.5), ("unsafe", 0.0)])], 0, SAFE, 0.0),
        ([("safe", [("banana", 1.0)])], 0, SAFE, None),
        ([("safe", [])], 0, SAFE, None),
        ([("safe", [("safe", 1.0)])], -1, SAFE, None),
        ([("safe", [("safe", 1.0)])], 99, SAFE, None),
    ],
)
def test_the_score_is_the_mass_of_each_sides_words_where_the_label_begins(tokens, at, words, expected):
    found = score(written(*tokens), at, words)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_reasoning_and_control_tokens_before_the_text_are_passed_over():
    tokens = [
        ("<|channel|>safe…", []),
        ("<|message|>", []),
        ("safe", [("safe", 0.5), ("unsafe", 0.5)]),
        ("<|end|>", []),
    ]
    assert score(written(*tokens, text="safe"), 0, SAFE) == pytest.approx(0.5)


def test_letters_of_several_bytes_before_the_label_do_not_move_it():
    tokens = [("…é\n", []), ("safe", [("safe", 0.25), ("unsafe", 0.75)])]
    assert score(written(*tokens), 3, SAFE) == pytest.approx(0.75)


def test_halves_of_a_letter_after_the_label_do_not_hide_it():
    tokens = [("\n", []), ("safe", [("safe", 0.25), ("unsafe", 0.75)]), ("\n\ufffd", []), ("\ufffd", [])]
    assert score(written(*tokens, text="\nsafe\né"), 1, SAFE) == pytest.approx(0.75)


def test_a_text_that_is_not_its_tokens_has_no_score():
    assert score(written(("safe", [("safe", 1.0)]), text="Safe"), 0, SAFE) is None
    assert score(written(text="safe"), 0, SAFE) is None
