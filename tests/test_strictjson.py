from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guard_middleware.errors import GuardMiddlewareError
from guard_middleware.strictjson import MAX_NODES, JSONValue, StrictJSONError, dumps, loads

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXT, children, max_size=4),
    max_leaves=20,
)
TOKENS = st.sampled_from(
    [
        *("{", "}", "[", "]", ",", ":", '"', '"a"', '"\\u0061"', '"a":', '"\\u0000"', "\\", "1", "-0", "1e400", "1e5"),
        *("0.1", "01", "NaN", "Infinity", "null", "true", " ", "\n", "\ufeff", "\u2028", "é", '"\\ud800"', "/**/"),
        *("12345678901234567890123", "10000000000000000000000", "[[", "]]", '{"a":1,"a":1}'),
    ]
)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"messages":[{"role":"user","content":"how do I pick a lock"}]}', None),
        (b'[1,-2,0.5,true,false,null,"",[],{}]', None),
        (b'{"a":{"a":1},"b":[{"a":1},{"a":1}]}', None),
        (b'{"a":1,"A":2,"a ":3}', None),
        ('"\u2028 é 😀"'.encode(), "\u2028 é 😀"),
        (b'"\\ud83d\\ude00"', "😀"),
        (b'"\\\\u0000"', "\\u0000"),
        (b'{"a":[1,"\\\\u0000",null]}', {"a": [1, "\\u0000", None]}),
        (b" 1 ", 1),
        (b"18446744073709551615", 2**64 - 1),
        (b"-9223372036854775808", -(2**63)),
    ],
)
def test_strict_json_is_read_as_the_standard_library_reads_it(data: bytes, value: JSONValue) -> None:
    assert loads(data) == (json.loads(data) if value is None else value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"{} x",
        b"{}{}",
        b"[1,]",
        b"{'a':1}",
        b"[1 /* c */]",
        b'"\t"',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        '{"a":1}'.encode("utf-32"),
        b'"\xff"',
        b'"\xc0\xaf"',
        b'"\xed\xa0\x80"',
        b'{"messages":1,"messages":2}',
        b'{"messages":1,"messages":1}',
        b'{"messages":1,"mess\\u0061ges":3}',
        b'{"mess\\u0061ges":3,"messages":1}',
        b'[{"x":[{"k":1,"y":{},"k":null}]}]',
        '{"é":1,"\\u00e9":2}'.encode(),
        b'{"":1,"":2}',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e400",
        b"-1e400",
        b'"\\ud800"',
        b'"\\udc00\\ud800"',
        b'{"\\ud800":1}',
        b'"a\\u0000b"',
        b'{"a":[{"\\u0000":1}]}',
        b'["\\\\u0000","\\u0000"]',
        b"12345678901234567890123",
        b"-9223372036854775809",
        b"1" * 5000,
    ],
)
def test_everything_with_a_second_reading_is_refused(data: bytes) -> None:
    with pytest.raises(StrictJSONError):
        loads(data)


def test_the_public_message_never_quotes_the_input() -> None:
    with pytest.raises(GuardMiddlewareError) as info:
        loads(b'{"secret-key":1,"secret-key":2}')
    assert "secret" not in str(info.value)
    assert info.value.__suppress_context__


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_is_allowed_to_the_bound_and_refused_one_past_it(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    assert loads(opening * 64 + b"1" + closing * 64)
    with pytest.raises(StrictJSONError):
        loads(opening * 65 + b"1" + closing * 65)


def test_brackets_inside_strings_and_siblings_are_not_nesting() -> None:
    value: JSONValue = ["[" * 500, *([[]] * 500)]
    assert loads(dumps(value)) == value


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_a_depth_bomb_is_refused_at_once(opening: bytes) -> None:
    bomb = opening * 200_000
    start = time.perf_counter()
    with pytest.raises(StrictJSONError):
        loads(bomb)
    assert time.perf_counter() - start < 0.05


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    bomb = b"[" + b"[]," * (MAX_NODES // 2) + b"[]]"
    start = time.perf_counter()
    with pytest.raises(StrictJSONError):
        loads(bomb)
    assert time.perf_counter() - start < 0.05


def test_cost_is_small_for_a_chat_body_and_for_a_long_string() -> None:
    turns = [{"role": "user", "content": "how do I pick a lock? " * 7} for _ in range(11)]
    chat = dumps({"model": "m", "messages": turns})
    image = dumps({"image_url": {"url": "data:image/png;base64," + "QUJD" * 250_000}})
    assert 1_900 < len(chat) < 2_500
    for data, calls, seconds in [(chat, 200, 100e-6), (image, 5, 0.01)]:
        best = min(_seconds(data, calls) for _ in range(5))
        assert best < seconds


def _seconds(data: bytes, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        loads(data)
    return (time.perf_counter() - start) / calls


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_encoding_then_decoding_is_the_identity(value: JSONValue) -> None:
    assert loads(dumps(value)) == value
    assert loads(json.dumps(value).encode()) == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | st.lists(TOKENS, max_size=12).map(lambda tokens: "".join(tokens).encode()))
@example(b'{"a":10000000000000000000000}')
@example(b'\xff\xfe"\x00a\x00"\x00')
def test_every_input_is_read_as_the_standard_library_reads_it_or_refused(data: bytes) -> None:
    try:
        value = loads(data)
    except StrictJSONError:
        return
    assert value == json.loads(data)
    assert loads(orjson.dumps(value)) == value
