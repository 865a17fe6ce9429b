"""An OpenAI-compatible server: what it is asked, and what it answers, one chat completion, read strictly and totally.

``Server`` asks and never outlives its caller's deadline: cancelling it closes the connection, which ends the work at
servers that watch for that (vLLM, SGLang). Redirects are refused, proxies of the environment are not used, an answer
is at most ``MAX_ANSWER`` bytes, and none is logged. ``read`` takes the text of the one choice, or raises
``GuardError``: ``truncated`` where the token limit ended the output, ``unparseable`` where it is no text (a tool call,
a refusal, a filter), ``unavailable`` where the server does not speak this protocol. ``score`` finds the probability of
*harmful* where a label was written.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from guard_middleware.errors import GuardError, GuardErrorKind
from guard_middleware.types import Blob, Usage
from guard_middleware.worker.guards.base import Content, Output, Question, Words

#: Alternatives asked for per token: enough for every spelling of two or three labels, within every server's limit.
TOP_LOGPROBS = 10
#: bytes of one answer; a longer one is ``unavailable``
MAX_ANSWER = 4 * 1024 * 1024
_CONNECT_SECONDS = 2.0
_TOO_LONG = ("context length", "too long", "longer than", "maximum model length", "max_model_len", "context window")


@dataclass(frozen=True, slots=True)
class Token:
    """One token that was written, and what might have been: (text, log probability)."""

    text: bytes
    options: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """``tokens`` is empty where the server gives no log probabilities."""

    output: Output
    usage: Usage
    tokens: tuple[Token, ...] = ()


def body(question: Question, model: str, *, logprobs: bool) -> bytes:
    """A chat completion: greedy, one choice, not streamed; images are data URLs of their canonical bytes."""
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": turn.role, "content": _content(turn.content)} for turn in question.turns],
        "max_tokens": question.max_tokens,
        "temperature": 0.0,
        "stream": False,
    }
    if question.template:
        asked["chat_template_kwargs"] = dict(question.template)
    if logprobs:
        asked |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    return json.dumps(asked, separators=(",", ":")).encode("ascii")


def _content(content: Content) -> str | list[dict[str, Any]]:
    if len(content) == 1 and isinstance(content[0], str):
        return content[0]
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, Blob):
            url = f"data:{part.mime_type};base64,{base64.b64encode(part.data).decode('ascii')}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append({"type": "text", "text": part})
    return parts


def read(answer: bytes, *, may_be_cut: bool = False) -> Completion:
    """The completion in an answer's body; raises ``GuardError`` and nothing else."""
    try:
        said = json.loads(answer)
        (choice,) = said["choices"]
        message, finish = choice["message"], choice["finish_reason"]
        text = message.get("content")
        reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
        if finish == "length" and not may_be_cut:
            raise GuardError(GuardErrorKind.TRUNCATED, "no verdict within the tokens of the output")
        if finish not in ("stop", "length"):
            raise GuardError(GuardErrorKind.UNPARSEABLE, "the endpoint ended the output by something else than its end")
        if message.get("tool_calls") or message.get("refusal"):
            raise GuardError(GuardErrorKind.UNPARSEABLE, "the output is a call or a refusal, and no verdict")
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise GuardError(GuardErrorKind.UNPARSEABLE, "the output holds no text")
        usage = said.get("usage") or {}
        details = usage.get("completion_tokens_details") or {}
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("reasoning_tokens"))
        return Completion(Output(text, reasoning), Usage(*map(_count, counts)), tuple(_tokens(choice)))
    except GuardError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        raise GuardError(GuardErrorKind.UNAVAILABLE, "the endpoint does not answer with a chat completion") from None


def _count(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def _tokens(choice: dict[str, Any]) -> Iterable[Token]:
    for token in (choice.get("logprobs") or {}).get("content") or ():
        options = tuple((_bytes(one), float(one["logprob"])) for one in token.get("top_logprobs") or ())
        yield Token(_bytes(token), options)


def _bytes(token: dict[str, Any]) -> bytes:
    raw = token.get("bytes")
    return bytes(raw) if isinstance(raw, list) else str(token["token"]).encode("utf-8", "replace")


def score(completion: Completion, at: int, words: Words) -> float | None:
    """P(harmful) against P(unharmful) of the label that begins at character ``at`` of the output's text.

    Weighs the alternatives of the token that holds the label's first character: every beginning of a word of one
    side and of none of the other. None where the server gave none, or where the label is not found in its tokens.
    """
    if at < 0:
        return None
    position = _place(completion, at)
    for token in completion.tokens:
        if position < len(token.text):
            return _weigh(token, token.text[:position], words) if position >= 0 else None
        position -= len(token.text)
    return None


def _place(completion: Completion, at: int) -> int:
    """Where character ``at`` of the text is in the tokens' bytes, or -1.

    Tokens hold more than the text (reasoning, control tokens), and servers give halves of a letter as another one. So
    the text is sought from the label to its end, or else the label where the tokens begin as the text does.
    """
    written = b"".join(token.text for token in completion.tokens)
    head, tail = (
        part.encode("utf-8", "replace") for part in (completion.output.text[:at], completion.output.text[at:])
    )
    if not tail.strip():
        return -1
    found = written.rfind(tail)
    return len(head) if found < 0 and written.startswith(head + tail.split()[0]) else found


def _weigh(token: Token, before: bytes, words: Words) -> float | None:
    mass = {"harmful": 0.0, "unharmful": 0.0}
    for option, logprob in token.options:
        if before.strip():
            if not option.startswith(before):
                continue
            option = option[len(before) :]
        side = _side(option.decode("utf-8", "replace").strip(), words)
        if side is not None and not math.isnan(logprob):
            mass[side] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return mass["harmful"] / total if total > 0.0 else None


def _side(fragment: str, words: Words) -> str | None:
    def begins(side: Sequence[str]) -> bool:
        return any(word.startswith(fragment) or fragment.startswith(word) for word in side)

    if not fragment or begins(words.harmful) == begins(words.unharmful):
        return None
    return "harmful" if begins(words.harmful) else "unharmful"


class Server:
    """The server whose ``/v1`` is at ``url``. Use it from one event loop."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)  # the caller's deadline bounds the rest
        self._client = httpx.AsyncClient(
            base_url=url, headers=headers, limits=limits, timeout=timeout, follow_redirects=False, trust_env=False
        )

    async def complete(self, question: Question, model: str, *, logprobs: bool) -> Completion:
        """Raises ``GuardError``: ``too_long`` or ``media`` for a question that the server refuses for its content,
        ``internal`` for any that it would refuse, and what ``read`` raises."""
        asked = await asyncio.to_thread(body, question, model, logprobs=logprobs)
        status, headers, answer = await self._send("POST", "chat/completions", asked)
        if status != 200:
            raise _refused(status, headers, answer)
        return read(answer, may_be_cut=question.may_be_cut)

    async def models(self) -> tuple[int, list[str]]:
        """The status of ``/models`` and the names there; none where the server does not list them."""
        status, _, answer = await self._send("GET", "models")
        try:
            return status, [str(one["id"]) for one in json.loads(answer)["data"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            return status, []

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _send(self, method: str, path: str, asked: bytes | None = None) -> tuple[int, httpx.Headers, bytes]:
        answer = bytearray()
        try:
            async with self._client.stream(method, path, content=asked) as response:
                async for chunk in response.aiter_bytes():
                    answer += chunk
                    if len(answer) > MAX_ANSWER:
                        raise GuardError(GuardErrorKind.UNAVAILABLE, "an answer of the endpoint is too large")
        except httpx.HTTPError as error:
            why = f"the endpoint is not reachable ({type(error).__name__})"
            raise GuardError(GuardErrorKind.UNAVAILABLE, why, retry_after=1.0) from None
        return response.status_code, response.headers, bytes(answer)


def _refused(status: int, headers: httpx.Headers, answer: bytes) -> GuardError:
    if status in (429, 503):
        return GuardError(GuardErrorKind.OVERLOADED, f"the endpoint is busy ({status})", retry_after=_after(headers))
    if status >= 500:
        return GuardError(GuardErrorKind.UNAVAILABLE, f"the endpoint failed ({status})", retry_after=1.0)
    if status not in (400, 413, 422):
        return GuardError(GuardErrorKind.INTERNAL, f"the endpoint refused the question ({status})")
    said = answer[:4000].decode("utf-8", "replace").lower()
    if status == 413 or any(words in said for words in _TOO_LONG):
        return GuardError(GuardErrorKind.TOO_LONG, "the prompt exceeds what the endpoint's model may read")
    # It takes other questions, so this one's content is why: policies must be able to tell that from an outage.
    return GuardError(GuardErrorKind.MEDIA, f"the endpoint refuses content like this ({status})")


def _after(headers: httpx.Headers) -> float:
    try:
        seconds = float(headers.get("retry-after", "1"))
    except ValueError:
        return 1.0
    return min(max(seconds, 0.0), 60.0) if math.isfinite(seconds) else 1.0
