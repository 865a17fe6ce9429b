"""docs/clients.md: one table per client, written from what was measured and compared with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.clients.contract import CASES, Call

DOCS = Path(__file__).parents[2] / "docs" / "clients.md"
_LATER = "async "


def table(calls: Sequence[Call], measured: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown: a row per call, a column per case; an asynchronous call that shows the same has no row of its own."""
    cases = [case for case in CASES if case.name != "allowed" and any(case in call.cases for call in calls)]
    lines = [
        "| call | API | " + " | ".join(case.title for case in cases) + " |",
        "|---|---|" + "---|" * len(cases),
    ]
    for call in calls:
        row = measured[call.name]
        if call.name.startswith(_LATER) and _same(row, measured.get(call.name.removeprefix(_LATER))):
            continue
        later = measured.get(f"{_LATER}{call.name}")
        name = f"`{call.name}`" + (" and async" if later and _same(later, row) else "")
        cells = [row.get(case.name, "") for case in cases]
        lines.append(f"| {name} | `{call.dialect}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _same(one: Mapping[str, str], other: Mapping[str, str] | None) -> bool:
    """Whether two rows agree wherever both were asked."""
    return other is not None and all(other.get(name, seen) == seen for name, seen in one.items())


def with_section(text: str, client: str, content: str) -> str:
    """The page with the client's table as it was measured."""
    begin, end = f"<!-- measured: {client} -->", "<!-- end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"docs/clients.md has no place for {client}"
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)
