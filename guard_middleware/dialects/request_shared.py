"""What requests of OpenAI's API shapes have in common: bounds, stop strings, biases, labels, unusual options.

Refuses (``FieldError``): more choices than the limit, biases by words, labels that are longer than OpenAI allows or
about guards, stops that are no strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from guard_middleware.dialects.base import ParsedRequest
from guard_middleware.dialects.fields import (
    USUAL,
    FieldError,
    Rule,
    Table,
    as_list,
    as_object,
    as_str,
    invalid,
    is_scalar,
    join,
    json_text,
    refuse_guards,
)
from guard_middleware.errors import RequestRejected
from guard_middleware.strictjson import JSONValue
from guard_middleware.types import Definition

_STOPS = 16
_METADATA = 16
_METADATA_KEY = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_LABEL = re.compile(r"[!-~]{0,256}")
_TOKEN = re.compile(r"-?[0-9]{1,10}", re.ASCII)


def rejecting(read: Callable[[], ParsedRequest]) -> ParsedRequest:
    """What ``read`` gives; its ``FieldError`` as the ``RequestRejected`` that entry points raise."""
    try:
        return read()
    except FieldError as error:
        raise RequestRejected(error.kind, error.message, param=error.path or None) from None


def unusual(table: Table, kept: Mapping[str, JSONValue], path: str = "") -> list[Definition]:
    """What the guard reads of the options that are usually one of a few words."""
    chosen = [(name, kept.get(name)) for name, rule in table.items() if rule is Rule.CHOICE]
    return [
        Definition(join(path, name), json_text(said)) for name, said in chosen if said is not None and said not in USUAL
    ]


def bounded(value: JSONValue, path: str, most: int) -> int:
    """A number of choices; 1 where none is given."""
    if value is None:
        return 1
    if type(value) is not int or not 1 <= value <= most:
        raise invalid(path, f"must be an integer from 1 to {most}")
    return value


def read_stops(value: JSONValue) -> list[Definition]:
    given = [value] if isinstance(value, str) else as_list(value, "stop", _STOPS)
    return [Definition("stop", as_str(item, f"stop[{index}]")) for index, item in enumerate(given)]


def read_bias(value: JSONValue) -> dict[str, JSONValue]:
    source = as_object(value, "logit_bias")
    if not all(_TOKEN.fullmatch(key) and is_scalar(item) for key, item in source.items()):
        raise invalid("logit_bias", "must be numbers by token id")
    return source


def read_metadata(value: JSONValue) -> tuple[dict[str, JSONValue], list[Definition]]:
    """Bounded as OpenAI bounds it, and never about guards. Labels pass unread; what could be prose is read."""
    source = as_object(value, "metadata")
    if len(source) > _METADATA:
        raise invalid("metadata", f"has more than {_METADATA} entries")
    refuse_guards(source, "metadata")
    notes: list[Definition] = []
    for key, item in source.items():
        if not _METADATA_KEY.fullmatch(key) or not isinstance(item, str) or len(item) > 512:
            raise invalid("metadata", "keys must be short words, values strings of at most 512 characters")
        if not _LABEL.fullmatch(item):
            notes.append(Definition("metadata", f"{key}: {item}"))
    return dict(source), notes
