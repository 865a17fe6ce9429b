"""Which classes of the bypass catalogue a test tries, told by the test itself: with the test its claim goes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from tests.integrations.litellm.stage import REPOSITORY

_Test = TypeVar("_Test", bound=Callable[..., None])
_MODULES = ("test_bypasses", "test_hooks", "test_matrix", "test_routes")
#: those that a route of LiteLLM could carry, and how many classes each has
COUNTS = {"A": 10, "C": 15, "E": 12, "F": 16, "G": 14}
CLASSES = {f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)}


def tries(*classes: str) -> Callable[[_Test], _Test]:
    """Marks a test; raises ``ValueError`` for what the catalogue does not have."""
    if unknown := set(classes) - CLASSES:
        raise ValueError(f"not in the catalogue: {sorted(unknown)}")

    def mark(test: _Test) -> _Test:
        test.tries = frozenset(classes)  # type: ignore[attr-defined]
        return test

    return mark


def named(cases: Iterable[str]) -> list[str]:
    """The classes that the cases of a table begin with: ``C1 system`` is of C1."""
    return [case.partition(" ")[0] for case in cases]


def tried() -> set[str]:
    """What the tests on the running proxy try."""
    modules = [importlib.import_module(f"tests.integrations.litellm.{name}") for name in _MODULES]
    tests = [test for module in modules for name, test in vars(module).items() if name.startswith("test_")]
    return {name for test in tests for name in getattr(test, "tries", ())}


def excepted() -> set[str]:
    """What docs/litellm.md names as not tried here."""
    docs = (REPOSITORY / "docs" / "litellm.md").read_text("utf-8")
    return set(re.findall(r"^\| ([A-G]\d+)", docs, re.MULTILINE))
