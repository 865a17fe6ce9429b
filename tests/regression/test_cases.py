"""Every case of the Chat Completions API (``tests/regression/*.yaml``), whole and in each mode of streams."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import cases, catalogue_cases
from tests.support.cases import Case, Mode
from tests.support.leaves import leaves
from tests.support.replayed_cases import Seen
from tests.support.running_cases import Dialect, check, runs

FILES = sorted(Path(__file__).parent.glob("*.yaml"))
CASES = [case for path in FILES for case in cases.load(path)]


def events(seen: Seen) -> Iterator[Any]:
    if seen.header("content-type") == "application/json":
        yield json.loads(seen.body)
        return
    lines = seen.body.decode().split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert len(data) == len([line for line in lines if line])
    yield from map(json.loads, data[:-1])


def pieces(event: Any) -> Iterator[tuple[Any, str]]:
    for choice in event.get("choices", ()):
        for name, text in choice.get("delta", {}).items():
            if isinstance(text, str) and name != "role":
                yield (choice["index"], name), text


def spoken(seen: Seen) -> tuple[list[str | None], list[str | None]]:
    """(content, finish_reason) of each choice, streamed or not."""
    said: dict[int, list[str]] = {}
    finish: dict[int, str | None] = {}
    for event in events(seen):
        for choice in event["choices"]:
            text = choice.get("message", choice.get("delta")).get("content")
            said.setdefault(choice["index"], []).extend([] if text is None else [text])
            finish[choice["index"]] = choice["finish_reason"] or finish.get(choice["index"])
    return [("".join(said[i]) or None) for i in sorted(said)], [finish[i] for i in sorted(finish)]


def code(body: Any) -> str:
    return str(body["error"]["code"])


def images(value: Any) -> list[bytes]:
    urls = [leaf for leaf in leaves(value) if leaf.startswith("data:")]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


CHAT = Dialect(events, pieces, spoken, code, images)


@pytest.mark.parametrize(("case", "mode", "through"), runs(CASES))
def test_case(case: Case, mode: Mode, through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, mode, through, CHAT, tmp_path, monkeypatch)


def test_every_class_has_cases_in_every_way_and_not_one_sided() -> None:
    catalogue_cases.check("chat_completions", CASES)
    assert {path.stem for path in FILES} == set("ABCDEFGH")


@pytest.mark.parametrize("name", ["A1", "A5", "C4", "G2", "G8", "G14"])
def test_a_class_that_is_not_run_in_some_way_is_found(name: str) -> None:
    def without(case: Case) -> Case:
        return case.model_copy(update={"modes": ("hold", "async")}) if case.id.startswith(f"{name}-") else case

    assert catalogue_cases.missing("chat_completions", [without(case) for case in CASES]) == {name: {"window"}}


@pytest.mark.parametrize("path", ["request.bodyy", "expect.statu", "upstream.sayy", "titel"])
def test_an_unknown_key_in_a_case_is_an_error(path: str) -> None:
    value: dict[str, Any] = {
        "id": "A1-x",
        "title": "a title",
        "request": {},
        "upstream": {},
        "expect": {"is": "passes"},
    }
    cases.Case.model_validate(value)
    outer, _, inner = path.rpartition(".")
    (value[outer] if outer else value)[inner] = 1
    with pytest.raises(ValueError, match=inner):
        cases.Case.model_validate(value)
