from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from guard_middleware.config import parse
from guard_middleware.policy import PolicySet
from guard_middleware.policy_explain import explain, to_dict

CHAT = "/v1/chat/completions"
CONFIG = f"""
policies:
  house: {{}}
  strict: {{input: {{threshold: 0.2}}}}
  loose: {{input: {{on_harmful: annotate}}}}
  watch: {{input: {{on_harmful: shadow, on_error: allow_unscreened}}}}
default_policy: house
routes:
  - {{path: {CHAT}, policy: loose}}
  - {{path: /lab/*, policy: watch}}
tenants:
  header: X-Tenant
  trusted_proxies: [127.0.0.1/32]
  match: [{{tenant: acme, policy: strict}}]
"""


def told(text: str, **facts: Any) -> str:
    config = parse(text)
    policy = PolicySet(config).resolve(
        path=CHAT, tenant=facts.get("tenant"), peer_trusted=facts.get("peer_trusted", False)
    )
    return explain(policy, config, path=CHAT, **facts)


def test_explain_tells_what_happens_and_why() -> None:
    text = told(CONFIG, tenant="acme", peer_trusted=True)
    assert "policy     strict (digest " in text
    assert "chosen by  tenant `acme`, named in x-tenant by a trusted peer" in text
    assert "harmful (score 0.2 or more): BLOCK: 400 content_filter; the upstream is not called" in text
    assert "guard error or no verdict in 10 s: BLOCK: 503 guard_unavailable" in text
    assert "harmful (score 0.5 or more): BLOCK: finish_reason content_filter" in text
    assert "warning" not in text


def test_explain_says_that_an_untrusted_tenant_is_ignored() -> None:
    text = told(CONFIG, tenant="acme", peer_trusted=False)
    assert "ignored: the peer is not in tenants.trusted_proxies" in text
    assert f"the route {CHAT}" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("policies: {default: {output: {moderate: false}}}", "output is UNGUARDED"),
        ("policies: {default: {output: {moderate: false}}}", "UNGUARDED: answers pass without a verdict"),
        ("policies: {default: {input: {on_error: allow_unscreened}}}", "input fails OPEN"),
        ("policies: {default: {input: {on_error: allow_unscreened}}}", "PASSES UNSCREENED; counted as a bypass"),
        ("policies: {default: {input: {on_error: annotate_unscreened}}}", "input fails OPEN"),
        ("policies: {default: {input: {on_harmful: annotate}}}", "input does not block"),
        ("policies: {default: {output: {on_harmful: shadow}}}", "a guard error still blocks"),
        ("policies: {default: {input: {threshold: 0.8}}}", "threshold 0.8"),
        ("policies: {default: {input: {show_reasoning: true}}}", "SHOWN TO THE CLIENT"),
        ("policies: {default: {block_style: soft}}", "200 with a refusal"),
        ("policies: {default: {input: {mode: label}}}", "never, it gives its label at once (mode: label)"),
        (
            "policies: {default: {output: {mode: hybrid, think_between: [0.1, 0.9]}}}",
            "where the label's score is from 0.1 to 0.9 (mode: hybrid)",
        ),
        (
            "policies: {default: {output: {mode: hybrid, think_between: [0.6, 0.9]}}}",
            "output threshold 0.5 is outside think_between",
        ),
        (
            "dialects: {chat_completions: {extra_fields: {trace: opaque, docs: moderated}}}",
            "`trace` of chat_completions",
        ),
        ("telemetry: {capture_content: true}", "spans carry prompts"),
        ("audit: {capture_content: true}", "records carry prompts"),
    ],
)
def test_explain_names_everything_that_is_left_open(text: str, words: str) -> None:
    assert words in told(text)
    assert words not in told("")


def test_the_effective_policy_is_plain_json() -> None:
    policy = PolicySet(parse(CONFIG)).resolve(path="/lab/x")
    value = json.loads(json.dumps(to_dict(policy)))
    assert (value["policy"], value["rule"], value["digest"]) == ("watch", "route", policy.digest)
    assert value["input"]["on_error"] == "allow_unscreened"
    assert any("fails OPEN" in warning for warning in value["warnings"])
    assert to_dict(replace(policy, tenant="x"))["tenant"] == "x"
