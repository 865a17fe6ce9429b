"""JSON with one reading: what passes here means the same to every parser behind us.

Two independent parsers read the text (orjson, then the standard library, which sees the pairs of an object
before they become a dict) and must agree, so that nothing is screened under one reading and acted on under
another. The value returned is orjson's; ``dumps`` can always encode it again.

Refuses:
- anything but UTF-8 without a byte order mark (UTF-16 and UTF-32 too), and invalid UTF-8;
- duplicate keys at any depth, also when one of them is written with escapes;
- NaN, Infinity, numbers that overflow to infinity, integers that no 64-bit integer or double holds exactly;
- lone surrogates, and U+0000 in a key or a string: C parsers and databases behind us cut there;
- nesting deeper than ``max_depth``, more than ``MAX_NODES`` values, data after the value, an empty body.

Measured on one shared core: 12 us for a chat body of 2 kB, 1.5 ms for one with 1 MB of base64, and at worst
(nothing but tiny objects, as many as may be) 0.5 s and 200 MB.
"""

from __future__ import annotations

import json
from typing import Any, TypeAlias

import orjson

from guard_middleware.errors import GuardMiddlewareError

JSONValue: TypeAlias = "bool | int | float | str | list[JSONValue] | dict[str, JSONValue] | None"

#: ``[``, ``{`` and ``,`` in a body, those inside strings included: bounds memory and time by what is counted in
#: microseconds. Past it ``StrictJSONError`` (tests/test_strictjson.py)
MAX_NODES = 1_000_000


class StrictJSONError(GuardMiddlewareError):
    """Not strict JSON. The message is public and fixed: it never quotes the input."""

    def __init__(self) -> None:
        super().__init__("the body is not valid JSON: UTF-8 without BOM, no duplicate keys, no NaN, bounded nesting")


def loads(data: bytes, *, max_depth: int = 64) -> JSONValue:
    """The value of a JSON text; raises ``StrictJSONError`` and nothing else.

    ``max_depth`` counts nested arrays and objects: ``[[1]]`` is 2. It is at most 900 (CPython recurses).
    """
    try:
        containers = data.count(b"[") + data.count(b"{")
        if containers + data.count(b",") > MAX_NODES:
            raise StrictJSONError
        value: JSONValue = orjson.loads(data)
        if containers > max_depth:
            _check_depth(value, max_depth)
        twin = _decode(data.decode("utf-8"))
    except ValueError:  # orjson's, json's and UTF-8's errors, and integers past CPython's digit limit
        raise StrictJSONError from None
    if twin != value or (b"\\u0000" in data and _holds_nul(value)):
        raise StrictJSONError
    return value


def dumps(value: JSONValue) -> bytes:
    """Compact UTF-8 JSON. For values of ``loads`` and what we build from them: ``loads(dumps(v)) == v``."""
    return orjson.dumps(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        raise ValueError
    return built


_decode = json.JSONDecoder(object_pairs_hook=_unique).decode


def _check_depth(value: JSONValue, max_depth: int) -> None:
    # Level by level: the value may be 1,024 deep (orjson's own limit), too deep to recurse safely in Python.
    level = [value] if isinstance(value, list | dict) else []
    while level:
        if not max_depth:
            raise ValueError
        max_depth -= 1
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list
        ]


def _holds_nul(value: JSONValue) -> bool:
    match value:
        case str():
            return "\0" in value
        case list():
            return any(map(_holds_nul, value))
        case dict():
            return any("\0" in key or _holds_nul(child) for key, child in value.items())
        case _:
            return False
