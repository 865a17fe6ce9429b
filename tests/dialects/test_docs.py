"""docs/<dialect>.md is generated from the dialect's tables; UPDATE_DOCS=1 writes it anew."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from guard_middleware.dialects import chat_fields, completions_fields, messages_fields, responses_fields
from guard_middleware.dialects.fields import RESIZING, Rule, Table

DOCS = Path(__file__).parents[2] / "docs"
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
HEAD = """# {title}, field by field

Generated from `guard_middleware/dialects/{module}.py`; a test compares the tables with the types of the
installed {sdk} SDK, and this page with the tables. A field that stands in no table passes as a number, a boolean
or null, and is refused otherwise, unless `dialects.{dialect}.extra_fields` names it. Inside a request's
tools and messages the guard reads the names and values of such fields, because chat templates may print them.
An empty string passes wherever a short word or an opaque string does; in a request `type` and `role` say something.
"""


@dataclass(frozen=True)
class Page:
    """One dialect's page. ``notes`` stand before the tables."""

    title: str
    module: str
    sdk: str
    dialect: str
    notes: tuple[str, ...]
    tables: tuple[tuple[str, Table], ...]

    def text(self) -> str:
        head = HEAD.format(title=self.title, module=self.module, sdk=self.sdk, dialect=self.dialect)
        lines = [head, *(f"{note}\n" for note in self.notes)]
        for title, table in self.tables:
            lines += [f"## {title}\n", "| field | | what is accepted |", "|---|---|---|"]
            lines += [f"| `{name}` | {CLASSES[rule]} | {rule.value} |" for name, rule in sorted(table.items())]
            lines.append("")
        return "\n".join(lines)


def refused(what: str, tables: Mapping[str, Table | None]) -> str:
    return f"{what} that are always refused: {listed(kind for kind, table in tables.items() if table is None)}."


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def each(title: str, tables: Mapping[str, Table | None]) -> Iterator[tuple[str, Table]]:
    return ((f"{title} `{kind}`", table) for kind, table in tables.items() if table is not None)


def alike(title: str, tables: Mapping[str, Table | None]) -> Iterator[tuple[str, Table]]:
    """The tables with one title for all types that share one."""
    seen: list[Table] = []
    for table in tables.values():
        if table is not None and table not in seen:
            seen.append(table)
            yield f"{title} {listed(kind for kind, other in tables.items() if other == table)}", table


PAGES = {
    "chat-completions": Page(
        title="Chat Completions",
        module="chat_fields",
        sdk="openai",
        dialect="chat_completions",
        notes=(refused("Content parts", chat_fields.PARTS),),
        tables=(
            ("Request", chat_fields.REQUEST),
            *((f"Message, role `{role}`", table) for role, table in chat_fields.ROLES.items()),
            *each("Content part", chat_fields.PARTS),
            ("Image URL", chat_fields.IMAGE_URL),
            *each("Tool definition", chat_fields.TOOLS),
            *each("Tool call", chat_fields.TOOL_CALLS),
            *each("What is called, type", chat_fields.CALL),
            ("Annotation", chat_fields.ANNOTATION),
            ("URL citation", chat_fields.URL_CITATION),
            ("Answer", chat_fields.COMPLETION),
            ("Choice", chat_fields.CHOICE),
            ("Answer's message", chat_fields.MESSAGE),
            ("Streamed chunk", chat_fields.CHUNK),
            ("Streamed choice", chat_fields.CHUNK_CHOICE),
            ("Streamed delta", chat_fields.DELTA),
        ),
    ),
    "completions": Page(
        title="Completions",
        module="completions_fields",
        sdk="openai",
        dialect="completions",
        notes=(
            "The legacy text API. Prompts are text: token ids are refused, for no guard reads them.",
            "A blocked answer is an empty text with `finish_reason: content_filter`; `x_guard` has its decision.",
        ),
        tables=(
            ("Request", completions_fields.REQUEST),
            ("Answer, and streamed chunk", completions_fields.COMPLETION),
            ("Choice", completions_fields.CHOICE),
        ),
    ),
    "responses": Page(
        title="Responses",
        module="responses_fields",
        sdk="openai",
        dialect="responses",
        notes=(
            "A request may continue an earlier answer by `previous_response_id` where that answer went through this "
            "gateway. Stored answers cannot be read, listed, cancelled or deleted through it.",
            "Where a request continues an answer, ids of calls stay what they were and the guard reads "
            "them; in all others they are renamed.",
            refused("Items of requests", responses_fields.INPUT_ITEMS),
            refused("Items of answers", responses_fields.OUTPUT_ITEMS),
            refused("Content parts", responses_fields.PARTS),
            refused("Tools", responses_fields.TOOLS),
            f"`include` may ask for: {listed(responses_fields.INCLUDE)}.",
            *(f"Parts of a message, role `{r}`: {listed(k)}." for r, k in responses_fields.ROLE_PARTS.items()),
            refused("Events", responses_fields.EVENTS),
        ),
        tables=(
            ("Request", responses_fields.REQUEST),
            ("`reasoning`", responses_fields.REASONING),
            ("`text`", responses_fields.TEXT),
            *each("Output format", responses_fields.FORMATS),
            *each("Tool definition", responses_fields.TOOLS),
            *each("Item of a request", responses_fields.INPUT_ITEMS),
            *each("Content part", responses_fields.PARTS),
            *each("Annotation", responses_fields.ANNOTATIONS),
            ("Answer", responses_fields.RESPONSE),
            *each("Item of an answer", responses_fields.OUTPUT_ITEMS),
            *alike("Event", responses_fields.EVENTS),
        ),
    ),
    "messages": Page(
        title="Messages",
        module="messages_fields",
        sdk="anthropic",
        dialect="messages",
        notes=(
            "`POST /v1/messages/count_tokens` takes the same request, which is read and judged alike.",
            refused("Content blocks", messages_fields.BLOCKS),
            refused("Tools", messages_fields.TOOLS),
            refused("Results of server-run tools", messages_fields.RESULTS),
            refused("Image sources", messages_fields.IMAGE_SOURCES),
            refused("Document sources", messages_fields.DOCUMENT_SOURCES),
            f"Tools that the model service runs by itself: {listed(messages_fields.SERVER_TOOLS)}.",
            *(
                f"{where}: {listed(kinds)}."
                for where, kinds in (
                    ("Blocks of a user's message", messages_fields.PLACES["user"]),
                    ("Blocks of an assistant's message and of an answer", messages_fields.PLACES["assistant"]),
                    ("Blocks of a tool's result", messages_fields.PLACES["tool_result"]),
                    ("Blocks of a document", messages_fields.PLACES["document"]),
                    ("Blocks of the system prompt and of a search result", messages_fields.PLACES["system"]),
                )
            ),
        ),
        tables=(
            ("Request", messages_fields.REQUEST),
            ("`thread`", messages_fields.THREAD),
            ("`metadata`", messages_fields.METADATA),
            ("`output_config`", messages_fields.OUTPUT_CONFIG),
            ("`tool_choice`", messages_fields.TOOL_CHOICE),
            *((f"Message, role `{role}`", table) for role, table in messages_fields.ROLES.items()),
            *each("Content block", messages_fields.BLOCKS),
            *alike("Result of a server-run tool", messages_fields.RESULTS),
            ("`caller` of a call", messages_fields.CALLER),
            *each("Image source", messages_fields.IMAGE_SOURCES),
            *each("Document source", messages_fields.DOCUMENT_SOURCES),
            *each("Citation", messages_fields.CITATIONS),
            *alike("Tool definition", messages_fields.TOOLS),
            ("Answer", messages_fields.MESSAGE),
            ("`stop_details`", messages_fields.STOP_DETAILS),
            ("Count of tokens", messages_fields.COUNT),
            *each("Event", messages_fields.EVENTS),
            *each("Delta", messages_fields.DELTAS),
            ("Delta of `message_delta`", messages_fields.ENDING),
        ),
    ),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_says_what_the_tables_say(name: str) -> None:
    path = DOCS / f"{name}.md"
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(PAGES[name].text())
    assert path.read_text() == PAGES[name].text()


@pytest.mark.parametrize(
    "module",
    [chat_fields, completions_fields, messages_fields, responses_fields],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_no_table_of_a_module_is_left_out(module: object) -> None:
    """Every rule that a public table of the module gives a field stands on its page."""
    (page,) = (page for page in PAGES.values() if module.__name__.endswith(page.module))  # type: ignore[attr-defined]
    shown = [table for _, table in page.tables]
    for name, value in vars(module).items():
        if not name.isupper() or not isinstance(value, dict) or name.startswith("_") or value is RESIZING:
            continue
        tables = [value] if all(isinstance(rule, Rule) for rule in value.values()) else value.values()
        assert [table for table in tables if isinstance(table, dict) and table not in shown] == [], name
