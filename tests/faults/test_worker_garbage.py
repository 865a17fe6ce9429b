"""A worker that answers garbage on its WebSocket: whatever it says, nothing passes without a real verdict."""

from __future__ import annotations

import http
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, unix_serve

from guard_middleware.types import Usage, Verdict
from guard_middleware.wire import decode_request, encode_answer
from tests.support.gateway import FORGETFUL, PATIENCE, Gateway, Upstream, chat, unique

DEADLINE = 0.5
POLICY = {**FORGETFUL, "policies": {"default": {"input": {"deadline": "500ms"}, "output": {"deadline": "500ms"}}}}
Answer = Callable[[ServerConnection, str, bool], None]


class Liar:
    """A worker whose answer to (connection, question id, whether an answer is to be judged) a test chooses."""

    def __init__(self, path: Path) -> None:
        self.answer: Answer = honest
        self._server = unix_serve(
            self._session, str(path), process_request=self._ready, compression=None, max_size=None
        )
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Liar:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(PATIENCE)

    def _ready(self, connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(http.HTTPStatus.OK, "") if request.path == "/ready" else None

    def _session(self, connection: ServerConnection) -> None:
        for message in connection:
            if isinstance(message, bytes):
                question = decode_request(message)
                self.answer(connection, question.id, question.conversation.answer is not None)


def verdict(judged: bool, **changes: Any) -> Verdict:
    facts: dict[str, Any] = {
        "request": "unharmful",
        "response": "unharmful" if judged else None,
        "request_score": 0.0,
        "response_score": 0.0 if judged else None,
        "reasoning": "Step 1.",
        "usage": Usage(1, 1, 1),
        "model": "liar",
        "revision": "0",
    }
    return Verdict(**facts | changes)


def honest(connection: ServerConnection, id: str, judged: bool) -> None:
    connection.send(encode_answer(id, verdict(judged)))


def changed(**changes: Any) -> Answer:
    """A right verdict with these keys changed; ``...`` removes one."""

    def answer(connection: ServerConnection, id: str, judged: bool) -> None:
        body = json.loads(encode_answer(id, verdict(judged)))
        inner = {key: value for key, value in (body["verdict"] | changes).items() if value is not ...}
        connection.send(json.dumps({"id": id, "verdict": inner}).encode())

    return answer


def sends(message: str | bytes) -> Answer:
    return lambda connection, id, judged: connection.send(message)


def body(value: Any) -> Answer:
    """This JSON, with the question's id where it says so."""
    return lambda connection, id, judged: connection.send(json.dumps(value).replace("ID", id).encode())


def wrong_labels(connection: ServerConnection, id: str, judged: bool) -> None:
    connection.send(encode_answer(id, verdict(not judged)))


def other_id(connection: ServerConnection, id: str, judged: bool) -> None:
    connection.send(encode_answer("somebody else's", verdict(judged)))


def twice(connection: ServerConnection, id: str, judged: bool) -> None:
    """The second, contradicting verdict comes when nobody waits for it any more."""
    connection.send(encode_answer(id, verdict(judged, request="harmful", request_score=1.0)))
    honest(connection, id, judged)


GARBAGE: dict[str, tuple[Answer, set[str]]] = {
    "bytes": (sends(b"\xff\x00garbage"), {"unavailable"}),
    "empty": (sends(b""), {"unavailable"}),
    "text": (sends('{"id": "x"}'), {"unavailable"}),
    "safe": (sends(b"safe"), {"unavailable"}),
    "huge": (sends(b"x" * (9 * 1024 * 1024)), {"unavailable"}),
    "no outcome": (body({"id": "ID"}), {"unavailable"}),
    "both outcomes": (body({"id": "ID", "verdict": {}, "error": {}}), {"unavailable"}),
    "null verdict": (body({"id": "ID", "verdict": None}), {"unavailable"}),
    "unknown error": (body({"id": "ID", "error": {"kind": "fine", "message": "", "retry_after": 0}}), {"unavailable"}),
    "endless retry": (
        body({"id": "ID", "error": {"kind": "timeout", "message": "", "retry_after": 1e999}}),
        {"unavailable"},
    ),
    "unknown label": (changed(request="safe"), {"unavailable"}),
    "no label": (changed(request=...), {"unavailable"}),
    "NaN": (changed(request_score=float("nan")), {"unavailable"}),
    "score of 2": (changed(request_score=2), {"unavailable"}),
    "no reasoning": (changed(reasoning=None), {"unavailable"}),
    "label without score": (changed(response="unharmful", response_score=None), {"unavailable"}),
    "labels of another question": (wrong_labels, {"internal"}),
    "another id": (other_id, {"timeout"}),
    "silence": (lambda connection, id, judged: None, {"timeout"}),
    "close": (lambda connection, id, judged: connection.close(), {"unavailable"}),
    "reset": (lambda connection, id, judged: connection.socket.close(), {"unavailable"}),
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[tuple[Gateway, Liar]]:
    folder = tmp_path_factory.mktemp("g")
    with Liar(folder / "w.sock") as liar, Gateway(folder, upstream.url, folder / "w.sock", POLICY) as process:
        yield process, liar


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("answer", "errors"), GARBAGE.values(), ids=list(GARBAGE))
def test_garbage_is_a_503_in_time(
    gateway: tuple[Gateway, Liar], upstream: Upstream, answer: Answer, errors: set[str], stream: bool
) -> None:
    process, liar = gateway
    liar.answer = honest
    assert process.post(chat()).status_code == 200
    liar.answer = answer
    model = unique("good")
    began = time.monotonic()
    response = process.post(chat(model=model, stream=stream))
    assert time.monotonic() - began < DEADLINE + 1.5
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "guard_unavailable"
    record = process.record(response)
    assert record["outcome"] == "guard_error"
    assert {record["error"]} == errors
    assert record["decisions"][0]["verdict"] is None
    assert upstream.of(model) == []


def test_garbage_about_the_answer_releases_nothing(gateway: tuple[Gateway, Liar], upstream: Upstream) -> None:
    process, liar = gateway
    garbage = changed(response=...)

    def later(connection: ServerConnection, id: str, judged: bool) -> None:
        (garbage if judged else honest)(connection, id, judged)

    liar.answer = later
    model = unique("good")
    response = process.post(chat(model=model))
    assert response.status_code == 503
    assert "Bread" not in response.text
    assert len(upstream.of(model)) == 1
    assert process.record(response)["released_bytes"] == 0


def test_the_first_verdict_counts(gateway: tuple[Gateway, Liar], upstream: Upstream) -> None:
    process, liar = gateway
    liar.answer = twice
    model = unique("good")
    response = process.post(chat(model=model))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "content_filter")
    assert upstream.of(model) == []
