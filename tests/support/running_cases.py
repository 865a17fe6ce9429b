"""Runs one regression case in process, and checks what holds for every case of every dialect.

Beside what a case expects: exactly one record is written, without content; every image that reached the upstream is,
byte for byte and in order, one that the guard was shown; every piece of prose that reached the upstream or the client
stands in a transcript that the guard was asked about; in ``hold`` and ``window`` it stood in one that the guard had
judged when it left; and in ``async`` at most the declared bound follows the harmful words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.sse import Decoder
from tests.support import cases
from tests.support.cases import LEAK_BOUND, Case, Expect, Mode
from tests.support.leaves import leaves
from tests.support.replayed_cases import Seen, TranscriptGuard, replay, texts

#: what makes a text harmful, and what our own words about a block hold
HARM, OURS = "pick a lock", "by the content policy of this service"


@dataclass(frozen=True)
class Dialect:
    """How a client of one API reads what it gets."""

    #: the bodies of the events, or the one body
    events: Callable[[Seen], Iterator[Any]]
    #: (what says it, text) for all that an event says in pieces
    pieces: Callable[[Any], Iterator[tuple[Any, str]]]
    #: (text, why it ended) of each choice
    spoken: Callable[[Seen], tuple[list[str | None], list[str | None]]]
    #: the code of an error's body; fails where the body has not the API's form
    code: Callable[[Any], str]
    #: the images in a request
    images: Callable[[Any], list[bytes]]


def runs(told: Iterable[Case], prefix: str = "") -> list[Any]:
    """Every case in every mode and way that it is told for, as parameters of a test."""
    return [
        pytest.param(case, mode, through, id=f"{prefix}{case.id}-{mode}{'-proxy' if through == 'proxy' else ''}")
        for case in told
        for mode in case.runs
        for through in case.ways
    ]


def check(case: Case, mode: Mode, through: str, dialect: Dialect, folder: Path, patch: pytest.MonkeyPatch) -> None:
    seen, guard = replay(case, mode, through, folder, patch)
    expect = case.expect
    (record,) = seen.records
    _check_status(expect, mode, dialect, seen)
    assert record["status"] == seen.status
    assert expect.outcome is None or record["outcome"] == expect.outcome
    assert expect.reached is None or len(seen.sent) == expect.reached
    assert record["upstream_called"] == bool(seen.sent)
    # windows are questions too
    assert expect.calls is None or len(guard.asked) == expect.calls or (mode in ("window", "async") and seen.sent)
    for path, value in expect.record.items():
        assert at(record, path) == value, path
    assert HARM not in json.dumps(record)  # content is kept only where the operator says so
    _check_client(expect, mode, dialect, seen)
    _check_upstream(expect, seen)
    transcripts = guard.transcripts()
    assert [words for words in expect.judged_contains if words not in transcripts] == [], transcripts
    assert [words for words in expect.judged_lacks if words in transcripts] == [], transcripts
    _check_coverage(case, dialect, seen, guard)
    _check_released(case, mode, dialect, seen, guard)


def _check_status(expect: Expect, mode: Mode, dialect: Dialect, seen: Seen) -> None:
    if expect.status == 200:
        assert seen.status == 200, seen.everything
        return
    if seen.status == 200:  # the head of the stream was out: the error is its last event
        assert mode in ("window", "async"), seen.everything
        assert expect.reached == 1
        body = list(dialect.events(seen))[-1]
    else:
        assert seen.status == expect.status, seen.everything
        body = json.loads(seen.body)
    assert dialect.code(body) == expect.code, body


def _check_client(expect: Expect, mode: Mode, dialect: Dialect, seen: Seen) -> None:
    assert seen.header("x-guard-decision-id")
    shown, said = seen.everything, ""
    if seen.status == 200 and seen.body:  # words may be split over events
        said = "\n".join(told(dialect, seen).values())
    assert [words for words in expect.client_contains if words not in shown + said] == [], shown
    # what ``async`` shows before its verdict is held to its bound instead
    early = said if mode == "async" else ""
    assert [words for words in expect.client_lacks if words in shown + said and words not in early] == [], shown
    for name, value in expect.client_headers.items():
        told_early = seen.header(name) == "pending" and mode in ("window", "async")
        assert seen.header(name) == value or told_early, name
    for path, value in expect.client.items():
        assert at(json.loads(seen.body), path) == value, path
    if expect.said is not None or expect.finish is not None:
        words, finish = dialect.spoken(seen)
        assert expect.said is None or words == list(expect.said) or (mode == "async" and expect.outcome == "blocked")
        assert expect.finish is None or finish == list(expect.finish)


def _check_upstream(expect: cases.Expect, seen: Seen) -> None:
    if not seen.sent:
        return
    ((scope, raw),) = seen.sent
    text = raw.decode()
    for path, value in expect.sent.items():
        assert at(json.loads(raw), path) == cases.build(value), path
    assert [path for path in expect.absent if at(json.loads(raw), path) is not None] == []
    assert [words for words in expect.sent_contains if words not in text] == [], text
    assert [words for words in expect.sent_lacks if words in text] == [], text
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    for name, value in expect.sent_headers.items():
        assert headers.get(name) == value, name
    assert expect.sent_query is None or scope["query_string"].decode() == expect.sent_query


def _check_coverage(case: Case, dialect: Dialect, seen: Seen, guard: TranscriptGuard) -> None:
    """What reached the upstream or the client stands in what the guard was asked about."""
    transcripts = guard.transcripts()
    if seen.sent and seen.sent[0][1] and _moderates(case, "input"):
        heard = [request for request in guard.asked if request.source == "input"]
        assert len(heard) == 1 or case.earlier
        value = json.loads(seen.sent[0][1])
        assert dialect.images(value) == [blob.data for blob in heard[-1].conversation.blobs()]
        opaque = {name for d in case.config.get("dialects", {}).values() for name in d.get("extra_fields", {})}
        assert unread({name: item for name, item in value.items() if name not in opaque}, transcripts) == []
    if seen.status == 200 and seen.sent and _moderates(case, "output") and case.expect.outcome == "allowed":
        for value in dialect.events(seen) if seen.sent[0][1] else ():
            assert unread(value, transcripts) == []


def _check_released(case: Case, mode: Mode, dialect: Dialect, seen: Seen, guard: TranscriptGuard) -> None:
    """A stream shows what was judged, or what its bound allows."""
    if mode == "whole" or seen.status != 200 or not seen.sent or not _moderates(case, "output"):
        return
    if mode == "async":
        assert seen.records[0]["leaked_characters"] <= LEAK_BOUND
        if case.expect.outcome == "blocked":
            for text in told(dialect, seen).values():
                assert len(text.partition(HARM)[2]) <= LEAK_BOUND, text
        return
    assert seen.records[0]["leaked_characters"] == 0
    if case.expect.outcome not in ("allowed", "blocked") or seen.records[0]["bypassed"]:
        return
    decoder, judged = Decoder(), functools.cache(lambda verdicts: texts(guard.judged[:verdicts]))
    for data, verdicts in seen.left:
        for event in decoder.feed(data):
            if event.data != "[DONE]":
                for _, text in dialect.pieces(json.loads(event.data)):
                    assert unread(text, judged(verdicts)) == [] or OURS in text


def _moderates(case: Case, source: str) -> bool:
    return all(policy.get(source, {}).get("moderate", True) for policy in case.config.get("policies", {}).values())


def told(dialect: Dialect, seen: Seen) -> dict[Any, str]:
    """What the answer of the upstream says to the client in pieces, by what says it; not our own words."""
    said: dict[Any, str] = {}
    for event in dialect.events(seen):
        for place, text in dialect.pieces(event):
            said[place] = said.get(place, "") + ("" if OURS in text else text)
    return said


def unread(value: Any, transcripts: str) -> list[str]:
    """Lines of prose in ``value`` that stand in no transcript: as they are, or as JSON writes or reads them."""
    lines = [line.strip() for leaf in leaves(value) if not leaf.startswith("data:") for line in leaf.splitlines()]
    prose = [line for line in lines if any(c.isspace() or ord(c) > 126 for c in line)]
    missing = []
    for line in prose:
        if line in transcripts or json.dumps(line, ensure_ascii=False)[1:-1] in transcripts:
            continue
        inner = json.loads(line) if line.startswith("{") and "\\u" in line else None
        missing += [line] if inner is None else unread(inner, transcripts)
    return missing


def at(value: Any, path: str) -> Any:
    """The value at a dotted path, or None."""
    for key in path.split("."):
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        elif isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value
