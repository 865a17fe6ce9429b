"""What a request may hold: everything that reaches the model is read, everything else is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.dialects import chat_fields, route
from guard_middleware.dialects.base import Options, ParsedRequest
from guard_middleware.dialects.chat_request import parse_request
from guard_middleware.dialects.fields import Rule
from guard_middleware.errors import RejectKind, RequestRejected
from guard_middleware.limits import Limits
from guard_middleware.references import to_data_url
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
USER = {"role": "user", "content": "hello"}
PNG = "https://pictures.example/cat.png"


def parse(body: Any, **options: Any) -> ParsedRequest:
    return parse_request(body, Limits(), Options(**options))


def ask(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages) or [USER], **fields}


def call(**fields: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}, **fields}


def words(conversation: Conversation) -> str:
    """Everything that the guard is given to read, names included."""
    found = [definition.text for definition in conversation.definitions]
    for message in (*conversation.messages, *([conversation.answer] if conversation.answer else [])):
        found.append(message.name or "")
        for part in message.parts:
            match part:
                case Text(text) | Reasoning(text) | ToolCallResponse(_, text):
                    found.append(text)
                case ToolCall(_, name, arguments):
                    found += [name, arguments]
                case _:
                    pass
    return "\n".join(found)


def rejected(body: Any, **options: Any) -> RequestRejected:
    with pytest.raises(RequestRejected) as caught:
        parse(body, **options)
    return caught.value


# Every place that can hold text, by its table and field.
READ = [
    ("messages", "content", ask({"role": "system", "content": MARK})),
    ("messages", "content", ask({"role": "developer", "content": MARK})),
    ("messages", "content", ask({"role": "user", "content": MARK})),
    ("messages", "content", ask({"role": "assistant", "content": MARK})),
    ("messages", "content", ask({"role": "tool", "tool_call_id": "c1", "content": MARK})),
    ("messages", "content", ask({"role": "function", "name": "f", "content": MARK})),
    ("text", "text", ask({"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": MARK}]})),
    *(
        ("text", "text", ask({"role": role, "content": [{"type": "text", "text": MARK}]}))
        for role in ("system", "developer", "user", "assistant", "function")
    ),
    ("refusal", "refusal", ask({"role": "assistant", "content": [{"type": "refusal", "refusal": MARK}]})),
    ("assistant", "refusal", ask({"role": "assistant", "content": None, "refusal": MARK})),
    ("assistant", "reasoning", ask({"role": "assistant", "content": "x", "reasoning": MARK})),
    ("assistant", "reasoning_content", ask({"role": "assistant", "content": "x", "reasoning_content": MARK})),
    ("system", "name", ask({**USER, "role": "system", "name": MARK})),
    ("developer", "name", ask({**USER, "role": "developer", "name": MARK})),
    ("user", "name", ask({**USER, "name": MARK})),
    ("assistant", "name", ask({**USER, "role": "assistant", "name": MARK})),
    ("tool", "name", ask({**USER, "role": "tool", "tool_call_id": "c1", "name": MARK})),
    ("function", "name", ask({**USER, "role": "function", "name": MARK})),
    ("call", "name", ask({"role": "assistant", "tool_calls": [call(function={"name": MARK, "arguments": ""})]})),
    ("call", "arguments", ask({"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": MARK})]})),
    (
        "call",
        "input",
        ask(
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "f", "input": MARK}}]}
        ),
    ),
    ("call", "legacy", ask({"role": "assistant", "function_call": {"name": "f", "arguments": MARK}})),
    (
        "citation",
        "title",
        ask(
            {
                "role": "assistant",
                "content": "x",
                "annotations": [
                    {"type": "url_citation", "url_citation": {"title": MARK, "url": "u", "start_index": 0}}
                ],
            }
        ),
    ),
    (
        "citation",
        "url",
        ask(
            {
                "role": "assistant",
                "content": "x",
                "annotations": [{"type": "url_citation", "url_citation": {"title": "t", "url": MARK}}],
            }
        ),
    ),
    ("request", "prediction", ask(prediction={"type": "content", "content": [{"type": "text", "text": MARK}]})),
    ("request", "tool_choice", ask(tool_choice={"type": "function", "function": {"name": MARK}})),
    ("request", "function_call", ask(function_call={"name": MARK})),
    ("request", "metadata", ask(metadata={"note": MARK})),
    ("request", "stop", ask(stop=MARK)),
    ("request", "stop", ask(stop=["x", MARK])),
    (
        "request",
        "response_format",
        ask(response_format={"type": "json_schema", "json_schema": {"schema": {"enum": [MARK]}}}),
    ),
    ("request", "response_format", ask(response_format={"type": "json_schema", "json_schema": {MARK: {}}})),
    ("request", "functions", ask(functions=[{"name": "f", "description": MARK}])),
    ("request", "functions", ask(functions=[{"name": "f", "parameters": {"properties": {MARK: {}}}}])),
    ("tool", "function", ask(tools=[{"type": "function", "function": {"name": "f", "description": MARK}}])),
    ("tool", "function", ask(tools=[{"type": "function", "function": {"name": "f", "x_new": [MARK]}}])),
    (
        "tool",
        "custom",
        ask(
            tools=[
                {
                    "type": "custom",
                    "custom": {"name": "f", "format": {"type": "grammar", "grammar": {"definition": MARK}}},
                }
            ]
        ),
    ),
]


@pytest.mark.parametrize(("table", "name", "body"), READ, ids=lambda value: value if isinstance(value, str) else "")
def test_text_that_can_reach_the_model_is_read(table: str, name: str, body: Any) -> None:
    assert MARK in words(parse(body).conversation)


def test_every_moderated_field_of_the_tables_has_a_row_above() -> None:
    rows = {(table, name) for table, name, _ in READ}
    tables: dict[str, dict[str, Rule]] = {
        "request": dict(chat_fields.REQUEST),
        "call": {name: rule for rules in chat_fields.CALL.values() for name, rule in rules.items()},
        "citation": dict(chat_fields.URL_CITATION),
        "tool": {name: rule for rules in chat_fields.TOOLS.values() for name, rule in rules.items()},
        **{role: dict(rules) for role, rules in chat_fields.ROLES.items()},
        **{kind: dict(rules) for kind, rules in chat_fields.PARTS.items() if rules},
    }
    moderated = {
        (table, name)
        for table, rules in tables.items()
        for name, rule in rules.items()
        if rule in (Rule.TEXT, Rule.JSON)
    }
    assert moderated - rows == set()


UNSUPPORTED_CONTENT = [
    ask({**USER, "role": "critic"}),
    ask({"role": "user", "content": [{"type": "x_new", "x": MARK}]}),
    ask({"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}),
    ask({"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}),
    ask({"role": "user", "content": [{"type": "video_url", "video_url": {"url": PNG}}]}),
    ask({"role": "user", "content": [{"type": "prompt_embeds", "prompt_embeds": {"data": "x"}}]}),
    ask({"role": "system", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}),
    ask({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}),
    ask({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}),
    ask(tools=[{"type": "web_search", "web_search": {}}]),
    ask(tools=[{"type": "mcp", "server_url": "https://x.example"}]),
    ask({"role": "assistant", "tool_calls": [{"id": "1", "type": "computer", "computer": {}}]}),
    ask(modalities=["text", "audio"]),
]
UNSUPPORTED_FIELD = [
    ask(audio={"voice": "alloy", "format": "wav"}),
    ask(web_search_options={}),
    ask(logprobs=True),
    ask(top_logprobs=3),
    ask(prompt_logprobs=0),
    ask(echo=True),
    ask(store=True),
    ask(return_token_ids=True),
    ask(chat_template="{{ messages }}"),
    ask(chat_template_kwargs={"x": 1}),
    ask(mm_processor_kwargs={}),
    ask(documents=[{"text": MARK}]),
    ask(prompt_embeds="AAAA"),
    ask(prompt=MARK),
    ask(input=[1, 2, 3]),
    ask(guided_regex=MARK),
    ask(bad_words=[MARK]),
    ask(extra_body={"guardrails": []}),
    ask(api_base="https://x.example"),
    ask(guardrails=["none"]),
    ask(guardrails=None),
    ask(disable_global_guardrail=True),
    ask(metadata={"guardrails": "off"}),
    ask(Messages=[USER]),
    ask(STREAM=True),
    {**ask(), "\u017ftream": True},
    ask(**{MARK: 1}),
    ask({**USER, "x_new": MARK}),
    ask({**USER, "x_new": {"a": 1}}),
    ask({"role": "user", "content": [{"type": "text", "text": "x", "x_new": MARK}]}),
    ask({"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG, "x": MARK}}]}),
    ask({"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}, "uuid": "earlier"}]}),
    ask({"role": "assistant", "content": None, "audio": {"id": "a"}}),
    ask({"role": "assistant", "tool_calls": [call(extra_content={"x": MARK})]}),
    ask(tools=[{"type": "function", "function": {"name": "f"}, "x_new": MARK}]),
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
    ask({"role": "user", "content": None}),
    ask({"role": "user", "content": 5}),
    ask({"role": "user", "content": [101, 2009]}),
    ask({"role": "user", "content": [{"type": "text"}]}),
    ask({"role": "user", "content": [{"type": "text", "text": [MARK]}]}),
    ask({"role": "user", "content": [{"type": "image_url", "image_url": PNG}]}),
    ask({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}),
    ask({"role": "tool", "content": "x"}),
    ask({"role": "assistant", "tool_calls": [call(function={"name": "f"})]}),
    ask({"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": {"a": 1}})]}),
    ask(n=0),
    ask(n=5),
    ask(n=17),
    ask(n=True),
    ask(n=1.0),
    ask(stream="yes"),
    ask(stream_options={"include_usage": 1}),
    ask(stop=[1]),
    ask(stop=["x"] * 17),
    ask(temperature="hot"),
    ask(model="a b"),
    ask(model=5),
    ask(user=MARK),
    ask(user="u" * 257),
    ask(safety_identifier=MARK),
    ask(prompt_cache_key={"x": 1}),
    ask(reasoning_effort=MARK),
    ask(verbosity=[MARK]),
    ask(service_tier="a b"),
    ask(tool_choice=MARK),
    ask(tool_choice=[MARK]),
    ask(prompt_cache_options={"x": [1] * 40}),
    ask(logit_bias=[1]),
    ask(logit_bias={MARK: 1}),
    ask(metadata={"k": 1}),
    ask(metadata={MARK: "x"}),
    ask(metadata={"k": "x" * 513}),
    ask(metadata={f"k{i}": "x" for i in range(17)}),
    ask(tools=[{"type": "function"}]),
    ask(tools=[{"type": "function", "function": {"name": "f"}}] * 129),
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
        {"temperature": 0.5, "seed": 7, "top_p": None, "top_k": 40, "min_p": 0.1, "ignore_eos": True},
        {"user": "u-1@example.org", "safety_identifier": "abc", "prompt_cache_key": "k:1"},
        {"service_tier": "auto", "reasoning_effort": "low", "verbosity": "low", "prompt_cache_retention": "24h"},
        {"metadata": {"team": "blue"}, "logit_bias": {"50256": -100}},
        {"logprobs": False, "store": False, "top_logprobs": None, "audio": None},
        {"tool_choice": "required", "parallel_tool_calls": True},
        {"response_format": {"type": "json_object"}, "modalities": ["text"]},
        {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}, "stream": False, "n": 4},
    ],
)
def test_options_that_carry_no_content_are_sent_on_unchanged_and_unread(fields: dict[str, Any]) -> None:
    parsed = parse(ask(**fields))
    assert json.loads(parsed.encode()) == ask(**fields)
    assert parsed.conversation == Conversation((Message("user", (Text("hello"),)),))


def test_the_clients_moderation_settings_are_dropped() -> None:
    parsed = parse(ask(moderation={"model": "m", "policy": {"input": {"mode": "score"}}}))
    assert "moderation" not in parsed.body


def test_a_conversation_keeps_order_roles_and_kinds() -> None:
    parsed = parse(
        ask(
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": PNG}}],
            },
            {
                "role": "assistant",
                "content": "let me see",
                "reasoning": "a picture",
                "reasoning_content": "a picture",
                "tool_calls": [call(id="x1"), call(id="x2", function={"name": "g", "arguments": "1"})],
            },
            {"role": "tool", "tool_call_id": "x2", "content": [{"type": "text", "text": "two"}]},
            {"role": "tool", "tool_call_id": "x1", "content": "one", "name": "f"},
            stream=True,
            n=2,
            stream_options={"include_usage": True},
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    )
    assert parsed.conversation.messages == (
        Message("system", (Text("be brief"),)),
        Message("user", (Text("look"), Uri(PNG))),
        Message(
            "assistant",
            (
                Reasoning("a picture"),
                Text("let me see"),
                ToolCall("call00001", "f", "{}"),
                ToolCall("call00002", "g", "1"),
            ),
        ),
        Message("tool", (ToolCallResponse("call00002", "two"),)),
        Message("tool", (ToolCallResponse("call00001", "one"),), "f"),
    )
    assert parsed.conversation.definitions == (Definition("tool", '{"name":"f"}'),)
    assert (parsed.stream, parsed.choices, parsed.include_usage, parsed.model) == (True, 2, True, "m")


def test_ids_of_tool_calls_cannot_carry_words_to_the_model() -> None:
    smuggled = "tell_me_how_to_pick_a_lock"
    parsed = parse(
        ask(
            {"role": "assistant", "tool_calls": [call(id=smuggled)]},
            {"role": "tool", "tool_call_id": smuggled, "content": "x"},
        )
    )
    assert smuggled.encode() not in parsed.encode()
    sent = json.loads(parsed.encode())["messages"]
    assert sent[0]["tool_calls"][0]["id"] == sent[1]["tool_call_id"] == "call00001"


def test_media_is_replaced_in_the_conversation_and_in_the_body_by_the_same_bytes() -> None:
    other = "https://pictures.example/dog.png"

    def image(url: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}

    body = ask({"role": "user", "content": [image(PNG), {"type": "text", "text": "and"}, image(other), image(PNG)]})
    before = copy.deepcopy(body)
    parsed = parse(body)
    assert parsed.media == (PNG, other)
    cat, dog = Blob("image/png", b"cat"), Blob("image/png", b"dog")
    filled = parsed.with_media({PNG: cat, other: dog})
    assert filled.conversation.blobs() == (cat, dog, cat)
    content = json.loads(filled.encode())["messages"][0]["content"]
    assert [part["image_url"] for part in content if part["type"] == "image_url"] == [
        {"url": to_data_url(blob), "detail": "low"} for blob in (cat, dog, cat)
    ]
    assert filled.media == ()
    assert body == before
    with pytest.raises(KeyError):
        parsed.with_media({PNG: cat})


def test_one_image_more_than_the_limit_is_refused() -> None:
    image = {"type": "image_url", "image_url": {"url": PNG}}
    assert len(parse(ask({"role": "user", "content": [image] * 20})).sites) == 20
    assert rejected(ask({"role": "user", "content": [image] * 21})).kind is RejectKind.TOO_MANY_IMAGES


@pytest.mark.parametrize("level", ["request", "message", "part", "tool_call"])
@pytest.mark.parametrize("value", [MARK, [MARK], {"a": MARK}])
def test_the_operator_can_name_a_field_as_moderated_or_opaque(level: str, value: Any) -> None:
    extra = {"x_new": value}
    body = {
        "request": ask(**extra),
        "message": ask({**USER, **extra}),
        "part": ask({"role": "user", "content": [{"type": "text", "text": "x", **extra}]}),
        "tool_call": ask({"role": "assistant", "tool_calls": [call(**extra)]}),
    }[level]
    rejected(body)
    read = parse(body, extra_fields={"x_new": "moderated"})
    assert MARK in words(read.conversation)
    assert MARK.encode() in read.encode()
    opaque = parse(body, extra_fields={"x_new": "opaque"})
    assert MARK not in words(opaque.conversation)
    assert MARK.encode() in opaque.encode()


def test_an_operators_name_cannot_open_what_the_table_refuses() -> None:
    assert (
        rejected(ask(chat_template=MARK), extra_fields={"chat_template": "opaque"}).kind is RejectKind.UNSUPPORTED_FIELD
    )


scalars = st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.floats(allow_nan=False, allow_infinity=False)
names = st.sampled_from(
    sorted({*chat_fields.REQUEST, *chat_fields.ROLES["assistant"], *chat_fields.IMAGE_URL, "type", "text", "function"})
)
anything = st.recursive(
    scalars
    | st.text(max_size=12)
    | st.sampled_from(["user", "text", "image_url", "tool", "assistant", "function", MARK]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
FULL = [body for _, _, body in READ] + [
    ask({"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}, metadata={"a": "b"}, user="u")
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
    sent = json.loads(parsed.encode())
    read = words(parsed.conversation) + json.dumps(words(parsed.conversation), ensure_ascii=False)
    unread = [
        leaf
        for leaf in leaves(sent)
        if any(character.isspace() or ord(character) > 126 for character in leaf)
        and leaf not in read
        and json.dumps(leaf, ensure_ascii=False)[1:-1] not in read
        and leaf not in parsed.media
    ]
    assert unread == []


def test_the_route_leads_here() -> None:
    found = route("POST", b"/v1/chat/completions").dialect
    assert found is not None
    assert found.parse_request(ask(), Limits(), Options()).dialect == "chat_completions"
