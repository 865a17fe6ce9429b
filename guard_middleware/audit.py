"""The decision log: one JSON line per request, with digests instead of content.

``AuditLog.write`` builds the line at once and hands it to a thread, so that the event loop never waits
for the disk. A line is one ``write`` on an ``O_APPEND`` descriptor: processes may share a file, and a
file that was renamed or removed (logrotate) is opened anew before the next line. A disk that is full
costs lines, which are counted and reported once, and never a decision.

Content leaves only as keyed digests, unless ``capture_content`` is set. Free text that does leave (the
guard's reasoning, captured content) passes the operator's ``Redactor`` first.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from guard_middleware import __version__
from guard_middleware.errors import ConfigError
from guard_middleware.evidence import (
    ContentDigest,
    Redactor,
    bypasses,
    canonical,
    conversation_value,
    message_value,
    stream_ending,
)
from guard_middleware.types import GuardCall, Record, Verdict

SCHEMA = "guard_middleware.decision/1"

_log = logging.getLogger(__name__)


class AuditLog:
    """Writes one line per ``Record`` to ``path``; without a path it does nothing.

    Raises ``ConfigError`` when the file cannot be opened at the start. Afterwards nothing raises: lines
    that could not be written, or that did not fit in ``max_pending_bytes`` of waiting lines, are counted
    in ``lost``. ``await aclose()`` writes what is waiting.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        digest: ContentDigest | None = None,
        redactor: Redactor | None = None,
        reasoning: bool = True,
        capture_content: bool = False,
        max_pending_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        self.written = 0
        self.lost = 0
        self._path = None if path is None else Path(path)
        self._digest = digest or ContentDigest()
        self._redact = redactor or Redactor()
        self._reasoning = reasoning
        self._capture_content = capture_content
        self._max_pending = max_pending_bytes
        self._pending_bytes = 0
        self._lines: deque[bytes] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._failing = False
        self._torn = False
        self._fd = -1
        self._thread: threading.Thread | None = None
        if self._path is not None:
            try:
                self._fd = _open(self._path)
            except OSError as error:
                raise ConfigError(
                    f"cannot write the decision log {self._path} ({error.strerror})",
                    remedy="create its directory and let this process write there, or leave the path out",
                ) from None
            self._thread = threading.Thread(target=self._run, name="guard-audit", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def write(self, record: Record, *, trace_id: str | None = None) -> None:
        """Queues the line of a finished request. Never raises, never blocks on the disk."""
        if self._thread is None:
            return
        try:
            line = self.line(record, trace_id=trace_id)
        except Exception as error:
            self._lose(f"a record could not be written down ({type(error).__name__})")
            return
        self._queue(line)

    def note(self, schema: str, value: Mapping[str, Any]) -> None:
        """Queues a line about something else than a request, without content; its ``schema`` tells it from decisions.

        Never raises, never blocks on the disk."""
        if self._thread is not None:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._queue(canonical({"schema": schema, "version": __version__, "time": time, **value}) + b"\n")

    def _queue(self, line: bytes) -> None:
        with self._wake:
            fits = not self._closed and self._pending_bytes + len(line) <= self._max_pending
            if fits:
                self._pending_bytes += len(line)
                self._lines.append(line)
                self._wake.notify()
        if not fits:
            self._lose("the log is closed" if self._closed else "the disk does not keep up")

    def line(self, record: Record, *, trace_id: str | None = None) -> bytes:
        """The line of a record, newline included; docs/telemetry.md describes its fields."""
        conversation = record.conversation
        content: dict[str, Any] = {
            "input": None if conversation is None else self._digest.input(conversation),
            "answers": [self._digest.answer(answer) for answer in record.answers],
            "images": [] if conversation is None else [self._digest.blob(blob) for blob in conversation.blobs()],
        }
        lapses = bypasses(record)
        value: dict[str, Any] = {
            "schema": SCHEMA,
            "version": __version__,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": record.id,
            "trace_id": trace_id,
            "outcome": record.outcome,
            "status": record.status,
            "error": record.error,
            "method": record.method,
            "path": record.path[:512],
            "dialect": record.dialect,
            "model": None if record.model is None else record.model[:512],
            "stream": record.stream,
            "tenant": record.tenant,
            "policy": record.policy,
            "policy_digest": record.policy_digest,
            "upstream_called": record.upstream_called,
            "held_bytes": record.held_bytes,
            "released_bytes": record.released_bytes,
            "stream_mode": record.stream_mode,
            "stream_ending": stream_ending(record),
            "released_characters": record.released_characters,
            "leaked_characters": record.leaked_characters,
            "bypassed": [{"source": source, "reason": reason} for source, reason in lapses],
            "timings": dict(record.timings),
            "hmac_key": self._digest.key_id,
            "content": content,
            "guard_calls": len(record.calls),
            "decisions": [self._decision(call) for call in record.calls],
        }
        if self._capture_content:
            captured = (self._redact, self._digest.blob)
            value["captured"] = {
                "input": None if conversation is None else conversation_value(conversation, *captured),
                "answers": [message_value(answer, *captured) for answer in record.answers],
                "drawn_text": sorted({self._redact(t) for call in record.calls for t in _drawn_text(call)}),
            }
        return canonical(value) + b"\n"

    def _decision(self, call: GuardCall) -> dict[str, Any]:
        decision = call.decision
        return {
            "id": decision.id,
            "source": call.source,
            "choice": call.choice,
            "action": decision.action,
            "would": decision.would,
            "basis": decision.basis,
            "policy": decision.policy,
            "policy_digest": decision.policy_digest,
            "error": decision.error,
            "revision": call.revision,
            "seconds": call.seconds,
            "verdict": None if decision.verdict is None else self._verdict(decision.verdict),
            "opinions": [
                {
                    "guard": opinion.guard,
                    "error": opinion.error,
                    "began": opinion.began,
                    "seconds": opinion.seconds,
                    "verdict": None if opinion.verdict is None else self._verdict(opinion.verdict),
                }
                for opinion in call.opinions
            ],
        }

    def _verdict(self, verdict: Verdict) -> dict[str, Any]:
        usage = verdict.usage
        return {
            "request": verdict.request,
            "response": verdict.response,
            "request_score": verdict.request_score,
            "response_score": verdict.response_score,
            "categories": list(verdict.categories),
            "reasoning": self._redact(verdict.reasoning) if self._reasoning else None,
            "model": verdict.model,
            "revision": verdict.revision,
            "tokens": {"prompt": usage.prompt, "completion": usage.completion, "reasoning": usage.reasoning},
            "drawn_text_chars": [len(text) for text in verdict.drawn_text],
            "timings": dict(verdict.timings),
            "mode": verdict.judging.mode,
            "thought": verdict.thought,
            "cached": verdict.cached,
            "left_out": dict(verdict.left_out),
            "ignored": list(verdict.ignored),
        }

    async def aclose(self) -> None:
        """Writes what is waiting, then closes the file."""
        await asyncio.to_thread(self.close)

    def close(self, timeout: float = 10.0) -> None:
        """As ``aclose``, for callers without a loop; gives up on a disk that hangs for ``timeout`` seconds."""
        if self._thread is None:
            return
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)
        atexit.unregister(self.close)
        if self._thread.is_alive():
            with self._wake:
                abandoned = len(self._lines)
                self._lines.clear()
            self._lose("the disk hangs", abandoned)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._lines and not self._closed:
                    self._wake.wait()
                if not self._lines:
                    break
                line = self._lines.popleft()
            self._append(line)
            with self._wake:
                self._pending_bytes -= len(line)
        os.close(self._fd)

    def _append(self, line: bytes) -> None:
        try:
            self._follow_rotation()
            # After a torn line a newline keeps the next one readable.
            data = b"\n" + line if self._torn else line
            size = os.write(self._fd, data)
            while size < len(data):
                self._torn = True
                size += os.write(self._fd, data[size:])
            self._torn = self._failing = False
            self.written += 1
        except OSError as error:
            self._lose(f"cannot write to {self._path} ({error.strerror})")

    def _follow_rotation(self) -> None:
        assert self._path is not None
        opened = os.fstat(self._fd)
        try:
            present = os.stat(self._path)
        except FileNotFoundError:
            present = None
        if present is None or (present.st_ino, present.st_dev) != (opened.st_ino, opened.st_dev):
            fd = _open(self._path)
            os.close(self._fd)
            self._fd, self._torn = fd, False

    def _lose(self, why: str, lines: int = 1) -> None:
        """Counts lost lines, and warns once until a line is written again."""
        with self._wake:
            self.lost += lines
            first, self._failing = not self._failing, True
        if first and lines:
            _log.warning("decision log: %s; lines are being lost, decisions are not affected", why)


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _drawn_text(call: GuardCall) -> Sequence[str]:
    return () if call.decision.verdict is None else call.decision.verdict.drawn_text
