from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guard_middleware.types import Blob, Message, Text, ToolCall, ToolCallResponse
from guard_training.corpus.conversation import conversation
from guard_training.corpus.rows import Row, Skipped
from guard_training.update.corrections import (
    Correction,
    Lesson,
    Logged,
    agreed,
    content_key,
    read_corrections,
    read_log,
    user_turns,
    whole,
)

GOOD = {"decision": "d1", "reviewer": "ana", "label": "unharmful", "content": "kill a process"}


def read(folder: Path, *values: Any, log: dict[str, Logged] | None = None) -> tuple[list[Correction], list[str]]:
    file = folder / "corrections.jsonl"
    file.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    skipped = Skipped()
    return read_corrections(file, skipped, log), skipped.reasons


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (56, 56), (9, 90, 9)).save(tmp_path / "a.png")
    return "a.png"


@pytest.mark.parametrize(
    ("content", "prompt", "response", "labels"),
    [
        ("kill a process", "kill a process", None, ("unharmful", None)),
        ({"text": "kill a process"}, "kill a process", None, ("unharmful", None)),
        ({"text": "kill it", "response": "kill -9"}, "kill it", "kill -9", (None, "unharmful")),
        ({"messages": [{"role": "user", "content": "kill it"}]}, "kill it", None, ("unharmful", None)),
        (
            {"messages": [{"role": "user", "content": "kill it"}, {"role": "assistant", "content": "kill -9"}]},
            "kill it",
            "kill -9",
            (None, "unharmful"),
        ),
    ],
)
def test_one_turn_becomes_a_row_that_every_command_reads(
    tmp_path: Path, content: Any, prompt: str, response: str | None, labels: tuple[Any, Any]
) -> None:
    (one,), reasons = read(tmp_path, {**GOOD, "content": content})
    assert reasons == []
    assert (one.decision, one.reviewer, one.lesson.id) == ("d1", "ana", "correction:d1")
    assert (one.lesson.prompt, one.lesson.response, one.lesson.messages) == (prompt, response, "")
    assert (one.lesson.request, one.lesson.response_label) == labels
    assert whole(one.lesson) == conversation(one.lesson)


def test_a_conversation_is_kept_as_the_gateway_saw_it(tmp_path: Path, picture: str) -> None:
    messages = [
        {"role": "system", "content": "You run a shop."},
        {"role": "user", "content": [{"type": "text", "content": "see"}, {"type": "image", "image": picture}]},
        {"role": "assistant", "content": [{"type": "tool_call", "name": "look", "arguments": "{}"}]},
        {"role": "tool", "content": [{"type": "tool_call_response", "response": "a lock"}]},
        {"role": "user", "content": "open it"},
        {"role": "assistant", "content": "No."},
    ]
    (one,), reasons = read(tmp_path, {**GOOD, "content": {"messages": messages}, "request_label": "harmful"})
    assert reasons == []
    assert (one.lesson.request, one.lesson.response_label) == ("harmful", "unharmful")
    assert (one.lesson.prompt, one.lesson.response) == ("open it", "No.")
    seen = whole(one.lesson)
    assert [message.role for message in seen.messages] == ["system", "user", "assistant", "tool", "user"]
    assert seen.messages[1].parts[0] == Text("see")
    assert isinstance(seen.messages[1].parts[1], Blob)
    assert seen.messages[2].parts == (ToolCall("", "look", "{}"),)
    assert seen.messages[3].parts == (ToolCallResponse("", "a lock"),)
    assert seen.answer == Message("assistant", (Text("No."),))
    assert user_turns(one.lesson) == ["see", "open it"]


def test_an_image_alone_or_with_words_before_it(tmp_path: Path, picture: str) -> None:
    parts = [{"type": "text", "content": "see"}, {"type": "image", "image": picture}]
    found, reasons = read(
        tmp_path,
        {**GOOD, "content": {"image": picture}},
        {**GOOD, "content": {"messages": [{"role": "user", "content": parts[::-1]}]}},
        {**GOOD, "content": {"messages": [{"role": "user", "content": parts}]}},
    )
    assert reasons == []
    assert [one.lesson.messages == "" for one in found] == [True, True, False]
    assert [type(part) for part in whole(found[2].lesson).messages[0].parts] == [Text, Blob]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a usable correction: Expecting"),
        ("[]", "not a JSON object"),
        ({**GOOD, "label": "safe"}, "the label 'safe' is none of"),
        ({**GOOD, "label": None}, "the label None is none of"),
        ({key: GOOD[key] for key in ("decision", "label", "content")}, "reviewer is missing"),
        ({**GOOD, "decision": " "}, "decision must be a text"),
        ({**GOOD, "verdict": "x"}, "unknown key verdict"),
        ({**GOOD, "content": ""}, "the content is a text"),
        ({**GOOD, "content": {}}, "the content is a text"),
        ({**GOOD, "content": {"text": 3}}, "the content is a text"),
        ({**GOOD, "content": {"messages": []}}, "the content is a text"),
        ({**GOOD, "content": {"messages": [{"role": "user"}]}}, "a message is"),
        ({**GOOD, "content": {"messages": [{"role": "bot", "content": "x"}]}}, "a message is"),
        ({**GOOD, "content": {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}}, "type 'audio'"),
        ({**GOOD, "content": {"messages": [{"role": "system", "content": "x"}]}}, "no message of a user"),
        ({**GOOD, "content": {"image": "../a.png"}}, "outside the file's folder"),
        ({**GOOD, "content": {"image": "none.png"}}, "no readable PNG"),
        ({**GOOD, "request_label": "harmful"}, "request_label is for content with an answer"),
        ({**GOOD, "content": "half \ud800"}, "half of a surrogate pair"),
        ({**GOOD, "category": 5}, "category must be a text"),
        ({**GOOD, "rationale": ["x"]}, "rationale must be a text"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named_and_the_others_go_on(tmp_path: Path, line: Any, reason: str) -> None:
    found, reasons = read(tmp_path, GOOD, line)
    assert len(found) == 1
    assert len(reasons) == 1
    assert reasons[0].startswith("corrections.jsonl:2: ")
    assert reason in reasons[0]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "text", "image"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["messages", "role", "content", "type", "image", "text"]), inner, max_size=3
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_the_content_is_a_line_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    found, reasons = read(tmp_path_factory.getbasetemp(), {**GOOD, "content": content})
    assert len(found) + len(reasons) == 1


def test_the_log_says_which_decisions_there_are_and_what_they_judged(tmp_path: Path) -> None:
    verdict = {"request": "harmful", "response": "unharmful"}
    line = {
        "schema": "guard_middleware.decision/1",
        "id": "r1",
        "decisions": [
            {"id": "q1", "source": "input", "verdict": {"request": "harmful", "response": None}},
            {"id": "q2", "source": "output", "verdict": verdict},
            {"id": "q3", "source": "input", "verdict": None},
        ],
    }
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n{}\n")
    skipped = Skipped()
    log = read_log([tmp_path / "log.jsonl"], skipped)
    assert skipped.reasons == ["log.jsonl:2: not a line of the decision log: schema is missing"]
    assert set(log) == {"r1", "q1", "q2", "q3"}
    pair = {"text": "kill it", "response": "kill -9"}
    found, reasons = read(
        tmp_path,
        {**GOOD, "decision": "q1"},
        {**GOOD, "decision": "q2", "content": pair},
        {**GOOD, "decision": "r1", "content": pair, "request_label": "unharmful"},
        {**GOOD, "decision": "q2"},
        {**GOOD, "decision": "q1", "content": pair},
        {**GOOD, "decision": "q9"},
        log=log,
    )
    assert [one.decision for one in found] == ["q1", "q2", "r1"]
    assert [one.lesson.request for one in found] == ["unharmful", "harmful", "unharmful"]
    assert "judged the answer alone" in reasons[0]
    assert "judged the request alone" in reasons[1]
    assert reasons[2] == "corrections.jsonl:6: not a usable correction: no decision q9 in the log"


def test_reviewers_who_disagree_are_reported_and_the_content_is_left_out(tmp_path: Path) -> None:
    found, _ = read(
        tmp_path,
        GOOD,
        {**GOOD, "decision": "d2", "reviewer": "ben", "label": "harmful", "content": "Kill  a process!"},
        {**GOOD, "decision": "d3", "content": "bake bread"},
        {**GOOD, "decision": "d3", "content": "bake bread", "reviewer": "ben", "rationale": "It is bread."},
    )
    skipped = Skipped()
    kept = agreed(found, skipped)
    assert [(one.decision, one.lesson.rationale) for one in kept] == [("d3", "It is bread.")]
    assert skipped.reasons == [
        "corrections.jsonl:1 (ana), corrections.jsonl:2 (ben): reviewers disagree about the same content; "
        "settle it and give it again"
    ]


def test_a_reviewer_may_think_again_but_a_decision_has_one_content(tmp_path: Path) -> None:
    found, _ = read(
        tmp_path,
        GOOD,
        {**GOOD, "label": "harmful"},
        {**GOOD, "decision": "d2", "content": "bake bread"},
        {**GOOD, "decision": "d2", "content": "bake a cake"},
    )
    skipped = Skipped()
    kept = agreed(found, skipped)
    assert [(one.decision, one.lesson.request) for one in kept] == [("d1", "harmful")]
    assert len(skipped.reasons) == 2
    assert all("two contents" in reason for reason in skipped.reasons)


def test_content_is_the_same_whatever_its_case_and_another_with_other_roles(tmp_path: Path, picture: str) -> None:
    (one, two), _ = read(
        tmp_path,
        {**GOOD, "content": {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}},
        {**GOOD, "content": {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}},
    )
    assert content_key(one.lesson) != content_key(two.lesson)
    plain = Row("x", "made", "Kill a process.", "harmful")
    assert content_key(plain) == content_key(Lesson("y", "made", "kill a PROCESS", None))
    assert content_key(plain) != content_key(Lesson("y", "made", "kill a PROCESS", None, image=tmp_path / picture))
