"""The tables of the dialect against the types of the installed SDK: what Anthropic adds, stable or beta, fails here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import anthropic.types as stable
import anthropic.types.beta as beta
import pytest
from anthropic.types import (
    document_block_param,
    image_block_param,
    message_count_tokens_params,
    message_create_params,
    raw_content_block_start_event,
    raw_message_delta_event,
    server_tool_use_block_param,
    tool_result_block_param,
)
from anthropic.types.beta import (
    beta_image_block_param,
    beta_raw_content_block_start_event,
    beta_raw_message_delta_event,
    beta_request_document_block_param,
    beta_system_message_param,
    beta_tool_result_block_param,
)
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params

from guard_middleware.dialects import messages_fields as table
from guard_middleware.dialects.fields import Rule, Table

#: parameters of the SDK's methods that it sends as headers
HEADERS = {"betas", "user_profile_id", "workspace_id"}


def hints(kind: Any) -> dict[str, Any]:
    if hasattr(kind, "model_fields"):
        return {info.alias or name: info.annotation for name, info in kind.model_fields.items()}
    return get_type_hints(kind)


def tags(kind: Any) -> list[str]:
    """The values of ``type``; none where the field may be left out."""

    def literals(hint: Any) -> list[str]:
        if get_origin(hint) is Literal:
            return list(get_args(hint))
        return [tag for inner in get_args(hint) for tag in literals(inner)]

    return literals(hints(kind).get("type"))


def kinds(*roots: Any) -> list[Any]:
    """The classes that stand in unions, at any depth of Annotated, Optional, Iterable."""
    found: list[Any] = []
    for root in roots:
        is_class = isinstance(root, type) and (hasattr(root, "model_fields") or hasattr(root, "__required_keys__"))
        found += [root] if is_class else kinds(*get_args(root))
    return list(dict.fromkeys(found))


def below(*parents: Any, field: str) -> list[Any]:
    return kinds(*(hints(parent)[field] for parent in parents if field in hints(parent)))


def undecided(tables: Mapping[str, Table | None], found: Iterable[Any]) -> set[tuple[str, str]]:
    """(type, field) that the SDK has and no table; a type that is refused needs no fields."""
    missing: set[tuple[str, str]] = set()
    for kind in found:
        names = tags(kind)
        assert names, f"{kind.__name__} has no type"
        for tag in names:
            known = tables.get(tag, {})
            missing |= {(tag, "*")} if tag not in tables else set()
            missing |= {(tag, name) for name in hints(kind) if known is not None and name not in known}
    return missing


BLOCKS = kinds(
    stable.ContentBlockParam,
    stable.ContentBlock,
    raw_content_block_start_event.ContentBlock,
    beta.BetaContentBlockParam,
    beta.BetaContentBlock,
    beta_raw_content_block_start_event.ContentBlock,
    beta_system_message_param.ContentBlock,
    tool_result_block_param.Content,
    beta_tool_result_block_param.Content,
)
TOOLS = kinds(stable.ToolUnionParam, beta.BetaToolUnionParam, stable.MessageCountTokensToolParam)
RESULTS = [
    kind
    for block in BLOCKS
    if any(tag.endswith("_tool_result") and table.BLOCKS.get(tag) for tag in tags(block))
    for kind in below(block, field="content")
]
TYPED: list[tuple[str, Mapping[str, Table | None], list[Any]]] = [
    ("blocks", table.BLOCKS, BLOCKS),
    ("tools", table.TOOLS, TOOLS),
    ("results", table.RESULTS, RESULTS),
    (
        "image sources",
        table.IMAGE_SOURCES,
        kinds(image_block_param.Source, beta_image_block_param.Source),
    ),
    (
        "document sources",
        table.DOCUMENT_SOURCES,
        kinds(document_block_param.Source, beta_request_document_block_param.Source),
    ),
    (
        "citations",
        table.CITATIONS,
        kinds(
            stable.TextCitation,
            stable.TextCitationParam,
            beta.BetaTextCitation,
            beta.BetaTextCitationParam,
            hints(stable.CitationsDelta)["citation"],
            hints(beta.BetaCitationsDelta)["citation"],
        ),
    ),
    ("events", table.EVENTS, kinds(stable.RawMessageStreamEvent, beta.BetaRawMessageStreamEvent)),
    ("deltas", table.DELTAS, kinds(stable.RawContentBlockDelta, beta.BetaRawContentBlockDelta)),
]


@pytest.mark.parametrize(("tables", "found"), [row[1:] for row in TYPED], ids=[row[0] for row in TYPED])
def test_every_typed_object_of_the_sdk_is_decided(tables: Mapping[str, Table | None], found: list[Any]) -> None:
    assert len(found) > 2
    assert undecided(tables, found) == set()


OBJECTS: list[tuple[Table, Any]] = [
    (table.REQUEST, message_create_params.MessageCreateParamsStreaming),
    (table.REQUEST, message_create_params.MessageCreateParamsNonStreaming),
    (table.REQUEST, message_count_tokens_params.MessageCountTokensParams),
    (table.REQUEST, beta_create_params.MessageCreateParamsStreaming),
    (table.REQUEST, beta_create_params.MessageCreateParamsNonStreaming),
    (table.REQUEST, beta_count_tokens_params.MessageCountTokensParams),
    *((table.THREAD, kind) for kind in kinds(beta.BetaMessageThreadParam)),
    (table.METADATA, stable.MetadataParam),
    (table.METADATA, beta.BetaMetadataParam),
    (table.OUTPUT_CONFIG, stable.OutputConfigParam),
    (table.OUTPUT_CONFIG, beta.BetaOutputConfigParam),
    *((table.TOOL_CHOICE, kind) for kind in kinds(stable.ToolChoiceParam, beta.BetaToolChoiceParam)),
    *((table.CALLER, kind) for kind in below(server_tool_use_block_param.ServerToolUseBlockParam, field="caller")),
    (table.MESSAGE, stable.Message),
    (table.MESSAGE, beta.BetaMessage),
    (table.STOP_DETAILS, stable.RefusalStopDetails),
    (table.STOP_DETAILS, beta.BetaRefusalStopDetails),
    (table.ENDING, raw_message_delta_event.Delta),
    (table.ENDING, beta_raw_message_delta_event.Delta),
    (table.COUNT, stable.MessageTokensCount),
    (table.COUNT, beta.BetaMessageTokensCount),
]


@pytest.mark.parametrize(("known", "kind"), OBJECTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_of_the_sdk_is_decided(known: dict[str, Rule], kind: Any) -> None:
    assert set(hints(kind)) - set(known) - HEADERS == set()


def test_every_role_of_the_sdk_is_decided_and_no_other() -> None:
    roles: set[str] = set()
    for kind in kinds(stable.MessageParam, beta.BetaMessageParam):
        said = get_args(hints(kind)["role"])
        roles |= set(said)
        assert said
        assert all(set(hints(kind)) <= set(table.ROLES[role]) for role in said)
    assert roles == set(table.ROLES)


def test_what_is_undecided_is_found() -> None:
    """The check itself: a block type, a field and a nested type that the tables lack."""
    without_type = {kind: rules for kind, rules in table.BLOCKS.items() if kind != "search_result"}
    text = dict(table.BLOCKS["text"] or {})
    del text["citations"]
    assert ("search_result", "*") in undecided(without_type, BLOCKS)
    assert undecided({**table.BLOCKS, "text": text}, BLOCKS) == {("text", "citations")}
    assert ("bash_code_execution_result", "*") in undecided({}, RESULTS)


def test_every_place_holds_known_blocks_only_and_every_allowed_block_has_a_place() -> None:
    placed = set().union(*table.PLACES.values())
    assert placed == {kind for kind, rules in table.BLOCKS.items() if rules is not None}
    assert set(table.ROLES) <= set(table.PLACES)


def test_what_the_service_runs_by_itself_is_known_as_such_or_refused() -> None:
    """A tool that Anthropic describes as its own and that stands in no list would be raced as if it had no effects."""
    served = {tag for tag in table.TOOLS if tag.startswith(("code_execution", "tool_search", "web_", "advisor", "mcp"))}
    assert served == table.SERVER_TOOLS | {tag for tag, rules in table.TOOLS.items() if rules is None}
