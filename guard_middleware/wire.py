"""How a Conversation travels to the worker: one binary frame, images as raw bytes.

    4 bytes big-endian header length | header (UTF-8 JSON) | blob bytes, one after another

The header holds the request and, per blob, its length; no base64 anywhere. The answer is plain JSON.
Decoding refuses every frame that is not exactly this with ``WireError``, and never raises anything else.

Standard library only: the gateway and the worker must agree on this without sharing a dependency.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, Protocol

from guard_middleware.errors import GuardError, GuardErrorKind, GuardMiddlewareError
from guard_middleware.types import (
    REASON,
    Blob,
    Conversation,
    Definition,
    Judging,
    Message,
    Part,
    Reasoning,
    Source,
    Text,
    ToolCall,
    ToolCallResponse,
    Usage,
    Verdict,
)

CONTENT_TYPE = "application/vnd.guard-middleware.moderate"
_LENGTH = struct.Struct(">I")


class WireError(GuardMiddlewareError):
    """A frame or an answer that does not follow this module."""


@dataclass(frozen=True, slots=True)
class ModerationRequest:
    """One question to the guard.

    ``deadline`` is the time left, in seconds, when the frame was made (clocks are not shared).
    ``reader`` None leaves the reading of drawn text to the model's own default.
    """

    id: str
    conversation: Conversation
    source: Source
    deadline: float
    reader: bool | None = None
    traceparent: str | None = None
    judging: Judging = REASON


class Guard(Protocol):
    """Whatever answers questions: a worker, several of them, what is remembered of either."""

    async def moderate(self, request: ModerationRequest) -> Verdict | GuardError:
        """Total, and no later than ``request.deadline`` seconds from now."""


def encode_request(request: ModerationRequest) -> bytes:
    """The frame of a request; raises ``WireError`` for media that was not made canonical."""
    blobs: list[bytes] = []
    conversation = request.conversation
    header = {
        "id": request.id,
        "source": request.source,
        "deadline": request.deadline,
        "reader": request.reader,
        "traceparent": request.traceparent,
        "judging": judging_value(request.judging),
        "messages": [_message(message, blobs) for message in conversation.messages],
        "definitions": [[d.kind, d.text] for d in conversation.definitions],
        "answer": None if conversation.answer is None else _message(conversation.answer, blobs),
    }
    header["blobs"] = [len(data) for data in blobs]
    head = json.dumps(header, separators=(",", ":")).encode("ascii")
    return b"".join((_LENGTH.pack(len(head)), head, *blobs))


def decode_request(frame: bytes) -> ModerationRequest:
    """The request in a frame; raises ``WireError`` and nothing else."""
    try:
        (size,) = _LENGTH.unpack_from(frame)
        header = json.loads(frame[4 : 4 + size].decode("utf-8"))
        blobs, offset = [], 4 + size
        for length in header["blobs"]:
            if type(length) is not int or length < 0:
                raise WireError("negative blob length")
            blobs.append(frame[offset : offset + length])
            offset += length
        if offset != len(frame):
            raise WireError("frame length does not match its header")
        if header["source"] not in ("input", "output"):
            raise WireError("unknown source")
        answer = header["answer"]
        if type(header["messages"]) is not list or type(header["definitions"]) is not list:
            raise WireError("expected a list")
        return ModerationRequest(
            id=_str(header["id"]),
            source=header["source"],
            deadline=float(header["deadline"]),
            reader=header["reader"] if header["reader"] is None else bool(header["reader"]),
            traceparent=header["traceparent"],
            judging=_parse_judging(header["judging"]),
            conversation=Conversation(
                messages=tuple(_parse_message(m, blobs) for m in header["messages"]),
                definitions=tuple(Definition(_str(kind), _str(text)) for kind, text in header["definitions"]),
                answer=None if answer is None else _parse_message(answer, blobs),
            ),
        )
    except WireError:
        raise
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise WireError(f"malformed frame ({type(error).__name__})") from None


def _str(value: Any) -> str:
    if type(value) is not str:
        raise WireError("expected a string")
    return value


def judging_value(judging: Judging) -> list[str | float]:
    """A way of judging as JSON: on the wire, and in what a verdict is kept under."""
    return [judging.mode, judging.low, judging.high]


def _parse_judging(value: Any) -> Judging:
    mode, low, high = value
    if not {type(low), type(high)} <= {int, float}:
        raise WireError("bounds that are no numbers")
    return Judging(_str(mode), low, high)  # type: ignore[arg-type] # it checks its mode


def _message(message: Message, blobs: list[bytes]) -> list[Any]:
    return [message.role, message.name, [_part(part, blobs) for part in message.parts]]


def _part(part: Part, blobs: list[bytes]) -> list[Any]:
    match part:
        case Text(text):
            return ["text", text]
        case Reasoning(text):
            return ["reasoning", text]
        case ToolCall(id, name, arguments):
            return ["tool_call", id, name, arguments]
        case ToolCallResponse(id, text):
            return ["tool_call_response", id, text]
        case Blob(mime_type, data, _):
            blobs.append(data)
            return ["blob", mime_type, len(blobs) - 1]
        case _:
            raise WireError("media must be canonical bytes before it is moderated")


def _parse_message(value: Any, blobs: list[bytes]) -> Message:
    role, name, parts = value
    if role not in ("system", "user", "assistant", "tool"):
        raise WireError("unknown role")
    return Message(role, tuple(_parse_part(part, blobs) for part in parts), None if name is None else _str(name))


def _parse_part(value: Any, blobs: list[bytes]) -> Part:
    match value:
        case ["text", text]:
            return Text(_str(text))
        case ["reasoning", text]:
            return Reasoning(_str(text))
        case ["tool_call", id, name, arguments]:
            return ToolCall(_str(id), _str(name), _str(arguments))
        case ["tool_call_response", id, text]:
            return ToolCallResponse(_str(id), _str(text))
        case ["blob", mime_type, int(index)] if index >= 0:
            return Blob(_str(mime_type), blobs[index])
        case _:
            raise WireError("unknown part")


def encode_answer(id: str, outcome: Verdict | GuardError) -> bytes:
    """The worker's answer to request ``id``, as JSON."""
    if isinstance(outcome, GuardError):
        body: dict[str, Any] = {
            "error": {"kind": outcome.kind.value, "message": outcome.message, "retry_after": outcome.retry_after}
        }
    else:
        body = {
            "verdict": {
                "request": outcome.request,
                "response": outcome.response,
                "request_score": outcome.request_score,
                "response_score": outcome.response_score,
                "reasoning": outcome.reasoning,
                "usage": [outcome.usage.prompt, outcome.usage.completion, outcome.usage.reasoning],
                "model": outcome.model,
                "revision": outcome.revision,
                "categories": outcome.categories,
                "drawn_text": outcome.drawn_text,
                "timings": outcome.timings,
                "judging": judging_value(outcome.judging),
                "thought": outcome.thought,
                "ignored": outcome.ignored,
            }
        }
    return json.dumps({"id": id, **body}, separators=(",", ":")).encode("ascii")


def decode_answer(data: bytes | str) -> tuple[str, Verdict | GuardError]:
    """(request id, outcome) of an answer; raises ``WireError`` for anything that is not exactly one outcome."""
    try:
        body = json.loads(data)
        id = _str(body["id"])
        if ("error" in body) == ("verdict" in body):
            raise WireError("an answer holds a verdict or an error")
        if "error" in body:
            error = body["error"]
            return id, GuardError(
                GuardErrorKind(error["kind"]), _str(error["message"]), retry_after=error["retry_after"]
            )
        v = body["verdict"]
        if v["request"] not in ("harmful", "unharmful") or v["response"] not in ("harmful", "unharmful", None):
            raise WireError("unknown label")
        if (v["response"] is None) != (v["response_score"] is None):
            raise WireError("a response score without a response label, or the reverse")
        prompt, completion, thought = v["usage"]
        return id, Verdict(
            request=v["request"],
            response=v["response"],
            request_score=_score(v["request_score"]),
            response_score=None if v["response_score"] is None else _score(v["response_score"]),
            reasoning=_str(v["reasoning"]),
            usage=Usage(int(prompt), int(completion), int(thought)),
            model=_str(v["model"]),
            revision=_str(v["revision"]),
            categories=tuple(_str(c) for c in v["categories"]),
            drawn_text=tuple(_str(t) for t in v["drawn_text"]),
            timings=tuple((_str(stage), float(seconds)) for stage, seconds in v["timings"]),
            judging=_parse_judging(v["judging"]),
            thought=bool(v["thought"]),
            ignored=tuple(_str(kind) for kind in v.get("ignored", ())),
        )
    except WireError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise WireError(f"malformed answer ({type(error).__name__})") from None


def _score(value: Any) -> float:
    score = float(value)
    if not 0.0 <= score <= 1.0:
        raise WireError("a score outside 0..1")
    return score
