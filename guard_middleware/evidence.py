"""What may be said of a request without saying what it said: keyed digests, redacted text, and what was not screened.

Telemetry and the decision log both build on this, so that a span and a line about the same request carry
the same digests, and one set of redaction rules covers both.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import orjson

from guard_middleware.errors import ConfigError
from guard_middleware.policy import is_bypass
from guard_middleware.types import (
    Blob,
    Conversation,
    Message,
    Part,
    Reasoning,
    Record,
    Source,
    Text,
    ToolCall,
    ToolCallResponse,
    Uri,
)

EPHEMERAL = "ephemeral"


class Redactor:
    """Replaces what the operator's rules match, then cuts the text to ``max_chars`` characters.

    A rule is (pattern, replacement), both as ``re.sub`` takes them; rules apply in order. They run on the
    event loop, so text past ``scan_chars`` is dropped unread. Raises ``ConfigError`` for a rule that does
    not compile, or whose pattern matches the empty string.
    """

    __slots__ = ("_max_chars", "_rules", "_scan_chars")
    CUT = "[cut]"

    def __init__(
        self, rules: Iterable[tuple[str, str]] = (), *, max_chars: int = 8192, scan_chars: int = 65_536
    ) -> None:
        compiled = []
        for pattern, replacement in rules:
            try:
                expression = re.compile(pattern)
                expression.sub(replacement, "")
            except (re.error, IndexError) as error:
                raise ConfigError(
                    f"the redaction rule {pattern!r} does not compile ({error})",
                    remedy="write a Python regular expression; in YAML put it in single quotes",
                ) from None
            if expression.search(""):
                raise ConfigError(
                    f"the redaction rule {pattern!r} matches the empty string",
                    remedy="make at least one character of it mandatory",
                )
            compiled.append((expression, replacement))
        self._rules = tuple(compiled)
        self._max_chars = max_chars
        self._scan_chars = max(scan_chars, max_chars)

    def __call__(self, text: str) -> str:
        # The rules see the text before it is cut: half of a secret would no longer match its pattern.
        whole, text = len(text), text[: self._scan_chars]
        for expression, replacement in self._rules:
            text = expression.sub(replacement, text)
        if len(text) > self._max_chars or whole > self._scan_chars:
            text = text[: self._max_chars] + self.CUT
        return text


class ContentDigest:
    """Keyed digests of content: whoever holds the key can prove that a text was judged; no one else can guess it.

    HMAC-SHA-256 over canonical JSON (sorted keys, no white space, UTF-8, as RFC 8785 has it), with media
    by their SHA-256, so that an image costs nothing here. Without a key a random one is drawn: digests
    then compare within this process only, and ``key_id`` is ``ephemeral``.
    """

    __slots__ = ("_key", "key_id")

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and len(key) < 16:
            raise ConfigError(
                "the key of content digests is shorter than 16 bytes", remedy="make one with: openssl rand -hex 32"
            )
        self._key = secrets.token_bytes(32) if key is None else key
        self.key_id = EPHEMERAL if key is None else self._mac(b"key id", b"")[:16]

    @classmethod
    def from_env(cls, variable: str, environ: Mapping[str, str] = os.environ) -> ContentDigest:
        """Keyed by the value of ``variable``, or by a random key. Raises ``ConfigError`` for a short one."""
        value = environ.get(variable)
        return cls(value.encode("utf-8", "surrogateescape") if value else None)

    def _mac(self, domain: bytes, data: bytes) -> str:
        return hmac.digest(self._key, domain + b"\0" + data, hashlib.sha256).hex()

    def input(self, conversation: Conversation) -> str:
        """Hex digest of everything that the caller sent: messages and definitions."""
        return self._mac(b"input", canonical(conversation_value(conversation)))

    def answer(self, answer: Message) -> str:
        """Hex digest of one choice of the upstream's answer."""
        return self._mac(b"answer", canonical(message_value(answer)))

    def blob(self, blob: Blob) -> str:
        """Hex digest of one image."""
        return self._mac(b"blob", blob.digest.encode("ascii"))


def canonical(value: Any) -> bytes:
    """The one JSON text of a value made of dicts with ASCII keys, lists, strings, numbers, booleans and None."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        # A lone surrogate has no UTF-8; as an escape it still has one spelling, and the record is written.
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _same(text: str) -> str:
    return text


def _sha256(blob: Blob) -> str:
    return blob.digest


def conversation_value(
    conversation: Conversation, text: Callable[[str], str] = _same, blob: Callable[[Blob], str] = _sha256
) -> dict[str, Any]:
    """Messages and definitions as plain values, each text through ``text`` and each image as ``blob(image)``."""
    return {
        "messages": [message_value(message, text, blob) for message in conversation.messages],
        "definitions": [{"kind": d.kind, "content": text(d.text)} for d in conversation.definitions],
    }


def message_value(
    message: Message, text: Callable[[str], str] = _same, blob: Callable[[Blob], str] = _sha256
) -> dict[str, Any]:
    """One message in the shape of OpenTelemetry's GenAI messages, media by digest."""
    value: dict[str, Any] = {"role": message.role, "parts": [_part_value(part, text, blob) for part in message.parts]}
    if message.name is not None:
        value["name"] = text(message.name)
    return value


def _part_value(part: Part, text: Callable[[str], str], blob: Callable[[Blob], str]) -> dict[str, str]:
    match part:
        case Text(content):
            return {"type": "text", "content": text(content)}
        case Reasoning(content):
            return {"type": "reasoning", "content": text(content)}
        case ToolCall(id, name, arguments):
            return {"type": "tool_call", "id": text(id), "name": text(name), "arguments": text(arguments)}
        case ToolCallResponse(id, response):
            return {"type": "tool_call_response", "id": text(id), "response": text(response)}
        case Blob(mime_type=mime_type):
            return {"type": "blob", "modality": "image", "mime_type": mime_type, "digest": blob(part)}
        case Uri(uri):
            return {"type": "uri", "modality": "image", "uri": text(uri)}


def stream_ending(record: Record) -> Literal["released", "cut", "held"] | None:
    """What the client saw of a streamed answer: all of it, a part, or nothing; None where none came."""
    if record.stream_mode is None:
        return None
    if record.outcome in ("allowed", "annotated"):
        return "released"
    return "cut" if record.released_characters else "held"


def bypasses(record: Record) -> tuple[tuple[Source, str], ...]:
    """(source, reason) of everything that passed without a verdict; empty when all was screened.

    Reasons: ``on_error`` (the policy lets guard errors pass), ``not_moderated`` (no question was put to
    the guard, though content went up or came back).
    """
    found: list[tuple[Source, str]] = [(call.source, "on_error") for call in record.calls if is_bypass(call.decision)]
    if record.conversation is not None and record.upstream_called:
        if not any(call.source == "input" for call in record.calls):
            found.append(("input", "not_moderated"))
        judged = len({call.choice for call in record.calls if call.source == "output"})
        due = sum(1 for answer in record.answers if answer.parts) if record.answers else 1
        # of a stream that was held, only structure and an error of ours left
        if record.released_bytes and judged < due and stream_ending(record) != "held":
            found.append(("output", "not_moderated"))
    return tuple(found)
