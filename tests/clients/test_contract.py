"""The rules of the contract see what they are for: each of these is a client that was failed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.contract import BAD, CALLS, CASES, GOOD, MESSAGES, SAFE, Call, wrong

STREAM = Call("stream", MESSAGES, streams=True, tools=True)
OF = {case.name: case for case in CASES}


def saw(text: str = "", finish: str | None = None, error: Any = None, *marks: str) -> dict[str, Any]:
    return {"text": text, "finish": finish, "error": error, "marks": list(marks)}


def raised(kind: str, status: int | None, code: str | None, message: str = "no") -> dict[str, Any]:
    return {"type": kind, "status": status, "code": code, "message": message}


BLOCKED, DOWN = raised("E", 400, "content_filter"), raised("E", 503, "guard_unavailable")


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        ("allowed", saw(GOOD, "stop")),
        ("input", saw(error=BLOCKED)),
        ("output", saw(finish="refusal")),
        ("midstream", saw(SAFE[:90], "content_filter")),
        ("down", saw(error=DOWN)),
        ("annotate", saw(BAD, "end_turn")),
        ("tool", saw(GOOD, "end_turn", None, "the tool ran")),
    ],
)
def test_what_a_client_should_show(case: str, seen: dict[str, Any]) -> None:
    assert wrong(STREAM, OF[case], seen) is None


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        ("allowed", saw(GOOD, None)),
        ("allowed", saw(GOOD[:20], "stop")),
        ("allowed", saw(error=BLOCKED)),
        ("input", saw("", "stop")),
        ("input", saw("", "content_filter")),
        ("input", saw(error=DOWN)),
        ("input", saw(error=raised("E", 400, None))),
        ("output", saw("", "stop")),
        ("output", saw("", None)),
        ("output", saw(BAD, "refusal")),
        ("output", saw("some words", "refusal")),
        ("output", saw(error=raised("ValueError", None, None))),
        ("midstream", saw(SAFE, None)),
        ("midstream", saw(SAFE, "stop")),
        ("midstream", saw("", "refusal")),
        ("midstream", saw(SAFE + "Then", "refusal")),
        ("down", saw(GOOD, "stop")),
        ("down", saw(error=BLOCKED)),
        ("annotate", saw("", "refusal")),
        ("annotate", saw(BAD, "content_filter")),
        ("tool", saw(GOOD, "end_turn")),
        ("bad_tool", saw("", "refusal", None, "the tool ran")),
    ],
)
def test_what_no_client_may_show(case: str, seen: dict[str, Any]) -> None:
    assert wrong(STREAM, OF[case], seen) is not None


def test_every_client_is_asked_in_every_case_that_it_can_meet() -> None:
    for client, calls in CALLS.items():
        asked = {(call.dialect, case.name) for call in calls for case in call.cases}
        for dialect in {call.dialect for call in calls}:
            names = {"allowed", "input", "output", "midstream", "down", "gone", "annotate"}
            assert names <= {name for spoken, name in asked if spoken == dialect}, (client, dialect)
