"""Which ids of calls in an answer the guard reads: those that a machine made say nothing."""

from __future__ import annotations

import pytest

from guard_middleware.dialects.answer_shared import unread_id
from guard_middleware.types import Text


@pytest.mark.parametrize(
    ("id", "name"),
    [
        ("", "f"),
        ("0", "f"),
        ("c1", "f"),
        ("call_DdmO9pD3xa9XTPNJ32zg2hcA", "f"),  # OpenAI, Azure
        ("fc_68af4030baa48193b0b43b4c2a176a1a0e6967589f080e78", "f"),
        ("toolu_01A09q90qw90lq917835lq9", "f"),  # Anthropic; by Bedrock, by Vertex
        ("toolu_bdrk_01SXm1mnRPUqzrZv8F3gAQwA", "f"),
        ("toolu_vrtx_01SXm1mnRPUqzrZv8F3gAQwA", "f"),
        ("srvtoolu_01WYG3ziw53XMcoyKL4XcZmE", "f"),
        ("chatcmpl-tool-9f0e2f3a7b4f4f6b9d1f9a6d8c0b7e5a", "f"),  # vLLM
        ("chatcmpl-tool-b1c2d3e4f5a6b7c8", "f"),
        ("functions.get_weather:0", "get_weather"),  # its parser for Kimi K2
        ("get_weather:12", "get_weather"),
        ("D681PevKs", "f"),  # Mistral
        ("function-call-1234567890123456789", "f"),  # Gemini
        ("tool_0_get_weather", "get_weather"),
        ("call_3b1f8f2c-6d1f-4c59-9d9c-7f4a7a3f1d77", "f"),  # LiteLLM
        ("call_0_3b1f8f2c-6d1f-4c59-9d9c-7f4a7a3f1d77", "f"),  # DeepSeek
        ("call_yy2f", "f"),  # Groq
        ("4xgYgoOWGcBUcjeOqw3jC2mPTeIDXsrL", "f"),  # llama.cpp
    ],
)
def test_an_id_that_a_machine_made_says_nothing(id: str, name: str) -> None:
    assert unread_id(id, name) == []


@pytest.mark.parametrize(
    ("id", "name"),
    [
        ("how_to_pick_a_lock", "f"),
        ("pickalock", "f"),
        ("call_HowToPickALockWithWire", "f"),
        ("toolu_pick_a_lock", "f"),
        ("functions.pick_a_lock:0", "f"),
        ("pick-a-lock:0", "f"),
        ("functions.get_weather_with_wire:0", "get_weather"),
        ("call_" + "1" * 65, "f"),
        ("call_1\n", "f"),
        ("\u0663\u0663\u0663", "f"),
    ],
)
def test_an_id_that_could_be_words_is_read(id: str, name: str) -> None:
    assert unread_id(id, name) == [Text(id)]
