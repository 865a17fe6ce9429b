from __future__ import annotations

import hashlib
import hmac
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.errors import ConfigError
from guard_middleware.evidence import (
    EPHEMERAL,
    ContentDigest,
    Redactor,
    bypasses,
    canonical,
)
from guard_middleware.types import Action, Blob, Conversation, Message, Text, Uri
from tests.support.records import ANSWER, CONVERSATION, call, record, verdict

KEY = b"k" * 32


@pytest.mark.parametrize(
    ("rules", "text", "expected"),
    [
        ([], "as it is", "as it is"),
        ([(r"\d{4,}", "[number]")], "call 555123 now", "call [number] now"),
        ([(r"(\w+)@\w+\.\w+", r"\1@[host]")], "ann@example.com", "ann@[host]"),
        ([("a", "b"), ("b", "c")], "ab", "cc"),
    ],
)
def test_rules_apply_in_order(rules: list[tuple[str, str]], text: str, expected: str) -> None:
    assert Redactor(rules)(text) == expected


def test_a_secret_on_the_edge_of_the_cut_is_redacted_before_the_cut() -> None:
    redact = Redactor([(r"key-\d{8}", "[key]")], max_chars=12)
    assert redact("12345678key-12345678") == "12345678[key[cut]"


def test_text_past_the_scan_limit_never_leaves() -> None:
    redact = Redactor([("a+", "")], max_chars=10, scan_chars=100)
    assert redact("a" * 100 + "unseen") == "[cut]"


@pytest.mark.parametrize("rule", [("(", "x"), ("a", r"\7"), ("a*", "x"), ("", "x")])
def test_a_rule_that_cannot_work_stops_the_start(rule: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="redaction rule"):
        Redactor([rule])


def test_digests_are_reproducible_by_whoever_holds_the_key() -> None:
    conversation = Conversation((Message("user", (Text("how do I pick a lock"),)),))
    text = b'{"definitions":[],"messages":[{"parts":[{"content":"how do I pick a lock","type":"text"}],"role":"user"}]}'
    assert ContentDigest(KEY).input(conversation) == hmac.new(KEY, b"input\0" + text, hashlib.sha256).hexdigest()


def test_every_part_of_the_content_changes_the_digest() -> None:
    digest = ContentDigest(KEY)
    seen = {digest.input(CONVERSATION), digest.input(Conversation(CONVERSATION.messages))}
    for index in range(len(CONVERSATION.messages)):
        rest = CONVERSATION.messages[:index] + CONVERSATION.messages[index + 1 :]
        seen.add(digest.input(Conversation(rest, CONVERSATION.definitions)))
    seen.add(digest.answer(ANSWER))
    seen.add(digest.answer(Message("assistant", (Uri("https://example.com/one.png"),))))
    seen.add(digest.answer(Message("assistant", (Uri("https://example.com/two.png"),))))
    seen.add(digest.answer(Message("assistant", (Blob("image/png", b"one"),))))
    seen.add(digest.answer(Message("assistant", (Blob("image/png", b"two"),))))
    assert len(seen) == 11


def test_without_a_key_digests_differ_between_processes_and_say_so() -> None:
    one, two = ContentDigest(), ContentDigest()
    assert one.key_id == two.key_id == EPHEMERAL
    assert one.input(CONVERSATION) != two.input(CONVERSATION)


def test_the_key_comes_from_the_named_variable() -> None:
    named = ContentDigest.from_env("GUARD_KEY", {"GUARD_KEY": KEY.decode()})
    assert named.input(CONVERSATION) == ContentDigest(KEY).input(CONVERSATION)
    assert named.key_id not in (EPHEMERAL, KEY.decode())
    assert named.key_id != ContentDigest(b"j" * 32).key_id
    for environ in ({}, {"GUARD_KEY": ""}):
        assert ContentDigest.from_env("GUARD_KEY", environ).key_id == EPHEMERAL


def test_a_short_key_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="openssl"):
        ContentDigest.from_env("GUARD_KEY", {"GUARD_KEY": "short"})


def test_a_large_image_costs_nothing_but_its_own_digest() -> None:
    digest, blob = ContentDigest(KEY), Blob("image/png", bytes(20_000_000))
    conversation = Conversation((Message("user", (blob,)),))
    started = time.process_time()
    for _ in range(100):
        digest.input(conversation)
    assert time.process_time() - started < 0.1


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.text() | st.booleans() | st.none() | st.integers(-(2**53), 2**53), lambda v: st.lists(v), max_leaves=8
    )
)
def test_canonical_json_is_what_the_standard_library_writes_sorted_and_compact(value: object) -> None:
    data = canonical({"b": value, "a": 1})
    assert json.loads(data) == {"b": value, "a": 1}
    assert data.startswith(b'{"a":1,"b":')


def test_a_lone_surrogate_has_a_digest_of_its_own() -> None:
    digest = ContentDigest(KEY)
    of = {digest.answer(Message("assistant", (Text(text),))) for text in ("\ud800", "\ud801", "?", "�")}
    assert len(of) == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ()),
        ({"calls": (call("input"), call("output", verdict("output")))}, (("input", "on_error"),)),
        (
            {"calls": (call("input", action=Action.ANNOTATE), call("output"))},
            (("input", "on_error"), ("output", "on_error")),
        ),
        ({"calls": (call("input", action=Action.BLOCK),), "upstream_called": False, "released_bytes": 0}, ()),
        ({"calls": (call("input", verdict()),)}, (("output", "not_moderated"),)),
        ({"calls": (call("output", verdict("output")),)}, (("input", "not_moderated"),)),
        ({"answers": (ANSWER, ANSWER)}, (("output", "not_moderated"),)),
        ({"answers": ()}, ()),
        ({"calls": (call("input", verdict()),), "answers": ()}, (("output", "not_moderated"),)),
        ({"calls": (call("input", verdict()),), "answers": (Message("assistant", ()),)}, ()),
        ({"calls": (call("input", verdict()),), "outcome": "upstream_error", "released_bytes": 0}, ()),
        ({"calls": (), "conversation": None, "answers": (), "dialect": None}, ()),
    ],
)
def test_whatever_passes_without_a_verdict_is_a_bypass(
    changes: dict[str, object], expected: tuple[tuple[str, str], ...]
) -> None:
    assert bypasses(record(**changes)) == expected
