"""Routes are exact: whatever another server might fold into a known path is not found here."""

from __future__ import annotations

import pytest

from guard_middleware.dialects import route
from guard_middleware.errors import RejectKind, RequestRejected


def test_known_routes() -> None:
    chat = route("POST", b"/v1/chat/completions").dialect
    assert chat is not None
    assert chat.name == "chat_completions"
    for path, name in ((b"/v1/completions", "completions"), (b"/v1/responses", "responses")):
        dialect = route("POST", path).dialect
        assert dialect is not None
        assert dialect.name == name
    for path in (b"/v1/messages", b"/v1/messages/count_tokens"):
        messages = route("POST", path).dialect
        assert messages is not None
        assert messages.name == "messages"


@pytest.mark.parametrize(
    "path", [b"/v1/models", b"/v1/models/gpt-4o", b"/v1/models/Qwen/Qwen2.5-VL-3B", b"/v1/models/ft:a%2Fb"]
)
def test_the_list_of_models_passes_through(path: bytes) -> None:
    assert route("GET", path).dialect is None


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"/",
        b"//v1/chat/completions",
        b"/v1//chat/completions",
        b"/v1/chat/completions/",
        b"/v1/chat%2Fcompletions",
        b"/v1/chat/completions;x=1",
        b"/v1/chat/completions%00",
        b"/v1/chat/completions%20",
        b"/v1/chat/completions?x=1",
        b"/V1/chat/completions",
        b"/v1/Chat/completions",
        b"/v1/x/../chat/completions",
        b"/v1/./chat/completions",
        b"/v1/models/",
        b"/v1/models/..",
        b"/v1/models/../chat/completions",
        b"/v1/models/..%2Fchat",
        b"/v1/models/a%2F..%2Fb",
        b"/v1/models/%2e%2e%2fchat",
        b"/v1/models/" + b"a" * 300,
        b"/invocations",
        b"/inference/v1/generate",
        b"/generative_scoring",
        b"/pooling",
        b"/classify",
        b"/score",
        b"/tokenize",
        b"/detokenize",
        b"/v1/chat/completions/batch",
        b"/v1/chat/completions/render",
        b"/v1/chat/completions/chatcmpl-1",
        b"/v1/completions/",
        b"/v1/completions/cmpl-1",
        b"/v1/responses/",
        b"/v1/responses/resp_1",
        b"/v1/responses/resp_1/cancel",
        b"/v1/responses/resp_1/input_items",
        b"/v1/responses/input_tokens",
        b"/v1/responses/compact",
        b"/v1/conversations",
        b"/v1/messages/batches",
        b"/v1/messages/",
        b"/v1//messages",
        b"/v1/messages/count_tokens/",
        b"/v1/embeddings",
        b"/v1/rerank",
        b"/v1/audio/speech",
        b"/v1/images/generations",
        b"/v1/files",
        b"/v1/batches",
        b"/v1/realtime",
        b"/health",
        b"/metrics",
    ],
)
def test_every_other_spelling_and_route_is_not_found(path: bytes) -> None:
    for method in ("GET", "POST"):
        with pytest.raises(RequestRejected) as caught:
            route(method, path)
        assert caught.value.kind is RejectKind.NOT_FOUND


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *((method, b"/v1/chat/completions") for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "post", "")),
        *((method, b"/v1/models") for method in ("POST", "HEAD", "DELETE")),
    ],
)
def test_a_known_path_takes_one_method(method: str, path: bytes) -> None:
    with pytest.raises(RequestRejected) as caught:
        route(method, path)
    assert caught.value.kind is RejectKind.METHOD_NOT_ALLOWED
    assert caught.value.status == 405
