"""docs/chat-completions.md is generated from the dialect's tables; UPDATE_DOCS=1 writes it anew."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from guard_middleware.dialects import chat_fields
from guard_middleware.dialects.fields import Rule, Table

PAGE = Path(__file__).parents[2] / "docs" / "chat-completions.md"
CLASSES = {
    Rule.TEXT: "moderated",
    Rule.JSON: "moderated",
    Rule.NESTED: "by its own table",
    Rule.SCALAR: "constrained",
    Rule.WORD: "constrained",
    Rule.WORDS: "constrained",
    Rule.CHOICE: "moderated",
    Rule.NUMBERS: "constrained",
    Rule.IDENTIFIER: "opaque",
    Rule.SEALED: "opaque",
    Rule.OFF: "refused",
    Rule.REFUSED: "refused",
    Rule.DROPPED: "dropped",
}
INTRO = """# Chat Completions, field by field

Generated from `guard_middleware/dialects/chat_fields.py`; a test compares the tables with the types of the
installed openai SDK, and this page with the tables. A field that stands in no table passes as a number, a boolean
or null, and is refused otherwise, unless `dialects.chat_completions.extra_fields` names it. Inside a request's
tools and messages the guard reads the names and values of such fields, because chat templates may print them.
"""


def tables() -> Iterator[tuple[str, Table]]:
    yield "Request", chat_fields.REQUEST
    for role, table in chat_fields.ROLES.items():
        yield f"Message, role `{role}`", table
    for kind, part in chat_fields.PARTS.items():
        if part is not None:
            yield f"Content part `{kind}`", part
    yield "Image URL", chat_fields.IMAGE_URL
    for kind, table in chat_fields.TOOLS.items():
        yield f"Tool definition `{kind}`", table
    for kind, table in chat_fields.TOOL_CALLS.items():
        yield f"Tool call `{kind}`", table
    yield "Answer", chat_fields.COMPLETION
    yield "Choice", chat_fields.CHOICE
    yield "Answer's message", chat_fields.MESSAGE
    yield "Streamed chunk", chat_fields.CHUNK
    yield "Streamed choice", chat_fields.CHUNK_CHOICE
    yield "Streamed delta", chat_fields.DELTA


def page() -> str:
    refused = sorted(kind for kind, part in chat_fields.PARTS.items() if part is None)
    lines = [INTRO, f"Content parts that are always refused: {', '.join(f'`{kind}`' for kind in refused)}.\n"]
    for title, table in tables():
        lines += [f"## {title}\n", "| field | | what is accepted |", "|---|---|---|"]
        lines += [f"| `{name}` | {CLASSES[rule]} | {rule.value} |" for name, rule in sorted(table.items())]
        lines.append("")
    return "\n".join(lines)


def test_the_page_says_what_the_tables_say() -> None:
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
