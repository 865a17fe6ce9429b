"""Every case of the Responses and the Completions API, whole and in each mode of streams, run as ``test_cases`` runs.

As there, everything that reached the upstream or the client stands in a transcript that the guard was asked about.
"""

from __future__ import annotations

import asyncio
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
from tests.support import openai_cases
from tests.support.cases import Expect
from tests.support.messages_cases import Case, Mode

HERE = Path(__file__).parent
CASES = {
    dialect: [case for path in sorted((HERE / dialect).glob("*.yaml")) for case in openai_cases.load(path)]
    for dialect in openai_cases.KINDS
}
RUNS = [
    pytest.param(case, mode, id=f"{dialect}-{case.id}-{mode}")
    for dialect, cases in CASES.items()
    for case in cases
    for mode in case.runs
]


@pytest.fixture(autouse=True, scope="module")
def one_trust_store() -> Iterator[None]:
    """Reading the system's certificates takes longer than a case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


class Unhurried(runner.Application):
    """Lets the guard work between two pieces of the answer, as a network does."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            await send(message)
            await asyncio.sleep(0)

        await super().__call__(scope, receive, sent)


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_case(case: Case, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Application", Unhurried)
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
    assert body["error"]["code"] == expect.code, body


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
        assert expect.said is None or said == list(expect.said)
        assert expect.finish is None or finish == list(expect.finish)


def _check_coverage(case: Case, seen: Seen, guard: runner.TranscriptGuard) -> None:
    transcripts = guard.transcripts()
    if seen.sent and seen.sent[0][1]:
        (asked,) = [request for request in guard.asked if request.source == "input"]
        value = json.loads(seen.sent[0][1])
        urls = [leaf for leaf in leaves(value) if leaf.startswith("data:")]
        assert [base64.b64decode(url.partition(",")[2]) for url in urls] == [b.data for b in asked.conversation.blobs()]
        opaque = {name for d in case.config.get("dialects", {}).values() for name in d.get("extra_fields", {})}
        assert unread({name: item for name, item in value.items() if name not in opaque}, transcripts) == []
    if seen.status == 200 and seen.sent and case.expect.outcome == "allowed":
        for value in events(seen):
            assert unread(value, transcripts) == []


def events(seen: Seen) -> Iterator[Any]:
    """The bodies of the events, or the one body; a Responses event is named as its body is."""
    if seen.header("content-type") == "application/json":
        yield json.loads(seen.body)
        return
    for event in Decoder().feed(seen.body):
        if event.data == "[DONE]":
            assert not event.event
            continue
        body = json.loads(event.data)
        assert event.event == body.get("type", "")
        yield body


def told(seen: Seen) -> dict[Any, list[str]]:
    """Everything that is said in pieces, by what says it."""
    texts: dict[Any, list[str]] = {}
    for event in events(seen):
        if "delta" in event:
            place = (event["type"], event["output_index"], event.get("content_index", event.get("summary_index")))
            texts.setdefault(place, []).append(event["delta"])
        for choice in event.get("choices", ()):
            texts.setdefault(choice["index"], []).append(choice["text"])
    return texts


def spoken(seen: Seen) -> tuple[list[str | None], list[str | None]]:
    """(text, why it ended) of each choice; a Responses answer is one."""
    last = list(events(seen))[-1]
    response = last.get("response", last)
    if "output" in response:
        parts = [part for item in response["output"] for part in item.get("content") or ()]
        said = "".join(part["text"] for part in parts if part["type"] == "output_text")
        return [said or None], [(response.get("incomplete_details") or {}).get("reason") or response["status"]]
    texts: dict[int, str] = {}
    finish: dict[int, str | None] = {}
    for event in events(seen):
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            finish[choice["index"]] = choice["finish_reason"] or finish.get(choice["index"])
    return [texts[index] or None for index in sorted(texts)], [finish[index] for index in sorted(finish)]


@pytest.mark.parametrize(
    ("dialect", "applies"),
    [
        ("responses", {*(f"C{n}" for n in (*range(1, 13), 14, 15)), *(f"G{n}" for n in (*range(1, 12), 13, 14))}),
        ("completions", {*(f"C{n}" for n in (3, 5, 7, 8, 9, 10, 12, 13, 14)), *(f"G{n}" for n in range(1, 12))}),
    ],
)
def test_every_class_that_applies_has_cases_and_not_one_sided(dialect: str, applies: set[str]) -> None:
    ids = [case.id for case in CASES[dialect]]
    assert len(ids) == len(set(ids))
    assert {id.partition("-")[0] for id in ids} >= {*applies, *(f"A{n}" for n in (1, 2, 3, 6, 8, 9))}
    assert sum(case.negative for case in CASES[dialect]) >= len(ids) / 5
    for letter in "CG":
        modes = {mode for case in CASES[dialect] if case.id.startswith(letter) for mode in case.runs}
        assert modes >= {"whole", "hold", "window"}
