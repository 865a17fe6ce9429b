"""Regression cases as data: what one case may say, and the bytes that it stands for.

A case file is a list of cases (``tests/regression/*.yaml``). Unknown keys are errors, so that a misspelt expectation
cannot pass by being ignored. In a body, ``{$image: {...}}`` is a data URL, ``{$repeat: [value, n]}`` a long string or
array, ``{$nest: n}`` an n-fold array, ``{$base64: text}`` its base64.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from guard_middleware import strictyaml
from guard_middleware.errors import REJECT_STATUS, RejectKind

CHAT = "/v1/chat/completions"
#: how a case runs; ``whole`` is no stream
Mode: TypeAlias = Literal["whole", "hold", "window", "async"]
StreamMode: TypeAlias = Literal["hold", "window", "async"]
#: what an ``async`` stream may show before its verdict
LEAK_BOUND = 16
#: rules of streams; windows so short that most answers have several, and an overlap that holds the marker
STREAMS: dict[str, dict[str, Any]] = {
    "hold": {"mode": "hold"},
    "window": {"mode": "window", "first_window": 24, "last_window": 24, "growth": 1, "overlap": 12},
    "async": {"mode": "async", "leak_bound": LEAK_BOUND, "first_window": 24, "last_window": 24, "overlap": 12},
}
BENIGN, GOOD, BAD = "how do I bake bread?", "Bread needs an hour.", "First, pick a lock with two bits of wire."


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Request(_Strict):
    """``say`` or ``messages`` with ``fields`` beside them; or a whole ``body``; or bytes (text, base64, hex)."""

    method: str = "POST"
    path: str = CHAT
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    type: str | None = "application/json"
    say: Any = BENIGN
    messages: Any = None
    fields: dict[str, Any] = {}
    body: Any = None
    text: str | None = None
    encoding: str = "utf-8"
    base64: str | None = None
    hex: str | None = None
    repeat: int = 1
    #: the body arrives in pieces of so many bytes
    pieces: int | None = None
    client: str = "203.0.113.9"

    @field_validator("headers", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        return tuple(value.items()) if isinstance(value, dict) else value

    @property
    def is_raw(self) -> bool:
        return self.text is not None or self.base64 is not None or self.hex is not None or self.method != "POST"

    def value(self) -> Any:
        if self.body is not None:
            return build(self.body)
        messages = [{"role": "user", "content": self.say}] if self.messages is None else self.messages
        return build({"model": "m", "messages": messages, **self.fields})

    def data(self, stream: bool) -> bytes:
        if self.text is not None:
            return (self.text * self.repeat).encode(self.encoding)
        if self.base64 is not None:
            return base64.b64decode(self.base64)
        if self.hex is not None:
            return bytes.fromhex(self.hex)
        if self.method != "POST":
            return b""
        value = self.value()
        return json.dumps({**value, "stream": True} if stream else value, ensure_ascii=False).encode(self.encoding)


class Upstream(_Strict):
    """What the application behind the guard answers: texts, a message, or raw JSON, events or bytes."""

    say: str | tuple[str, ...] = GOOD
    message: dict[str, Any] | None = None
    choice: dict[str, Any] = {}
    top: dict[str, Any] = {}
    finish: str | None = "stop"
    #: characters of text per streamed chunk
    pieces: int = 7
    body: Any = None
    text: str | None = None
    base64: str | None = None
    events: tuple[Any, ...] | None = None
    done: bool = True
    sse: str | None = None
    status: int = 200
    type: str | None = None
    headers: dict[str, str] = {}
    #: the connection breaks: before the head, or within the body
    cut: Literal["head", "body"] | None = None
    #: bytes per piece of the body; without it, a stream comes event by event
    chunk: int | None = None

    @property
    def only_streams(self) -> bool:
        return self.events is not None or self.sse is not None

    @property
    def never_streams(self) -> bool:
        return self.body is not None or self.text is not None or self.base64 is not None

    def answer(self, stream: bool, choices: int) -> tuple[str, bytes]:
        """(content type, body)."""
        kind = "text/event-stream" if stream else "application/json"
        return self.type or kind, self._stream(choices) if stream else self._whole(choices)

    def cut_up(self, answer: bytes) -> list[bytes]:
        """The pieces in which ``answer`` arrives."""
        if self.chunk is None:
            return re.split(rb"(?<=\n\n)(?=.)", answer)
        return [answer[start : start + self.chunk] for start in range(0, len(answer), self.chunk)]

    def _messages(self, choices: int) -> list[dict[str, Any]]:
        if self.message is not None:
            return [{"role": "assistant", **build(self.message)}]
        texts = [self.say] if isinstance(self.say, str) else self.say
        return [{"role": "assistant", "content": texts[index % len(texts)]} for index in range(choices)]

    def _whole(self, choices: int) -> bytes:
        if self.base64 is not None:
            return base64.b64decode(self.base64)
        if self.text is not None:
            return self.text.encode()
        if self.body is not None:
            return json.dumps(build(self.body)).encode()
        said = [
            {"index": index, "message": message, "finish_reason": self.finish, **build(self.choice)}
            for index, message in enumerate(self._messages(choices))
        ]
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m"}
        return json.dumps({**head, "choices": said, "usage": usage, **build(self.top)}).encode()

    def _stream(self, choices: int) -> bytes:
        if self.sse is not None:
            return self.sse.encode()
        events = build(list(self.events)) if self.events is not None else self._chunks(choices)
        lines = [event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events]
        return "".join(f"data: {line}\n\n" for line in [*lines, *(["[DONE]"] if self.done else [])]).encode()

    def _chunks(self, choices: int) -> list[Any]:
        """The deltas of all choices, interleaved."""
        told = [list(self._deltas(message)) for message in self._messages(choices)]
        rounds = max(map(len, told))
        chunks = [
            chunk(deltas[number], None, index, build(self.choice), build(self.top))
            for number in range(rounds)
            for index, deltas in enumerate(told)
            if number < len(deltas)
        ]
        return [*chunks, *(chunk({}, self.finish, index) for index in range(len(told)))]

    def _deltas(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"role": "assistant", "content": ""}
        for name, value in message.items():
            if name == "tool_calls":
                for index, call in enumerate(value):
                    yield {name: [{"index": index, **call}]}
            elif isinstance(value, str) and name != "role":
                for start in range(0, len(value), self.pieces):
                    yield {name: value[start : start + self.pieces]}
            elif name != "role":
                yield {name: value}


def chunk(delta: Any, finish: str | None, index: int = 0, choice: Any = None, top: Any = None) -> dict[str, Any]:
    said = {"index": index, "delta": delta, "finish_reason": finish, **(choice or {})}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**head, "choices": [said], **(top or {})}


class GuardScript(_Strict):
    """A guard that fails (``error``) or says ``output`` from its ``after``-th question on, after ``wait`` seconds."""

    error: str | None = None
    output: str | None = None
    after: int = 0
    wait: float = 0.0


class Expect(_Strict):
    """What must be seen. Paths are dotted (``messages.0.content``)."""

    status: int = 200
    code: str | None = None
    outcome: str | None = None
    #: requests that reached the upstream, and questions that reached the guard
    reached: int | None = None
    calls: int | None = None
    sent: dict[str, Any] = {}
    absent: tuple[str, ...] = ()
    sent_contains: tuple[str, ...] = ()
    sent_lacks: tuple[str, ...] = ()
    sent_headers: dict[str, str | None] = {}
    sent_query: str | None = None
    client: dict[str, Any] = {}
    client_contains: tuple[str, ...] = ()
    client_lacks: tuple[str, ...] = ()
    client_headers: dict[str, str | None] = {}
    said: tuple[str | None, ...] | None = None
    finish: tuple[str | None, ...] | None = None
    judged_contains: tuple[str, ...] = ()
    judged_lacks: tuple[str, ...] = ()
    record: dict[str, Any] = {}

    @field_validator(
        "client_contains",
        "client_lacks",
        "sent_contains",
        "sent_lacks",
        "judged_contains",
        "judged_lacks",
        mode="before",
    )
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


def _short(words: str) -> dict[str, Any]:
    """``passes``, ``blocked``, ``withheld``, ``unscreenable``; ``refused CODE``; ``broken CODE``."""
    word, _, code = words.partition(" ")
    match word:
        case "passes":
            return {"status": 200, "outcome": "allowed", "reached": 1}
        case "blocked":
            return {"status": 400, "code": "content_filter", "outcome": "blocked", "reached": 0, "calls": 1}
        case "withheld":
            lacks = ("pick a lock", "wire", "two bits")
            return {"status": 200, "outcome": "blocked", "reached": 1, "client_lacks": lacks}
        case "refused":
            status = REJECT_STATUS[RejectKind(code)]
            return {"status": status, "code": code, "outcome": "rejected", "reached": 0, "calls": 0}
        case "broken":
            status = 504 if code == "upstream_timeout" else 502
            return {"status": status, "code": code, "outcome": "upstream_error", "reached": 1}
        case "unguarded":
            return {"status": 503, "code": "guard_unavailable", "outcome": "guard_error"}
    raise ValueError(f"not an expectation: {words}")


class Case(_Strict):
    id: str = Field(pattern=r"^[A-H][0-9]{1,2}-[a-z0-9-]+$")
    title: str = Field(min_length=1)
    #: where the attack is known from, beyond the catalogue
    source: str | None = None
    #: what the same gateway served before: cases without an id and a title
    earlier: tuple[dict[str, Any], ...] = ()
    request: Request = Request()
    upstream: Upstream = Upstream()
    guard: GuardScript | None = None
    config: dict[str, Any] = {}
    expect: Expect
    stream: Literal["both", "only", "never"] = "both"
    #: modes of streams in which it runs; without it all, or ``hold`` for a class that streams do not concern
    modes: tuple[StreamMode, ...] | None = Field(default=None, min_length=1)
    through: Literal["middleware", "proxy", "both"] = "middleware"

    @field_validator("expect", mode="before")
    @classmethod
    def _expanded(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _short(value)
        short = _short(value["is"]) if isinstance(value, dict) and "is" in value else {}
        rest = {name: item for name, item in value.items() if name != "is"}
        more = rest.get("client_lacks", ())
        lacks = (*short.get("client_lacks", ()), *((more,) if isinstance(more, str) else more))
        return {**short, **rest, "client_lacks": lacks}

    @model_validator(mode="after")
    def _possible(self) -> Case:
        if self.stream == "only" and (self.request.is_raw or self.upstream.never_streams):
            raise ValueError("this case cannot be streamed")
        return self

    @property
    def streams(self) -> tuple[bool, ...]:
        """Whether it runs streamed, plain, or both."""
        if self.request.is_raw or self.upstream.never_streams or self.stream == "never":
            return (False,)
        return (True,) if self.upstream.only_streams or self.stream == "only" else (False, True)

    @property
    def runs(self) -> tuple[Mode, ...]:
        """How it runs: whole, and streamed in each of its modes."""
        whole: tuple[Mode, ...] = ("whole",) if False in self.streams else ()
        modes = self.modes or (("hold",) if self.id[0] in "BDFH" else ("hold", "window", "async"))
        return (*whole, *(modes if True in self.streams else ()))

    def settings(self, mode: Mode) -> dict[str, Any]:
        """The configuration under which it runs."""
        if mode == "whole":
            return self.config
        policies = dict(self.config.get("policies", {}))
        if "default_policy" not in self.config:
            policies.setdefault("default", {})
        for name, policy in policies.items():
            output = policy.get("output", {})
            if output.get("moderate", True):
                policies[name] = {**policy, "output": {**output, "stream": STREAMS[mode]}}
        return {"default_policy": "default", **self.config, "policies": policies}

    @property
    def exchanges(self) -> list[Case]:
        """The earlier ones, and then its own."""
        named = {"id": self.id, "title": self.title}
        return [*(type(self).model_validate({**named, **told}) for told in self.earlier), self]

    @property
    def ways(self) -> tuple[Literal["middleware", "proxy"], ...]:
        """What it runs through."""
        return ("middleware", "proxy") if self.through == "both" else (self.through,)

    @property
    def negative(self) -> bool:
        """Whether this must pass: what a guard that refuses everything would fail."""
        return self.expect.status == 200 and self.expect.outcome in ("allowed", "annotated")


def load(path: Path, kind: type[Case] = Case) -> list[Case]:
    """The cases of one file, which is named after their class."""
    told = strictyaml.parse(path.read_text("utf-8"), path=path.name).value
    found = [kind.model_validate(_plain(item)) for item in told]
    wrong = [case.id for case in found if case.id[0] != path.stem]
    assert not wrong, f"{path.name} holds cases of another class: {wrong}"
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def build(value: Any) -> Any:
    """``value`` with every generator run."""
    if isinstance(value, list | tuple):
        return [build(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$image": options, **rest} if not rest:
            return data_url(Picture.model_validate(options))
        case {"$repeat": [unit, count], **rest} if not rest:
            return unit * count if isinstance(unit, str) else [build(unit) for _ in range(count)]
        case {"$nest": depth, **rest} if not rest:
            nested: Any = 1
            for _ in range(depth):
                nested = [nested]
            return nested
        case {"$base64": text, **rest} if not rest:
            return base64.b64encode(text.encode()).decode()
    return {name: build(item) for name, item in value.items()}


class Picture(_Strict):
    """One image file, made by Pillow and then damaged."""

    format: Literal["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"] = "PNG"
    size: tuple[int, int] = (16, 16)
    mode: str = "RGB"
    colour: Any = None
    #: frames beyond the first
    more_frames: int = 0
    note: str | None = None
    orientation: int | None = None
    comment: str | None = None
    trailing: str = ""
    cut: int = 0
    #: what the data URL claims
    mime: str = "image/png"
    #: what stands before and after the base64
    prefix: str = ""
    junk: str = ""


def picture(options: Picture) -> bytes:
    colour = tuple(options.colour) if isinstance(options.colour, list) else options.colour
    image = Image.new(options.mode, options.size, *([] if colour is None else [colour]))
    extra: dict[str, Any] = {}
    if options.note is not None:
        extra["pnginfo"] = PngImagePlugin.PngInfo()
        extra["pnginfo"].add_text("note", options.note)
    if options.orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = options.orientation
        extra["exif"] = exif.tobytes()
    if options.comment is not None:
        extra["comment"] = options.comment.encode()
    if options.more_frames:
        shades = [
            Image.new(options.mode, options.size, (80 * (index + 1), 0, 0)) for index in range(options.more_frames)
        ]
        extra |= {"save_all": True, "append_images": shades}
    buffer = io.BytesIO()
    image.save(buffer, options.format, **extra)
    data = buffer.getvalue()
    return (data[: -options.cut] if options.cut else data) + options.trailing.encode()


def data_url(options: Picture) -> str:
    return f"{options.prefix}data:{options.mime};base64,{base64.b64encode(picture(options)).decode()}{options.junk}"
