"""The same request in the shape of each endpoint of LiteLLM, for tables of tests."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tests.integrations.litellm.stage import HARM

_UNIQUE = itertools.count()
NICE = "How do I bake bread?"
PDF = base64.b64encode(b"%PDF-1.4 a file").decode()


def picture(colour: str = "red", size: int = 40) -> str:
    """A plain PNG as base64."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Endpoint:
    """``shape`` is the prefix of the model's name, which chooses the upstream's API."""

    path: str
    shape: str
    text: Callable[[str], dict[str, Any]]
    parts: Callable[[str | None, str], dict[str, Any]]  # text and picture
    file: Callable[[], dict[str, Any]]
    result: Callable[[Any], dict[str, Any]]  # a tool's result
    result_picture: Callable[[str], Any]

    def model(self, answer: str) -> str:
        """A name of the model ``answer`` that no other request has."""
        return f"{answer}.n{next(_UNIQUE)}"

    def body(self, model: str, content: Mapping[str, Any], stream: bool = False, **extra: Any) -> dict[str, Any]:
        return {"model": f"{self.shape}/{model}", **content, **({"stream": True} if stream else {}), **extra}


def _chat(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


def _chat_parts(text: str | None, image: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    return _chat([*([{"type": "text", "text": text}] if text else []), part])


def _chat_file() -> dict[str, Any]:
    return _chat([{"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}}])


def _chat_result(content: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    asked = [{"role": "user", "content": NICE}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    return {"messages": [*asked, {"role": "tool", "tool_call_id": "c1", "content": content}]}


def _claude(content: Any) -> dict[str, Any]:
    return {"max_tokens": 64, "messages": [{"role": "user", "content": content}]}


def _source(image: str, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "base64", "media_type": kind, "data": image}


def _claude_parts(text: str | None, image: str) -> dict[str, Any]:
    return _claude([*([{"type": "text", "text": text}] if text else []), {"type": "image", "source": _source(image)}])


def _claude_file() -> dict[str, Any]:
    return _claude([{"type": "document", "source": _source(PDF, "application/pdf")}])


def _claude_result(content: Any) -> dict[str, Any]:
    use = {"type": "tool_use", "id": "c1", "name": "look", "input": {}}
    asked = [{"role": "user", "content": NICE}, {"role": "assistant", "content": [use]}]
    result = {"type": "tool_result", "tool_use_id": "c1", "content": content}
    return {"max_tokens": 64, "messages": [*asked, {"role": "user", "content": [result]}]}


def _input(content: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": content}]}


def _input_parts(text: str | None, image: str) -> dict[str, Any]:
    part = {"type": "input_image", "image_url": f"data:image/png;base64,{image}"}
    return _input([*([{"type": "input_text", "text": text}] if text else []), part])


def _input_file() -> dict[str, Any]:
    data = f"data:application/pdf;base64,{PDF}"
    return _input([{"type": "input_file", "filename": "a.pdf", "file_data": data}])


def _input_result(content: Any) -> dict[str, Any]:
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
    return {
        "input": [
            {"role": "user", "content": NICE},
            call,
            {"type": "function_call_output", "call_id": "c1", "output": content},
        ]
    }


_CHAT = Endpoint(
    "/v1/chat/completions",
    "chat",
    _chat,
    _chat_parts,
    _chat_file,
    _chat_result,
    lambda image: [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}],
)
_MESSAGES = Endpoint(
    "/v1/messages",
    "claude",
    _claude,
    _claude_parts,
    _claude_file,
    _claude_result,
    lambda image: [{"type": "image", "source": _source(image)}],
)
_RESPONSES = Endpoint(
    "/v1/responses",
    "chat",
    lambda text: {"input": text},
    _input_parts,
    _input_file,
    _input_result,
    lambda image: [{"type": "input_image", "image_url": f"data:image/png;base64,{image}"}],
)
#: what LiteLLM serves, and the two ways in which it translates one API to another
ENDPOINTS = {
    "chat": _CHAT,
    "messages": _MESSAGES,
    "responses": _RESPONSES,
    "messages over an OpenAI upstream": Endpoint(**{**vars(_MESSAGES), "shape": "chat"}),
    "responses over an Anthropic upstream": Endpoint(**{**vars(_RESPONSES), "shape": "claude"}),
}

#: case -> content that must be stopped before the upstream
HARMFUL: dict[str, Callable[[Endpoint], dict[str, Any]]] = {
    "text": lambda api: api.text(HARM),
    "text and image": lambda api: api.parts(NICE, picture()),
    "image only": lambda api: api.parts(None, picture()),
    "file": lambda api: api.file(),
    "tool result": lambda api: api.result(HARM),
    "image in a tool result": lambda api: api.result(api.result_picture(picture())),
}
