"""An OpenAI-compatible endpoint without a model: outputs as each guard's authors publish them, by a rule.

    with Endpoint() as endpoint:
        endpoint.url, endpoint.seen                     # every request as it arrived
        endpoint.behave = lambda seen: Answer(503)      # or something else than the rule

What is judged (the last turn, or ShieldGemma's image) is harmful if it holds ``pick a lock``, in words or in bytes.
The model's name chooses the format. Log probabilities give the written label 0.9 and its opposite 0.1.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

_OPPOSITE = [
    *(("unsafe", "safe"), ("Unsafe", "Safe"), ("Yes", "No"), ("harmful", "unharmful"), ("1", "0")),
]
_MODELS = ("llama-guard-4", "qwen3guard-gen", "shieldgemma-2", "singguard", "gpt-oss-safeguard", "guardreasoner-vl")


@dataclass(frozen=True)
class Seen:
    path: str
    headers: dict[str, str]
    body: Any

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of each message; an image is the text of its bytes."""
        return [(message["role"], _shown(message["content"])) for message in self.body["messages"]]


@dataclass(frozen=True)
class Answer:
    """``body`` None closes the connection without an answer; ``seconds`` pass before it."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that goes away is no error of the test."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Endpoint:
    """Serves on loopback from threads of its own. ``served`` are the names in ``/v1/models``."""

    def __init__(self, served: tuple[str, ...] = _MODELS) -> None:
        self.served = served
        self.seen: list[Seen] = []
        self.behave: Callable[[Seen], Answer] = by_the_rule
        #: requests whose asker went away before the answer
        self.abandoned = 0
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(Answer(body={"object": "list", "data": [{"id": name} for name in endpoint.served]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                seen = Seen(self.path, {key.lower(): value for key, value in self.headers.items()}, body)
                with endpoint._lock:
                    endpoint.seen.append(seen)
                    endpoint._at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._at_once)
                try:
                    self._answer(endpoint.behave(seen))
                finally:
                    with endpoint._lock:
                        endpoint._at_once -= 1

            def _answer(self, answer: Answer) -> None:
                if answer.seconds and self._gone_within(answer.seconds):
                    endpoint.abandoned += 1
                    self.close_connection = True
                    return
                if answer.body is None:
                    self.close_connection = True
                    return
                body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, value in (("content-length", str(len(body))), *answer.headers):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def _gone_within(self, seconds: float) -> bool:
                end = time.monotonic() + seconds
                self.connection.settimeout(0.02)
                try:
                    while time.monotonic() < end:
                        try:
                            if not self.connection.recv(1):
                                return True
                        except TimeoutError:
                            continue
                        except ConnectionError:
                            return True
                    return False
                finally:
                    self.connection.settimeout(None)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def by_the_rule(seen: Seen) -> Answer:
    role, judged = seen.turns[-1]
    harmful = "pick a lock" in judged
    model = seen.body["model"]
    if model == "guardreasoner-vl":
        request, _, response = judged.partition("\n\nAI assistant:\n")
        labels = ["harmful" if "pick a lock" in text else "unharmful" for text in (request, response)]
        labels[1] = "None" if response == "None\n" else labels[1]
        text = "<think>\nA step.\n</think>\n<result>\nAnswers:\nRequest: {}\nResponse: {}\n</result>".format(*labels)
        return Answer(body=completion(text, logprobs=seen.body.get("logprobs")))
    if model == "gpt-oss-safeguard":
        harmful = "pick a lock" in judged.rpartition("AI assistant:\n")[2]
        text = '{"violation": 1, "policy_category": "L.1"}' if harmful else '{"violation": 0, "policy_category": null}'
        return Answer(body=completion(text, reasoning="Rule L.1 speaks of locks.", logprobs=seen.body.get("logprobs")))
    refusal = "\nRefusal: No" if role == "assistant" else ""
    text = {
        "llama-guard-4": ("\n\nunsafe\nS2", "\n\nsafe"),
        "qwen3guard-gen": (
            f"Safety: Unsafe\nCategories: Non-violent Illegal Acts{refusal}",
            f"Safety: Safe\nCategories: None{refusal}",
        ),
        "shieldgemma-2": ("Yes", "No"),
        "singguard": (
            "unsafe\nIt opens a lock.\n<answer>B. Real-World Crimes & Public Safety</answer>",
            "safe\n<answer>Safe</answer>",
        ),
    }[model][0 if harmful else 1]
    cut = seen.body["max_tokens"] == 1
    return Answer(body=completion(text, finish="length" if cut else "stop", logprobs=seen.body.get("logprobs")))


def completion(text: str, *, finish: str = "stop", reasoning: str | None = None, logprobs: Any = False) -> Any:
    """The body of an answer as vLLM writes it."""
    message = {"role": "assistant", "content": text, "reasoning": reasoning, "refusal": None, "tool_calls": []}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    if logprobs:
        pieces = re.findall(r"\s*\w+|\s|[^\w\s]", text)
        assert "".join(pieces) == text
        choice["logprobs"] = {"content": [_token(piece) for piece in pieces]}
    usage = {"prompt_tokens": 30, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 2}}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": usage}


def _token(piece: str) -> dict[str, Any]:
    said = piece.strip()
    others = [pair[1 - pair.index(said)] for pair in _OPPOSITE if said in pair]
    options = [(piece, 0.9), *((piece.replace(said, other), 0.1) for other in others)]
    written = [{"token": text, "logprob": math.log(share), "bytes": list(text.encode())} for text, share in options]
    return {**written[0], "top_logprobs": written}


def _shown(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append(part["text"])
        else:
            kind, _, data = part["image_url"]["url"].partition(";base64,")
            assert kind.startswith("data:image/")
            parts.append(base64.b64decode(data, validate=True).decode("latin-1"))
    return "".join(parts)
