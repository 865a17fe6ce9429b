"""What of LiteLLM's dictionary is the body to judge, and what is written back."""

from __future__ import annotations

from typing import Any

import pytest

from guard_integrations.litellm import wire

ASKED = [{"role": "user", "content": "hi"}]


def _data(sent: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As LiteLLM hands it to hooks: the client's fields, its own, and a copy of the client's body."""
    own = {"litellm_call_id": "1", "litellm_logging_obj": object(), "secret_fields": {}, "metadata": {"a": "b"}}
    return {**sent, **own, "proxy_server_request": {"body": sent}, **more}


def test_the_clients_fields_are_judged_with_the_values_that_go_on() -> None:
    sent = {"model": "alias", "messages": ASKED, "temperature": 1, "x_new": {"a": 1}}
    changed = [{"role": "user", "content": "changed by another hook"}]
    body = wire.request_value(wire.CHAT, _data(sent, model="real", messages=changed))
    assert body == {"model": "real", "messages": changed, "temperature": 1, "x_new": {"a": 1}}


def test_a_prompt_that_the_client_did_not_send_is_judged_too() -> None:
    body = wire.request_value(wire.CHAT, _data({"model": "m", "prompt_id": "p"}, messages=ASKED, tools=[{"x": 1}]))
    assert body == {"model": "m", "prompt_id": "p", "messages": ASKED, "tools": [{"x": 1}]}


@pytest.mark.parametrize(
    ("fallbacks", "judged"), [(["a", "b"], False), ([{"model": "a", "messages": ASKED}], True), ("a", True)]
)
def test_fallbacks_are_left_out_only_where_they_are_names(fallbacks: Any, judged: bool) -> None:
    sent = {"model": "m", "messages": ASKED, "fallbacks": fallbacks, "tags": ["t"], "guardrails": []}
    assert ("fallbacks" in wire.request_value(wire.CHAT, _data(sent))) is judged


def test_metadata_is_judged_where_it_leaves_litellm() -> None:
    sent = {"model": "m", "metadata": {"user_id": "u"}}
    assert "metadata" not in wire.request_value(wire.CHAT, _data({**sent, "messages": ASKED}))
    assert wire.request_value(wire.RESPONSES, _data({**sent, "input": "hi"}))["metadata"] == {"user_id": "u"}


def test_without_a_copy_of_the_body_everything_is_judged_but_litellms_entries() -> None:
    data = {"model": "m", "messages": ASKED, "litellm_logging_obj": object(), "metadata": {"guardrails": ["guard"]}}
    assert wire.request_value(wire.MESSAGES, data) == {"model": "m", "messages": ASKED}


def test_what_was_judged_is_written_back_and_what_was_dropped_goes() -> None:
    sent = {"model": "m", "messages": ASKED, "moderation": {"off": True}, "stream": True}
    data = _data(sent)
    judged = [{"role": "user", "content": "judged"}]
    wire.apply_request(data, wire.request_value(wire.CHAT, data), {"model": "n", "messages": judged, "stream": True})
    assert (data["messages"], data["model"], "moderation" in data) == (judged, "m", False)
    assert data["metadata"] == {"a": "b"}


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/any/chat/completions", wire.CHAT),
        ("/any/v1/completions", wire.COMPLETIONS),
        ("/anthropic/v1/messages", wire.MESSAGES),
        ("/v1/responses", wire.RESPONSES),
        ("/v1/responses/resp_1", None),
        ("/v1/messages/count_tokens", None),
        ("/v1/embeddings", None),
        ("", None),
    ],
)
def test_a_pass_through_path_is_known_by_its_end(path: str, route: wire.Route | None) -> None:
    assert wire.by_path(path) is route


def test_an_answer_is_judged_without_litellms_second_copy() -> None:
    value = {"choices": [{"message": {"content": "a", "provider_specific_fields": {"b": "c"}}}]}
    assert wire.answer_bytes(value) == b'{"choices":[{"message":{"content":"a"}}]}'
    assert wire.answer_value({"id": "1", "_hidden_params": {}}) == {"id": "1"}
    rebuilt = wire.rebuild({"id": "1", "_hidden_params": {"x": 1}}, {"id": "2"})
    assert rebuilt == {"id": "2", "_hidden_params": {"x": 1}}
