"""Which classes of the bypass catalogue a dialect's cases must hold, and in which ways each must run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from tests.support.cases import Case, Mode

DialectName: TypeAlias = Literal["chat_completions", "completions", "responses", "messages"]

WAYS: frozenset[Mode] = frozenset(("whole", "hold", "window", "async"))
#: the catalogue's classes of routes, requests and answers
CLASSES = (
    *(f"A{number}" for number in range(1, 11)),
    *(f"C{number}" for number in range(1, 16)),
    *(f"G{number}" for number in range(1, 15)),
)
_ALL = frozenset(get_args(DialectName))
#: class, dialects, the ways in which no case of it can run there, and why
EXCEPTIONS: tuple[tuple[str, frozenset[DialectName], frozenset[Mode], str], ...] = (
    ("A4", frozenset(("chat_completions",)), WAYS - {"whole"}, "a list of models is no stream"),
    ("A4", _ALL - {"chat_completions"}, WAYS, "the list of models is no dialect's: its cases stand beside chat's"),
    (
        "A6",
        _ALL - {"responses"},
        WAYS - {"whole"},
        "what was stored is asked for by GET, which cannot ask for a stream",
    ),
    ("C2", frozenset(("completions",)), WAYS, "a prompt has no turns"),
    ("C6", frozenset(("completions",)), WAYS, "a prompt has no turns, so that all of it is one input"),
    ("C13", frozenset(("responses",)), WAYS, "a request has one answer"),
    ("C15", frozenset(("completions",)), WAYS, "a prompt has no turns"),
    ("G8", _ALL - {"chat_completions"}, frozenset(("whole",)), "lines and events are a stream's"),
)


def missing(dialect: DialectName, cases: Sequence[Case]) -> dict[str, set[Mode]]:
    """By class, the ways in which no case of it runs though one could, and those in which one runs though none can."""
    ways: dict[str, set[Mode]] = {name: set() for name in CLASSES}
    for case in cases:
        ways.setdefault(case.id.partition("-")[0], set()).update(case.runs)
    excused = {name: lacking for name, dialects, lacking, _ in EXCEPTIONS if dialect in dialects}
    found = {name: (WAYS - excused.get(name, frozenset())) ^ ways[name] for name in CLASSES}
    return {name: set(wrong) for name, wrong in found.items() if wrong}


def check(dialect: DialectName, cases: Sequence[Case]) -> None:
    """Fails unless each class has a case in every way but the exceptions, ids differ, and a fifth must pass."""
    ids = [case.id for case in cases]
    assert len(ids) == len(set(ids))
    assert missing(dialect, cases) == {}
    assert sum(case.negative for case in cases) >= len(ids) / 5
