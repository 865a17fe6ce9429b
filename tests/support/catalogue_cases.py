"""Which classes of the bypass catalogue a dialect's cases must hold, and in which ways each must run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from tests.support.cases import Case, Mode

DialectName: TypeAlias = Literal["chat_completions", "completions", "responses", "messages"]

WAYS: frozenset[Mode] = frozenset(("whole", "hold", "window", "async"))
#: the catalogue's classes of routes, requests and answers
CLASSES = (
    *(f"A{number}" for number in range(1, 11)),
    *(f"C{number}" for number in range(1, 16)),
    *(f"G{number}" for number in range(1, 15)),
)
_ONE_TEXT = "a prompt is one text or several, without turns"
#: what no case of a dialect can hold, and why; ``*`` is every dialect
EXCEPTIONS: dict[tuple[DialectName | Literal["*"], str], tuple[frozenset[Mode], str]] = {
    ("*", "A4"): (WAYS - {"whole"}, "a list of models is no stream"),
    ("completions", "A4"): (WAYS, "the list of models is no route of this API: chat_completions has its cases"),
    ("responses", "A4"): (WAYS, "the list of models is no route of this API: chat_completions has its cases"),
    ("messages", "A4"): (WAYS, "the list of models is no route of this API: chat_completions has its cases"),
    ("*", "A6"): (WAYS - {"whole"}, "what was stored is asked for by GET, which holds no wish for a stream"),
    ("completions", "C2"): (WAYS, _ONE_TEXT),
    ("completions", "C6"): (WAYS, _ONE_TEXT),
    ("completions", "C15"): (WAYS, _ONE_TEXT),
    ("responses", "C13"): (WAYS, "a request has one answer"),
    ("*", "G8"): (frozenset(("whole",)), "lines and events are a stream's"),
}


def missing(dialect: DialectName, cases: Sequence[Case]) -> dict[str, set[Mode]]:
    """By class, the ways in which no case of it runs, but for the exceptions."""
    ways: dict[str, set[Mode]] = {name: set() for name in CLASSES}
    for case in cases:
        ways.setdefault(case.id.partition("-")[0], set()).update(case.runs)
    found = {name: set(WAYS - ways[name] - excused(dialect, name)) for name in CLASSES}
    return {name: lacking for name, lacking in found.items() if lacking}


def excused(dialect: DialectName, name: str) -> frozenset[Mode]:
    nothing: tuple[frozenset[Mode], str] = (frozenset(), "")
    return EXCEPTIONS.get((dialect, name), EXCEPTIONS.get(("*", name), nothing))[0]


def check(dialect: DialectName, cases: Sequence[Case]) -> None:
    """Fails unless every class has a case in every way, ids are no one else's, and a fifth of the cases must pass."""
    ids = [case.id for case in cases]
    assert len(ids) == len(set(ids))
    assert missing(dialect, cases) == {}
    assert sum(case.negative for case in cases) >= len(ids) / 5
