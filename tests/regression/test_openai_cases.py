"""Every case of the Responses and the Completions API, whole and in each mode of streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.sse import Decoder
from tests.regression.test_cases import code, images
from tests.support import cases, catalogue_cases, openai_cases
from tests.support.cases import Case, Mode
from tests.support.replayed_cases import Seen
from tests.support.running_cases import Dialect, check, runs

HERE = Path(__file__).parent
CASES = {
    dialect: [case for path in sorted((HERE / dialect).glob("*.yaml")) for case in cases.load(path, kind)]
    for dialect, kind in openai_cases.KINDS.items()
}
RUNS = [run for dialect, told in CASES.items() for run in runs(told, f"{dialect}-")]


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


def pieces(event: Any) -> Iterator[tuple[Any, str]]:
    if "delta" in event:
        yield (
            (event["type"], event["output_index"], event.get("content_index", event.get("summary_index"))),
            event["delta"],
        )
    for choice in event.get("choices", ()):
        yield choice["index"], choice["text"]


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


OPENAI = Dialect(events, pieces, spoken, code, images)


@pytest.mark.parametrize(("case", "mode", "through"), RUNS)
def test_case(case: Case, mode: Mode, through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, mode, through, OPENAI, tmp_path, monkeypatch)


@pytest.mark.parametrize("dialect", openai_cases.KINDS)
def test_every_class_has_cases_in_every_way_and_not_one_sided(dialect: Any) -> None:
    catalogue_cases.check(dialect, CASES[dialect])
