"""Every case of the Messages API, whole and in each mode of streams; what runs them is ``test_cases``'."""

from __future__ import annotations

import base64
import functools
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.sse import Decoder
from tests.regression import test_cases as runner
from tests.regression.test_cases import Seen, at, leaves, unread
from tests.support import messages_cases
from tests.support.cases import Expect
from tests.support.messages_cases import Case, Mode

FILES = sorted((Path(__file__).parent / "messages").glob("*.yaml"))
CASES = [case for path in FILES for case in messages_cases.load(path)]
RUNS = [pytest.param(case, mode, id=f"{case.id}-{mode}") for case in CASES for mode in case.runs]


@pytest.fixture(autouse=True, scope="module")
def one_trust_store() -> Iterator[None]:
    """Reading the system's certificates takes longer than a case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_case(case: Case, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = case.model_copy(update={"config": case.settings(mode)})
    through = "proxy" if case.through == "proxy" else "middleware"
    seen, guard = runner.replay(run, mode != "whole", through, tmp_path, monkeypatch)
    expect = case.expect
    (record,) = seen.records
    _check_status(expect, mode, seen)
    assert record["status"] == seen.status
    assert expect.outcome is None or record["outcome"] == expect.outcome
    assert expect.reached is None or len(seen.sent) == expect.reached
    assert record["upstream_called"] == bool(seen.sent)
    # windows are questions too
    assert expect.calls is None or len(guard.asked) == expect.calls or (mode == "window" and seen.sent)
    for path, value in expect.record.items():
        assert at(record, path) == value, path
    _check_client(expect, seen)
    runner._check_upstream(expect, seen)
    transcripts = guard.transcripts()
    assert [words for words in expect.judged_contains if words not in transcripts] == [], transcripts
    assert [words for words in expect.judged_lacks if words in transcripts] == [], transcripts
    _check_coverage(case, seen, guard)


def _check_status(expect: Expect, mode: Mode, seen: Seen) -> None:
    if expect.status == 200:
        assert seen.status == 200, seen.everything
        return
    if seen.status == 200:  # the head of the stream was out: the error is its last event
        assert mode in ("window", "async"), seen.everything
        assert expect.reached == 1
        body = list(events(seen))[-1]
    else:
        assert seen.status == expect.status, seen.everything
        body = json.loads(seen.body)
    error = body["error"]
    if expect.code in ("not_found", "method_not_allowed"):  # no dialect is known yet
        assert error["code"] == expect.code
        return
    assert body["type"] == "error"
    assert error["details"]["error_code"] == expect.code, body


def _check_client(expect: Expect, seen: Seen) -> None:
    assert seen.header("x-guard-decision-id")
    shown = seen.everything
    if seen.status == 200 and seen.body:  # words may be split over events
        shown += "\n".join("".join(texts) for texts in told(seen).values())
    assert [words for words in expect.client_contains if words not in shown] == [], shown
    assert [words for words in expect.client_lacks if words in shown] == [], shown
    for name, value in expect.client_headers.items():
        assert seen.header(name) == value, name
    for path, value in expect.client.items():
        assert at(json.loads(seen.body), path) == value, path
    if expect.said is not None or expect.finish is not None:
        said, finish = spoken(seen)
        assert expect.said is None or [said] == list(expect.said)
        assert expect.finish is None or [finish] == list(expect.finish)


def _check_coverage(case: Case, seen: Seen, guard: runner.TranscriptGuard) -> None:
    transcripts = guard.transcripts()
    if seen.sent and seen.sent[0][1]:
        (asked,) = [request for request in guard.asked if request.source == "input"]
        value = json.loads(seen.sent[0][1])
        assert list(images(value)) == [blob.data for blob in asked.conversation.blobs()]
        opaque = {name for d in case.config.get("dialects", {}).values() for name in d.get("extra_fields", {})}
        assert unread({name: item for name, item in value.items() if name not in opaque}, transcripts) == []
    if seen.status == 200 and seen.sent and case.expect.outcome == "allowed":
        for value in events(seen):
            assert unread(value, transcripts) == []


def images(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        if value.get("type") == "image":
            yield base64.b64decode(value["source"]["data"], validate=True)
        for item in value.values():
            yield from images(item)
    if isinstance(value, list):
        for item in value:
            yield from images(item)


def events(seen: Seen) -> Iterator[Any]:
    """The bodies of the events, or the one body; every event is named as its body is."""
    if seen.header("content-type") == "application/json":
        yield json.loads(seen.body)
        return
    for event in Decoder().feed(seen.body):
        body = json.loads(event.data)
        assert event.event == body["type"]
        yield body


def told(seen: Seen) -> dict[Any, list[str]]:
    """Everything that the events say, by what says it: text, thoughts, arguments."""
    texts: dict[Any, list[str]] = {}
    for event in events(seen):
        for name, text in event.get("delta", {}).items():
            if name in ("text", "thinking", "partial_json"):
                texts.setdefault((event.get("index"), name), []).append(text)
    return texts


def spoken(seen: Seen) -> tuple[str | None, str | None]:
    """(text, stop_reason), streamed or not."""
    said = finish = ""
    for event in events(seen):
        blocks = event.get("content", [event.get("content_block", {})])
        said += "".join(block.get("text", "") for block in blocks) + event.get("delta", {}).get("text", "")
        finish = event.get("stop_reason") or event.get("delta", {}).get("stop_reason") or finish
    return said or None, finish or None


def test_every_class_that_applies_has_cases_and_not_one_sided() -> None:
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids))
    classes = {case.id.partition("-")[0] for case in CASES}
    assert classes >= {f"A{n}" for n in (1, 2, 3, 6, 7, 8, 9)}
    assert classes >= {f"C{n}" for n in range(1, 16)}
    assert classes >= {f"G{n}" for n in (*range(1, 12), 13, 14)}
    assert sum(case.negative for case in CASES) >= len(CASES) / 5
    for letter in "CG":
        assert {mode for case in CASES if case.id.startswith(letter) for mode in case.runs} >= {
            "whole",
            "hold",
            "window",
        }


@pytest.mark.parametrize("value", [{"a": "how is this"}, "pick a lock"])
def test_unread_prose_is_found(value: Any) -> None:
    assert leaves(value)
    assert unread(value, "something else") != []
