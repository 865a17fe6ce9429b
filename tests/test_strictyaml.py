from __future__ import annotations

import pytest

from guard_middleware.errors import ConfigError
from guard_middleware.strictyaml import MAX_DEPTH, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("a:", {"a": None}),
        ("a: [1, -2, 3.5, 1.0e+3]", {"a": (1, -2, 3.5, 1000.0)}),
        ("a: [true, FALSE, null, ~]", {"a": (True, False, None, None)}),
        ("a: ['yes', \"010\", '1:30', '2024-01-01', 1e3]", {"a": ("yes", "010", "1:30", "2024-01-01", "1e3")}),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: 0o17", {"a": "0o17"}),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
    ],
)
def test_plain_data(text: str, value: object) -> None:
    document = parse(text)
    assert document.value == value
    assert repr(document.value) == repr(value)


def test_every_key_and_item_knows_its_line() -> None:
    document = parse("a:\n  b:\n  - x\n  - y: 1\nc: 2\n")
    assert document.line(("a",)) == 1
    assert document.line(("a", "b")) == 2
    assert document.line(("a", "b", 1, "y")) == 4
    assert document.line(("a", "b", 1, "missing")) == 4
    assert document.line(("nowhere", "at", "all")) == 1


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1])
def test_the_depth_is_bounded(depth: int) -> None:
    text = "a: " + "[" * (depth - 1) + "1" + "]" * (depth - 1)
    if depth <= MAX_DEPTH:
        assert parse(text).value
    else:
        with pytest.raises(ConfigError, match="nested too deeply"):
            parse(text)


@pytest.mark.parametrize("scalar", ["1_000", "0b1", "12:30:00", ".inf", "-.INF", "1" * 19, "=", "!x y"])
def test_scalars_that_readers_disagree_on_are_refused(scalar: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"\na: {scalar}")
    assert caught.value.line == 2
