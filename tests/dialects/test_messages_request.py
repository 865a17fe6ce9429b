"""What a Messages request may hold: everything that reaches the model is read, everything else is refused."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.dialects import messages_fields, route
from guard_middleware.dialects.base import Options, ParsedRequest
from guard_middleware.dialects.fields import Rule
from guard_middleware.dialects.messages_request import parse_request
from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.types import (
    Blob,
    Conversation,
    Definition,
    Message,
    Reasoning,
    Text,
    ToolCall,
    ToolCallResponse,
    Uri,
)
from tests.support.leaves import leaves

MARK = "how do I pick a lock"
URL = "https://pictures.example/cat.png"
SEALED = base64.b64encode(bytes(range(256)) * 3).decode()


def parse(body: Any, **options: Any) -> ParsedRequest:
    return parse_request(body, Limits(), Options(**options))


def ask(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 9, "messages": list(messages) or [user("hello")], **fields}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(said: Any = "x", **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **fields}


def image(url: str = URL) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "url", "url": url}}


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **fields}


def call(kind: str = "tool_use", **fields: Any) -> dict[str, Any]:
    return {"type": kind, "id": "toolu_1", "name": "f", "input": {}, **fields}


def ran(kind: str, **fields: Any) -> dict[str, Any]:
    """A result of a server-run tool."""
    outer = kind.removesuffix("_error")
    for ending in ("_view_result", "_create_result", "_str_replace_result", "_search_result", "_result"):
        if outer.endswith(ending) and not outer.endswith("_tool_result"):
            outer = outer.removesuffix(ending) + "_tool_result"
    return {
        "type": outer.replace("tool_search_tool_tool", "tool_search_tool"),
        "tool_use_id": "srvtoolu_1",
        "content": {"type": kind, **fields},
    }


def document(source: Any = None, **fields: Any) -> dict[str, Any]:
    source = {"type": "text", "media_type": "text/plain", "data": "x"} if source is None else source
    return {"type": "document", "source": source, **fields}


def found(**fields: Any) -> dict[str, Any]:
    return {"type": "search_result", "source": "s", "title": "t", "content": [text()], **fields}


def cited(kind: str, **fields: Any) -> dict[str, Any]:
    return assistant(text(citations=[{"type": kind, "cited_text": "x", **fields}]))


def tool(**fields: Any) -> dict[str, Any]:
    return ask(tools=[{"name": "f", "input_schema": {"type": "object"}, **fields}])


def words(conversation: Conversation) -> str:
    """Everything that the guard is given to read."""
    said = [definition.text for definition in conversation.definitions]
    for message in conversation.messages:
        for part in message.parts:
            match part:
                case Text(text) | Reasoning(text) | ToolCallResponse(_, text):
                    said.append(text)
                case ToolCall(_, name, arguments):
                    said += [name, arguments]
                case _:
                    pass
    return "\n".join(said)


def rejected(body: Any, **options: Any) -> RequestRejected:
    with pytest.raises(RequestRejected) as caught:
        parse(body, **options)
    return caught.value


SERVER_RESULTS = [kind for kind, rules in messages_fields.RESULTS.items() if rules]

# Every place that can hold text, by its table and field.
READ: list[tuple[str, str, Any]] = [
    ("request", "system", ask(system=MARK)),
    ("request", "system", ask(system=[text(MARK)])),
    ("request", "stop_sequences", ask(stop_sequences=["x", MARK])),
    ("request", "output_format", ask(output_format={"type": "json_schema", "schema": {"enum": [MARK]}})),
    ("output_config", "format", ask(output_config={"format": {"type": "json_schema", "schema": {MARK: {}}}})),
    ("tool_choice", "name", ask(tool_choice={"type": "tool", "name": MARK})),
    *(("messages", role, ask({"role": role, "content": MARK})) for role in messages_fields.ROLES),
    *(("text", "text", ask({"role": role, "content": [text(MARK)]})) for role in messages_fields.ROLES),
    ("thinking", "thinking", ask(assistant({"type": "thinking", "thinking": MARK, "signature": SEALED}))),
    ("document", "title", ask(user([document(title=MARK)]))),
    ("document", "context", ask(user([document(context=MARK)]))),
    ("source text", "data", ask(user([document({"type": "text", "media_type": "text/plain", "data": MARK})]))),
    ("source content", "content", ask(user([document({"type": "content", "content": MARK})]))),
    ("source content", "content", ask(user([document({"type": "content", "content": [text(MARK)]})]))),
    ("search_result", "source", ask(user([found(source=MARK)]))),
    ("search_result", "title", ask(user([found(title=MARK)]))),
    ("search_result", "content", ask(user([found(content=[text(MARK)])]))),
    ("tool_use", "name", ask(assistant(call(name=MARK)))),
    ("tool_use", "input", ask(assistant(call(input={"a": [MARK]})))),
    ("tool_use", "input", ask(assistant(call(input={MARK: 1})))),
    ("tool_use", "toolset_name", ask(assistant(call(toolset_name=MARK)))),
    ("server_tool_use", "name", ask(assistant(call("server_tool_use", name=MARK)))),
    ("server_tool_use", "input", ask(assistant(call("server_tool_use", input={"code": MARK})))),
    ("tool_result", "content", ask(user([result(MARK)]))),
    ("tool_result", "content", ask(user([result([text(MARK)])]))),
    ("tool_result", "content", ask(user([result([found(content=[text(MARK)])])]))),
    ("tool_result", "content", ask(user([result([document({"type": "content", "content": [text(MARK)]})])]))),
    ("tool_result", "toolset_name", ask(user([result("x", toolset_name=MARK)]))),
    ("tool_reference", "tool_name", ask(user([result([{"type": "tool_reference", "tool_name": MARK}])]))),
    ("browser_state", "tabs", ask(user([result([{"type": "browser_state", "tabs": [{"title": MARK}]}])]))),
    (
        "browser_state",
        "state_changes",
        ask(user([result([{"type": "browser_state", "tabs": [], "state_changes": [{"url": MARK}]}])])),
    ),
    *(
        (f"result {kind}", name, ask(assistant(ran(kind, **{name: [MARK] if rule is Rule.JSON else MARK}))))
        for kind in SERVER_RESULTS
        for name, rule in (messages_fields.RESULTS[kind] or {}).items()
        if rule in (Rule.TEXT, Rule.JSON)
    ),
    *(
        (f"citation {kind}", name, ask(cited(kind, **{name: MARK})))
        for kind, rules in messages_fields.CITATIONS.items()
        for name, rule in rules.items()
        if rule is Rule.TEXT
    ),
    ("tool custom", "name", tool(name=MARK)),
    ("tool custom", "description", tool(description=MARK)),
    ("tool custom", "input_schema", tool(input_schema={"properties": {MARK: {}}})),
    ("tool custom", "input_examples", tool(input_examples=[{"a": MARK}])),
    *(
        (
            f"tool {kind}",
            name,
            ask(tools=[{"type": kind, "name": "f", name: {"x": MARK} if rule is Rule.JSON else MARK}]),
        )
        for kind, rules in messages_fields.TOOLS.items()
        if rules is not None and kind != "custom" and "name" in rules
        for name, rule in rules.items()
        if rule in (Rule.TEXT, Rule.JSON)
    ),
    *(
        (f"tool {kind}", "configs", ask(tools=[{"type": kind, "configs": {"find": {"x": MARK}}}]))
        for kind in ("browser_toolset_20260801", "computer_toolset_20260801")
    ),
]


@pytest.mark.parametrize(("table", "name", "body"), READ, ids=lambda value: value if isinstance(value, str) else "")
def test_text_that_can_reach_the_model_is_read(table: str, name: str, body: Any) -> None:
    parsed = parse(body)
    assert MARK in words(parsed.conversation)
    assert MARK in parsed.encode().decode()


def test_every_moderated_field_of_the_tables_has_a_row_above() -> None:
    rows = {(table, name) for table, name, _ in READ}
    fields = messages_fields
    tables: dict[str, dict[str, Rule]] = {
        "request": dict(fields.REQUEST),
        "output_config": dict(fields.OUTPUT_CONFIG),
        "tool_choice": dict(fields.TOOL_CHOICE),
        **{f"result {kind}": dict(rules or {}) for kind, rules in fields.RESULTS.items()},
        **{f"citation {kind}": dict(rules) for kind, rules in fields.CITATIONS.items()},
        **{f"source {kind}": dict(rules or {}) for kind, rules in fields.DOCUMENT_SOURCES.items()},
        **{f"tool {kind}": dict(rules or {}) for kind, rules in fields.TOOLS.items()},
        **{kind: dict(rules or {}) for kind, rules in fields.BLOCKS.items()},
    }
    moderated = {
        (table, name)
        for table, rules in tables.items()
        for name, rule in rules.items()
        if rule in (Rule.TEXT, Rule.JSON)
    }
    assert moderated - rows == set()


PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0x"}
UNSUPPORTED_CONTENT = [
    ask({"role": "critic", "content": "x"}),
    ask({"role": "tool", "content": "x"}),
    ask(user([{"type": "x_new", "x": MARK}])),
    ask(user([document(PDF)])),
    ask(user([document({"type": "url", "url": URL})])),
    ask(user([document({"type": "file", "file_id": "file_1"})])),
    ask(user([document({"type": "text", "media_type": "text/html", "data": "x"})])),
    ask(user([{"type": "image", "source": {"type": "file", "file_id": "file_1"}}])),
    ask(user([{"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": "R0lG"}}])),
    ask(user([{"type": "container_upload", "file_id": "file_1"}])),
    ask(user([{"type": "thinking", "thinking": "x", "signature": ""}])),
    ask(user([call()])),
    ask(assistant(image())),
    ask(assistant(result("x"))),
    ask(assistant(document())),
    ask(system=[image()]),
    ask({"role": "system", "content": [document()]}),
    ask({"role": "system", "content": [{"type": "tool_addition", "tool": {"type": "tool_reference", "name": MARK}}]}),
    ask(user([result([call()])])),
    ask(user([result([result("x")])])),
    ask(user([found(content=[image()])])),
    ask(assistant(ran("web_search_result", title=MARK))),
    ask(assistant({"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []})),
    ask(assistant({"type": "web_fetch_tool_result", "tool_use_id": "srvtoolu_1", "content": {}})),
    ask(assistant({"type": "mcp_tool_use", "id": "mcptoolu_1", "name": "f", "input": {}, "server_name": "s"})),
    ask(assistant({"type": "compaction", "content": MARK})),
    ask(
        assistant(
            ran("code_execution_result") | {"content": {"type": "encrypted_code_execution_result", "stderr": MARK}}
        )
    ),
    ask(cited("x_location")),
    *(ask(tools=[{"type": kind, "name": "x"}]) for kind, rules in messages_fields.TOOLS.items() if rules is None),
    ask(tools=[{"type": "x_new", "name": "x"}]),
]
UNSUPPORTED_FIELD = [
    ask(container="container_1"),
    ask(container={"skills": [{"type": "custom", "skill_id": "s"}]}),
    ask(mcp_servers=[{"type": "url", "name": "s", "url": "https://x.example"}]),
    ask(context_management={"edits": [{"type": "clear_tool_uses_20250919"}]}),
    ask(compaction={"type": "summarize", "instructions": MARK}),
    ask(fallbacks=[{"model": "other"}]),
    ask(thread={"type": "x_new"}),
    ask(thread={"type": "create", "x_new": MARK}),
    ask(prompt=MARK),
    ask(store=True),
    ask(logprobs=True),
    ask(chat_template=MARK),
    ask(chat_template_kwargs={"x": 1}),
    ask(prompt_embeds="AAAA"),
    ask(truncate_prompt_tokens=5),
    ask(betas=["x"]),
    ask(anthropic_version="2023-06-01"),
    ask(extra_body={"x": MARK}),
    ask(api_base="https://x.example"),
    ask(guardrails=["none"]),
    ask(guardrails=None),
    ask(disable_global_guardrail=True),
    ask(metadata={"guardrails": "off"}),
    ask(metadata={"note": MARK}),
    ask(Messages=[]),
    ask(**{MARK: 1}),
    ask(user("x", x_new=MARK)),
    ask(user([text(x_new=MARK)])),
    ask(user([text(x_new=[1])])),
    ask(user([{"type": "image", "source": {"type": "url", "url": URL, "x_new": MARK}}])),
    ask({"role": "system", "content": "x", "clear_at": "next_user_message"}),
    tool(x_new=MARK),
    ask(tool_choice={"type": "auto", "x_new": MARK}),
]
INVALID = [
    None,
    [],
    "x",
    {},
    ask(messages=[]),
    ask(messages={}),
    ask(1),
    ask({"role": "user"}),
    ask(user(None)),
    ask(user(5)),
    ask(user([101, 2009])),
    ask(user([{"type": "text"}])),
    ask(user([{"text": "x"}])),
    ask(user([text([MARK])])),
    ask(user([text(citations=5)])),
    ask(user([{"type": "image"}])),
    ask(user([{"type": "image", "source": {"type": "base64", "media_type": "image/png"}}])),
    ask(user([{"type": "image", "source": {"type": "url"}}])),
    ask(user([{"type": "image", "source": {"type": "base64", "media_type": MARK, "data": "R0lG"}}])),
    ask(user([document("x")])),
    ask(user([document({"type": "text", "media_type": "text/plain"})])),
    ask(user([found(content="x")])),
    ask(user([{"type": "tool_result", "content": "x"}])),
    ask(user([result(5)])),
    ask(assistant({"type": "tool_use", "name": "f", "input": {}})),
    ask(assistant({"type": "tool_use", "id": "1", "input": {}})),
    ask(assistant(call(input="x"))),
    ask(assistant(call(input=[MARK]))),
    ask(assistant({"type": "thinking", "signature": ""})),
    ask(assistant({"type": "thinking", "thinking": "x", "signature": MARK})),
    ask(assistant({"type": "redacted_thinking"})),
    ask(assistant({"type": "redacted_thinking", "data": MARK})),
    ask(assistant({"type": "redacted_thinking", "data": base64.b64encode(MARK.encode() * 20).decode()})),
    ask(assistant({"type": "redacted_thinking", "data": SEALED * 1100})),
    ask(stream="yes"),
    ask(thread="create"),
    ask(thread={"type": "continue"}),
    ask(thread={"type": "continue", "previous_message_id": MARK}),
    ask(user([result("x", tool_use_id=MARK)]), thread={"type": "continue", "previous_message_id": "msg_1"}),
    ask(stop_sequences=[1]),
    ask(stop_sequences="x"),
    ask(temperature="hot"),
    ask(model="a b"),
    ask(model=5),
    ask(metadata={"user_id": MARK}),
    ask(metadata="x"),
    ask(thinking={"type": MARK}),
    ask(tool_choice="auto"),
    ask(tool_choice={"type": MARK}),
    ask(service_tier="a b"),
    ask(output_config={"effort": MARK}),
    ask(cache_control={"type": MARK}),
    ask(user([text(cache_control={"type": "ephemeral", "ttl": MARK})])),
    ask(tools=[{"input_schema": {}}]),
    ask(tools=["bash"]),
    ask(tools=[{"name": "f", "input_schema": {}}] * 513),
]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        *((RejectKind.UNSUPPORTED_CONTENT, body) for body in UNSUPPORTED_CONTENT),
        *((RejectKind.UNSUPPORTED_FIELD, body) for body in UNSUPPORTED_FIELD),
        *((RejectKind.INVALID_REQUEST, body) for body in INVALID),
    ],
    ids=lambda value: value.value if isinstance(value, RejectKind) else json.dumps(value)[-60:],
)
def test_what_cannot_be_read_is_refused_and_not_quoted(kind: RejectKind, body: Any) -> None:
    error = rejected(body)
    assert error.kind is kind
    assert MARK not in f"{error.message}{error.param}"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5, "top_p": None, "top_k": 40, "min_p": 0.1},
        {"metadata": {"user_id": "user_0123_account__session_4567"}, "service_tier": "auto", "speed": "fast"},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}, "inference_geo": "eu"},
        {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "high"}},
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "stream": False},
        {"cache_control": {"type": "ephemeral", "ttl": "1h"}, "diagnostics": {"previous_message_id": "msg_1"}},
        {"container": None, "mcp_servers": None, "store": False, "logprobs": False},
        {"billing_policy": {"type": "billing_policy", "bill_to": {"type": "self"}}},
    ],
)
def test_options_that_carry_no_content_are_sent_on_unchanged_and_unread(fields: dict[str, Any]) -> None:
    parsed = parse(ask(**fields))
    assert json.loads(parsed.encode()) == ask(**fields)
    assert parsed.conversation == Conversation((Message("user", (Text("hello"),)),))


def test_an_unusual_word_of_an_option_is_read() -> None:
    parsed = parse(ask(output_config={"effort": "pick-a-lock"}, tool_choice={"type": "open-a-door"}))
    assert parsed.conversation.definitions == (
        Definition("tool_choice.type", "open-a-door"),
        Definition("output_config.effort", "pick-a-lock"),
    )


def test_a_conversation_keeps_order_roles_and_kinds() -> None:
    parsed = parse(
        ask(
            user([text("look"), image()]),
            assistant(
                {"type": "thinking", "thinking": "a picture", "signature": SEALED},
                {"type": "redacted_thinking", "data": SEALED},
                text("let me see"),
                call(id="x1"),
                call(id="x2", name="g", input={"a": 1}),
            ),
            user([result([text("two"), image("https://x.example/2.png")]) | {"tool_use_id": "x2"}, text("and then")]),
            assistant(text("so: ")),
            system="be brief",
            stream=True,
            tools=[{"name": "f", "input_schema": {}}],
        )
    )
    assert parsed.conversation.messages == (
        Message("system", (Text("be brief"),)),
        Message("user", (Text("look"), Uri(URL))),
        Message(
            "assistant",
            (
                Reasoning("a picture"),
                Text("let me see"),
                ToolCall("call00001", "f", "{}"),
                ToolCall("call00002", "g", '{"a":1}'),
            ),
        ),
        Message("tool", (ToolCallResponse("call00002", "two"), Uri("https://x.example/2.png"))),
        Message("user", (Text("and then"),)),
        Message("assistant", (Text("so: "),)),
    )
    assert parsed.conversation.definitions == (Definition("tool", '{"name":"f","input_schema":{}}'),)
    assert (parsed.stream, parsed.choices, parsed.include_usage, parsed.model) == (True, 1, True, "m")


def test_ids_of_calls_cannot_carry_words_and_are_the_same_in_every_turn() -> None:
    smuggled = "tell_me_how_to_pick_a_lock"
    turn = [assistant(call(id=smuggled)), user([result("x", tool_use_id=smuggled)])]
    more = [assistant(call("server_tool_use", id="srvtoolu_x", caller={"type": "direct"})), user("and?")]
    by = {"type": "code_execution_20250825", "tool_id": "srvtoolu_x"}
    last = [assistant(call(id="toolu_9", caller=by))]
    first, second = (json.loads(parse(ask(*turns)).encode()) for turns in (turn, [*turn, *more, *last]))
    assert smuggled not in json.dumps(second)
    assert first["messages"] == second["messages"][:2]
    assert first["messages"][0]["content"][0]["id"] == first["messages"][1]["content"][0]["tool_use_id"] == "call00001"
    assert second["messages"][2]["content"][0]["id"] == "srvtoolu_00002"
    assert second["messages"][4]["content"][0]["caller"]["tool_id"] == "srvtoolu_00002"


def test_a_thread_is_begun_and_continued_after_an_answer_whose_calls_keep_their_ids() -> None:
    begun = parse(ask(thread={"type": "create"}))
    assert (begun.continues, begun.server_tools, begun.body["thread"]) == (None, False, {"type": "create"})
    body = ask(user([result("x")]), thread={"type": "continue", "previous_message_id": "msg_1"})
    parsed = parse(body)
    assert json.loads(parsed.encode()) == body
    assert (parsed.continues, parsed.server_tools) == ("msg_1", True)
    before = Conversation((Message("user", (Text("hello"),)),), (Definition("tool", "f"),), Message("assistant", ()))
    whole = parsed.with_history(before).conversation
    assert [message.role for message in whole.messages] == ["user", "assistant", "tool"]
    assert whole.definitions == (Definition("tool", "f"),)


def test_media_is_replaced_in_the_conversation_and_in_the_body_by_the_same_bytes() -> None:
    inline = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    page = document({"type": "content", "content": [text("page"), image()]})
    body = ask(
        user([image(), {**inline, "cache_control": {"type": "ephemeral"}}]),
        user([result([text("seen"), inline, page])]),
        user([page]),
    )
    before = copy.deepcopy(body)
    parsed = parse(body)
    data_url = "data:image/png;base64,QUJD"
    assert parsed.media == (URL, data_url)
    cat, dog = Blob("image/png", b"cat"), Blob("image/jpeg", b"dog")
    filled = parsed.with_media({URL: cat, data_url: dog})
    assert filled.conversation.blobs() == (cat, dog, dog, cat, cat)

    def sources(value: Any) -> list[Any]:
        if isinstance(value, dict):
            own = [value["source"]] if value.get("type") == "image" else []
            return own + [source for item in value.values() for source in sources(item)]
        return [source for item in value for source in sources(item)] if isinstance(value, list) else []

    sent = json.loads(filled.encode())
    assert [(s["type"], s["media_type"], base64.b64decode(s["data"])) for s in sources(sent)] == [
        ("base64", blob.mime_type, blob.data) for blob in (cat, dog, dog, cat, cat)
    ]
    assert sent["messages"][0]["content"][1]["cache_control"] == {"type": "ephemeral"}
    assert URL not in json.dumps(sent)
    assert filled.media == ()
    assert body == before


def test_one_image_more_than_the_limit_is_refused_wherever_it_stands() -> None:
    many = [image()] * 19
    assert len(parse(ask(user([*many, result([image()])]))).sites) == 20
    assert rejected(ask(user([*many, image(), result([image()])]))).kind is RejectKind.TOO_MANY_IMAGES


def test_tools_that_the_service_runs_are_told_of() -> None:
    assert not parse(tool()).server_tools
    for kind in messages_fields.SERVER_TOOLS:
        assert parse(ask(tools=[{"type": kind, "name": "x"}])).server_tools


@pytest.mark.parametrize("level", ["request", "message", "block", "nested block", "source", "tool"])
@pytest.mark.parametrize("value", [MARK, [MARK], {"a": MARK}])
def test_the_operator_can_name_a_field_as_moderated_or_opaque(level: str, value: Any) -> None:
    extra = {"x_new": value}
    body = {
        "request": ask(**extra),
        "message": ask(user("x", **extra)),
        "block": ask(user([text(**extra)])),
        "nested block": ask(user([result([text(**extra)])])),
        "source": ask(user([{"type": "image", "source": {"type": "url", "url": URL, **extra}}])),
        "tool": tool(**extra),
    }[level]
    rejected(body)
    read = parse(body, extra_fields={"x_new": "moderated"})
    assert MARK in words(read.conversation)
    assert MARK.encode() in read.encode()
    opaque = parse(body, extra_fields={"x_new": "opaque"})
    assert MARK not in words(opaque.conversation)
    assert MARK.encode() in opaque.encode()


def test_an_operators_name_cannot_open_what_the_table_refuses() -> None:
    body = ask(mcp_servers=[{"type": "url", "url": URL}])
    assert rejected(body, extra_fields={"mcp_servers": "opaque"}).kind is RejectKind.UNSUPPORTED_FIELD


@pytest.mark.parametrize("path", [b"/v1/messages", b"/v1/messages/count_tokens"])
def test_both_routes_read_the_same_request(path: bytes) -> None:
    dialect = route("POST", path).dialect
    assert dialect is not None
    assert dialect.parse_request(ask(system=MARK), Limits(), Options()) == parse(ask(system=MARK))


def test_a_count_is_never_a_stream() -> None:
    dialect = route("POST", b"/v1/messages/count_tokens").dialect
    assert dialect is not None
    with pytest.raises(RequestRejected):
        dialect.parse_request(ask(stream=True), Limits(), Options())


scalars = st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.floats(allow_nan=False, allow_infinity=False)
names = st.sampled_from(
    sorted(
        {*messages_fields.REQUEST, "type", "text", "id", "name", "input", "source", "data", "title"}
        | {name for rules in messages_fields.BLOCKS.values() for name in rules or ()}
    )
)
kinds = [*messages_fields.BLOCKS, *messages_fields.TOOLS, *messages_fields.RESULTS, *messages_fields.ROLES, MARK]
anything = st.recursive(
    scalars | st.text(max_size=12) | st.sampled_from(kinds),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
FULL = [
    *(body for _, _, body in READ),
    ask(user([image(), document(title="t"), result([image(), found()])]), metadata={"user_id": "u"}),
    ask(assistant({"type": "thinking", "thinking": "a b", "signature": SEALED}, text("a b"), call()), system="a b"),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in members for deeper in paths(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A valid request with one value replaced, or one field added, anywhere."""
    body = copy.deepcopy(draw(st.sampled_from(FULL)))
    path = draw(st.sampled_from(paths(body)[1:]))
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and draw(st.booleans()):
        holder[draw(names | st.text(max_size=8))] = draw(anything)
    else:
        holder[path[-1]] = draw(anything)
    return body


@settings(max_examples=400, deadline=None)
@given(body=anything | mutated())
def test_any_json_is_either_refused_or_read_in_full(body: Any) -> None:
    """Whatever is sent on and is more than a word is something that the guard was given to read."""
    try:
        parsed = parse(body)
    except RequestRejected:
        return
    assert len(parsed.conversation.messages) >= 1
    read = words(parsed.conversation) + json.dumps(words(parsed.conversation), ensure_ascii=False)
    media = "\n".join(parsed.media)
    unread = [
        leaf
        for leaf in leaves(json.loads(parsed.encode()))
        if any(character.isspace() or ord(character) > 126 for character in leaf)
        and leaf not in read
        and json.dumps(leaf, ensure_ascii=False)[1:-1] not in read
        and leaf not in media
    ]
    assert unread == []
