"""The tables of the legacy dialect against the types of the installed SDK: a field that OpenAI adds fails here."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion, CompletionChoice
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from guard_middleware.dialects import completions_fields as table
from guard_middleware.dialects.fields import Rule
from tests.dialects.test_chat_fields import fields

OBJECTS = [
    (table.REQUEST, CompletionCreateParamsStreaming),
    (table.REQUEST, CompletionCreateParamsNonStreaming),
    (table.COMPLETION, Completion),
    (table.CHOICE, CompletionChoice),
]


@pytest.mark.parametrize(("known", "kind"), OBJECTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_of_the_sdk_is_decided(known: dict[str, Rule], kind: Any) -> None:
    assert fields(kind) - set(known) == set()


def test_every_text_field_of_an_answer_is_read() -> None:
    strings = {name for name, info in CompletionChoice.model_fields.items() if info.annotation is str}
    assert strings == {"text"}
    assert table.CHOICE["text"] is Rule.TEXT
