"""Every case of the Messages API, whole and in each mode of streams."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.sse import Decoder
from tests.support import cases, catalogue_cases
from tests.support.cases import Case, Mode
from tests.support.leaves import leaves
from tests.support.messages_cases import MessagesCase
from tests.support.replayed_cases import Seen
from tests.support.running_cases import Dialect, check, runs, unread

FILES = sorted((Path(__file__).parent / "messages").glob("*.yaml"))
CASES = [case for path in FILES for case in cases.load(path, MessagesCase)]


def events(seen: Seen) -> Iterator[Any]:
    """The bodies of the events, or the one body; every event is named as its body is."""
    if seen.header("content-type") == "application/json":
        yield json.loads(seen.body)
        return
    for event in Decoder().feed(seen.body):
        body = json.loads(event.data)
        assert event.event == body["type"]
        yield body


def pieces(event: Any) -> Iterator[tuple[Any, str]]:
    said = event.get("delta", event.get("content_block", {}))
    for name in ("text", "thinking", "partial_json"):
        if name in said:
            yield (event["index"], name), said[name]


def spoken(seen: Seen) -> tuple[list[str | None], list[str | None]]:
    """(text, stop_reason) of the one choice, streamed or not."""
    said = finish = ""
    for event in events(seen):
        blocks = event.get("content", [event.get("content_block", {})])
        said += "".join(block.get("text", "") for block in blocks) + event.get("delta", {}).get("text", "")
        finish = event.get("stop_reason") or event.get("delta", {}).get("stop_reason") or finish
    return [said or None], [finish or None]


def code(body: Any) -> str:
    error = body["error"]
    if "details" not in error:  # no dialect is known yet
        assert error["code"] in ("not_found", "method_not_allowed")
        return str(error["code"])
    assert body["type"] == "error"
    return str(error["details"]["error_code"])


def images(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        if value.get("type") == "image":
            yield base64.b64decode(value["source"]["data"], validate=True)
        for item in value.values():
            yield from images(item)
    if isinstance(value, list):
        for item in value:
            yield from images(item)


MESSAGES = Dialect(events, pieces, spoken, code, lambda value: list(images(value)))


@pytest.mark.parametrize(("case", "mode", "through"), runs(CASES))
def test_case(case: Case, mode: Mode, through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, mode, through, MESSAGES, tmp_path, monkeypatch)


def test_every_class_has_cases_in_every_way_and_not_one_sided() -> None:
    catalogue_cases.check("messages", CASES)


@pytest.mark.parametrize("value", [{"a": "how is this"}, "pick a lock"])
def test_unread_prose_is_found(value: Any) -> None:
    assert leaves(value)
    assert unread(value, "something else") != []
