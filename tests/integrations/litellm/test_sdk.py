"""LiteLLM's SDK with the guard: what of each call is judged, by LiteLLM's callbacks alone and by ``install()``."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest

from tests.integrations.litellm import stage
from tests.integrations.litellm.sdk_stage import Application, application
from tests.integrations.litellm.sdk_table import CALLS

__all__ = ["application"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DOCS = stage.REPOSITORY / "docs" / "litellm-sdk.md"
#: case -> the model that answers, and what it is asked
CASES: Mapping[str, tuple[str, str]] = {
    "allowed": ("good", "How long does bread take?"),
    "prompt": ("good", stage.HARM),
    "answer": ("bad", "How long does bread take?"),
}
#: how the guard gets in
MODES = ("callbacks", "install")
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Saw:
    """What one call showed its caller, and what of it reached the upstream."""

    shown: list[str]
    error: dict[str, Any] | None
    upstream: list[dict[str, Any]]

    @property
    def text(self) -> str:
        return json.dumps([self.shown, self.error])


def table(application: Application, mode: str) -> dict[tuple[str, str], Saw]:
    """Every call in every case."""
    jobs = [
        {"call": call, "case": case, "model": f"{answer}.{next(_NUMBERS)}", "prompt": prompt}
        for call in CALLS
        for case, (answer, prompt) in CASES.items()
    ]
    given = {"mode": mode, "config": application.config(), "url": application.upstream.url, "jobs": jobs}
    results = application.run("sdk_driver.py", given)
    assert len(results) == len(jobs)
    return {(r["call"], r["case"]): Saw(r["shown"], r["error"], application.upstream.of(r["model"])) for r in results}


@pytest.fixture(scope="session")
def played(application: Application) -> Callable[[str], dict[tuple[str, str], Saw]]:
    return cache(partial(table, application))


@pytest.mark.parametrize("call", CALLS)
def test_install_guards_a_call_on_both_sides(played: Callable[[str], dict[tuple[str, str], Saw]], call: str) -> None:
    saw = played("install")
    allowed, prompt, answer = (saw[call, case] for case in CASES)
    assert allowed.error is None
    assert "oven" in "".join(said(allowed))
    assert len(allowed.upstream) == 1
    assert prompt.upstream == []
    assert prompt.error is not None
    assert "ContentPolicyViolationError" in prompt.error["classes"]
    assert (prompt.error["status"], prompt.error["decision"][:3]) == (400, "gd_")
    assert answer.error is None
    assert len(answer.upstream) == 1
    assert stage.LEAK not in answer.text
    assert "refusal" in answer.text or "content_filter" in answer.text


def said(saw: Saw) -> list[str]:
    """The texts of an answer, in whatever shape."""
    return re.findall(r'"(?:content|text|delta)": ?"([^"]*)"', " ".join(saw.shown))


def covered(saw: Mapping[tuple[str, str], Saw], call: str) -> Sequence[str]:
    """Two cells: what becomes of a harmful prompt, and of a harmful answer."""
    if (allowed := saw[call, "allowed"]).error is not None or "oven" not in "".join(said(allowed)):
        return ("refused", "refused")
    prompt, answer = saw[call, "prompt"], saw[call, "answer"]
    return (
        "**passes**" if prompt.upstream else "blocked",
        "**passes**" if stage.LEAK in answer.text else "blocked",
    )


def test_the_documentation_says_what_was_measured(
    played: Callable[[str], dict[tuple[str, str], Saw]],
) -> None:
    lines = [
        "| call | API | prompt: callbacks | prompt: `install()` | answer: callbacks | answer: `install()` |",
        "|---|---|---|---|---|---|",
    ]
    for call, api in CALLS.items():
        by = {mode: covered(played(mode), call) for mode in MODES}
        cells = [by[mode][side] for side in (0, 1) for mode in MODES]
        lines.append(f"| `{call}` | `{api}` | " + " | ".join(cells) + " |")
    text = DOCS.read_text("utf-8")
    begin, end = "<!-- measured -->", "<!-- end -->"
    told = re.sub(f"{begin}.*?{end}", lambda _: "\n".join([begin, *lines, end]), text, flags=re.DOTALL)
    if "UPDATE_DOCS" in os.environ:
        DOCS.write_text(told, "utf-8")
    assert told == text or "UPDATE_DOCS" in os.environ, "run this test with UPDATE_DOCS=1"
