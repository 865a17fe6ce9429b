"""The one table of the dialect against the types of the installed SDK: a field that OpenAI adds fails here."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionContentPartParam,
    ChatCompletionContentPartRefusalParam,
    ChatCompletionMessage,
    ChatCompletionMessageParam,
    ChatCompletionMessageToolCallUnionParam,
    ChatCompletionToolUnionParam,
    chat_completion,
    chat_completion_chunk,
    chat_completion_content_part_image_param,
    chat_completion_message,
    chat_completion_message_custom_tool_call_param,
    chat_completion_message_function_tool_call_param,
)
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from guard_middleware.dialects import chat_fields as table
from guard_middleware.dialects.fields import Rule


def fields(kind: Any) -> set[str]:
    return set(kind.model_fields) if hasattr(kind, "model_fields") else set(kind.__annotations__)


def tag(kind: Any, name: str) -> str:
    hint = get_type_hints(kind)[name]
    assert get_origin(hint) is Literal
    return str(get_args(hint)[0])


PARTS = (*get_args(ChatCompletionContentPartParam), ChatCompletionContentPartRefusalParam)
MESSAGES = get_args(ChatCompletionMessageParam)
OBJECTS = [
    (table.REQUEST, CompletionCreateParamsStreaming),
    (table.REQUEST, CompletionCreateParamsNonStreaming),
    (table.IMAGE_URL, chat_completion_content_part_image_param.ImageURL),
    (table.CALL["function"], chat_completion_message_function_tool_call_param.Function),
    (table.CALL["custom"], chat_completion_message_custom_tool_call_param.Custom),
    (table.COMPLETION, ChatCompletion),
    (table.CHUNK, ChatCompletionChunk),
    (table.CHOICE, chat_completion.Choice),
    (table.CHUNK_CHOICE, chat_completion_chunk.Choice),
    (table.MESSAGE, ChatCompletionMessage),
    (table.DELTA, chat_completion_chunk.ChoiceDelta),
    (table.TOOL_CALLS["function"], chat_completion_chunk.ChoiceDeltaToolCall),
    (table.CALL["function"], chat_completion_chunk.ChoiceDeltaToolCallFunction),
    (table.CALL["function"], chat_completion_chunk.ChoiceDeltaFunctionCall),
    (table.CALL["function"], chat_completion_message.FunctionCall),
    (table.ANNOTATION, chat_completion_message.Annotation),
    (table.URL_CITATION, chat_completion_message.AnnotationURLCitation),
    *((table.ROLES[tag(kind, "role")], kind) for kind in MESSAGES),
    *((table.TOOLS[tag(kind, "type")], kind) for kind in get_args(ChatCompletionToolUnionParam)),
    *((table.TOOL_CALLS[tag(kind, "type")], kind) for kind in get_args(ChatCompletionMessageToolCallUnionParam)),
]


@pytest.mark.parametrize(("known", "kind"), OBJECTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_of_the_sdk_is_decided(known: dict[str, Rule], kind: Any) -> None:
    assert fields(kind) - set(known) == set()


def test_every_part_type_of_the_sdk_is_decided() -> None:
    assert {tag(kind, "type") for kind in PARTS} == set(table.PARTS)
    for kind in PARTS:
        rules = table.PARTS[tag(kind, "type")]
        assert rules is None or fields(kind) <= set(rules)


def test_every_role_of_the_sdk_is_decided_and_no_other() -> None:
    assert {tag(kind, "role") for kind in MESSAGES} == set(table.ROLES) == set(table.ROLE_PARTS)


def test_every_text_field_of_an_answer_is_read() -> None:
    strings = {name for name, info in ChatCompletionMessage.model_fields.items() if str in get_args(info.annotation)}
    assert strings == {"content", "refusal"}
    assert all(table.MESSAGE[name] is Rule.TEXT for name in strings)
