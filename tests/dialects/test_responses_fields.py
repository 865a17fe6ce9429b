"""The tables of the dialect against the types of the installed SDK: whatever OpenAI adds fails here."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from openai.types import responses as sdk
from openai.types.responses import (
    custom_tool_param,
    response_create_params,
    response_format_text_config_param,
    response_input_item_param,
    response_output_item,
    response_output_text,
    response_stream_event,
    response_text_config_param,
    tool_param,
)
from openai.types.shared_params import reasoning

from guard_middleware.dialects import responses_fields as table
from guard_middleware.dialects.fields import Rule


def members(kind: Any) -> Iterator[Any]:
    """The classes of a union, or of a list of it, however it is annotated."""
    if hasattr(kind, "__metadata__"):
        yield from members(kind.__origin__)
    elif get_origin(kind) is typing.Union:
        for inner in get_args(kind):
            yield from members(inner)
    elif get_origin(kind) in (list, Iterable):
        yield from members(get_args(kind)[0])
    elif kind not in (str, type(None)):
        yield kind


def hints(kind: Any) -> dict[str, Any]:
    if hasattr(kind, "model_fields"):
        return {info.alias or name: info.annotation for name, info in kind.model_fields.items()}
    return typing.get_type_hints(kind)


def tags(kind: Any) -> tuple[str, ...]:
    hint = hints(kind)["type"]
    hint = get_args(hint)[0] if get_origin(hint) is typing.Union else hint
    assert get_origin(hint) is Literal
    return get_args(hint)


def tagged(kind: Any) -> list[tuple[str, Any]]:
    return [(tag, member) for member in members(kind) for tag in tags(member)]


ITEMS = [
    ("input item", table.INPUT_ITEMS, response_input_item_param.ResponseInputItemParam),
    ("output item", table.OUTPUT_ITEMS, response_output_item.ResponseOutputItem),
]
#: fields of items and of events that hold parts
HOLD_PARTS = ("content", "summary", "output", "part")


def parts() -> list[tuple[str, Any]]:
    """(tag, class) of whatever stands as a part in an item or an event that passes."""
    unions = [*ITEMS, ("event", table.EVENTS, response_stream_event.ResponseStreamEvent)]
    holders = [kind for _, known, union in unions for tag, kind in tagged(union) if known.get(tag)]
    fields = [hints(kind)[name] for kind in holders for name in HOLD_PARTS if name in hints(kind)]
    return list(dict.fromkeys(pair for field in fields for pair in tagged(field)))


UNIONS: list[tuple[str, Any, Any]] = [
    *((what, known, pair) for what, known, union in ITEMS for pair in tagged(union)),
    *(("tool", table.TOOLS, pair) for pair in tagged(tool_param.ToolParam)),
    *(("event", table.EVENTS, pair) for pair in tagged(response_stream_event.ResponseStreamEvent)),
    *(("annotation", table.ANNOTATIONS, pair) for pair in tagged(response_output_text.Annotation)),
    *(
        ("format", table.FORMATS, pair)
        for pair in tagged(response_format_text_config_param.ResponseFormatTextConfigParam)
    ),
    *(("part", table.PARTS, pair) for pair in parts()),
    # in no union of the SDK
    ("part", table.PARTS, ("input_audio", sdk.ResponseInputAudioParam)),
    ("tool", table.TOOLS, ("custom", custom_tool_param.CustomToolParam)),
]


@pytest.mark.parametrize(("what", "tables", "pair"), UNIONS, ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_every_type_of_the_sdk_is_decided_and_every_field_of_those_that_pass(
    what: str, tables: dict[str, Any], pair: tuple[str, Any]
) -> None:
    tag, kind = pair
    assert tag in tables, f"{what} {tag}"
    if tables[tag] is not None:
        assert hints(kind).keys() - tables[tag].keys() == set()


def test_every_type_of_part_is_taken_from_the_sdk() -> None:
    assert {tag for tag, _ in parts()} | {"input_audio"} == table.PARTS.keys()


@pytest.mark.parametrize(
    ("known", "kind"),
    [
        (table.REQUEST, response_create_params.ResponseCreateParamsNonStreaming),
        (table.REQUEST, response_create_params.ResponseCreateParamsStreaming),
        (table.REASONING, reasoning.Reasoning),
        (table.TEXT, response_text_config_param.ResponseTextConfigParam),
        (table.RESPONSE, sdk.Response),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_field_of_the_sdk_is_decided(known: dict[str, Rule], kind: Any) -> None:
    assert hints(kind).keys() - known.keys() == set()


def test_what_a_request_may_include_is_what_the_sdk_knows() -> None:
    assert set(get_args(sdk.ResponseIncludable)) >= table.INCLUDE


def test_every_role_of_the_sdk_is_decided() -> None:
    roles = get_args(typing.get_type_hints(sdk.EasyInputMessageParam)["role"])
    assert set(roles) == set(table.ROLE_PARTS)


@pytest.mark.parametrize("tables", [table.OUTPUT_ITEMS, table.EVENTS, table.PARTS, table.ANNOTATIONS])
def test_every_text_of_an_answer_is_read(tables: dict[str, Any]) -> None:
    texts = {"text", "refusal", "arguments", "input", "delta", "title", "url", "filename", "name"}
    for kind, fields in tables.items():
        for name in (fields or {}).keys() & texts:
            assert fields[name] is Rule.TEXT, (kind, name)
