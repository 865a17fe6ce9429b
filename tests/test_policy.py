from __future__ import annotations

import hashlib
import json
import math
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard_middleware.config import Config, OutputPolicy, Policy, SourcePolicy, parse
from guard_middleware.errors import GuardError, GuardErrorKind, RequestRejected
from guard_middleware.policy import EffectivePolicy, PolicySet, decide, digest, is_bypass
from guard_middleware.policy_explain import explain, to_dict
from guard_middleware.types import Action, Basis, Label, Source, Usage, Verdict

KEY, OTHER_KEY = "sk-made-up-one", "sk-made-up-two"
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
  trusted_proxies: [127.0.0.1/32, 10.1.0.0/16, unix]
  match:
    - {{tenant: acme, policy: strict}}
    - {{api_key_sha256: {hashlib.sha256(KEY.encode()).hexdigest()}, policy: watch}}
"""
POLICIES = PolicySet(parse(CONFIG))


def effective(**rules: Any) -> EffectivePolicy:
    policy = Policy(input=SourcePolicy(**rules), output=OutputPolicy(**rules))
    return EffectivePolicy("p", digest(policy), "default", "", None, policy.input, policy.output, "error")


def verdict(
    request: Label = "unharmful", request_score: float = 0.1, response: Label | None = None, score: float | None = None
) -> Verdict:
    return Verdict(request, response, request_score, score, "it asks about locks", Usage(), "nano", "r1")


@pytest.mark.parametrize(
    ("path", "tenant", "api_key", "peer_trusted", "name", "rule", "recorded"),
    [
        ("/v1/other", None, None, True, "house", "default", None),
        (CHAT, None, None, True, "loose", "route", None),
        (CHAT, "acme", None, True, "strict", "tenant", "acme"),
        (CHAT, "acme", KEY, True, "strict", "tenant", "acme"),
        (CHAT, "acme", None, False, "loose", "route", None),
        (CHAT, "acme", KEY, False, "watch", "api_key", "key:"),
        (CHAT, "unknown", None, True, "loose", "route", "unknown"),
        (CHAT, "unknown", KEY, True, "watch", "api_key", "unknown"),
        (CHAT, None, KEY, False, "watch", "api_key", "key:"),
        (CHAT, None, OTHER_KEY, True, "loose", "route", None),
        (CHAT, None, KEY + " ", True, "loose", "route", None),
        (CHAT, None, "\udcff", True, "loose", "route", None),
        (CHAT, "ACME", None, True, "loose", "route", "ACME"),
        (CHAT + "/", None, None, True, "house", "default", None),
        (CHAT.upper(), None, None, True, "house", "default", None),
        ("/" + CHAT, None, None, True, "house", "default", None),
        ("/lab/v1/x", None, None, True, "watch", "route", None),
        ("/lab/", None, None, True, "watch", "route", None),
        ("/lab", None, None, True, "house", "default", None),
        ("/laboratory", None, None, True, "house", "default", None),
    ],
)
def test_tenant_outranks_key_outranks_route_outranks_default(
    path: str, tenant: str | None, api_key: str | None, peer_trusted: bool, name: str, rule: str, recorded: str | None
) -> None:
    policy = POLICIES.resolve(path=path, tenant=tenant, api_key=api_key, peer_trusted=peer_trusted)
    assert (policy.name, policy.rule) == (name, rule)
    if recorded == "key:":
        assert policy.tenant == f"key:{hashlib.sha256(KEY.encode()).hexdigest()[:12]}"
    else:
        assert policy.tenant == recorded


def test_without_configuration_everything_is_blocked_by_the_built_in_policy() -> None:
    policy = PolicySet(Config()).resolve(path=CHAT, tenant="acme", api_key=KEY, peer_trusted=True)
    assert (policy.name, policy.rule) == ("default", "default")
    for source in get_args(Source):
        harmful = verdict("harmful", 0.9, "harmful", 0.9)
        assert decide(policy, source, harmful, decision_id="d").action is Action.BLOCK
        assert decide(policy, source, GuardError("timeout"), decision_id="d").action is Action.BLOCK


TCP = ("127.0.0.1", 8080)


@pytest.mark.parametrize(
    ("client", "server", "trusted"),
    [
        (("127.0.0.1", 5), TCP, True),
        (("10.1.2.3", 5), TCP, True),
        (("::ffff:10.1.2.3", 5), TCP, True),
        (("10.2.0.1", 5), TCP, False),
        (("::1", 5), TCP, False),
        (("fe80::1%eth0", 5), TCP, False),
        (("testclient", 5), TCP, False),
        (("", 5), TCP, False),
        (None, ("/run/gateway.sock", None), True),
        (None, TCP, False),
        (None, None, False),
    ],
)
def test_which_peers_may_name_their_tenant(
    client: tuple[str, int] | None, server: tuple[str, int | None] | None, trusted: bool
) -> None:
    assert POLICIES.trusts(client, server) is trusted
    identity = POLICIES.identify([(b"x-tenant", b"acme")], client=client, server=server)
    assert identity.tenant == ("acme" if trusted else None)
    assert identity.peer_trusted is trusted


def test_a_unix_socket_is_trusted_only_where_the_file_says_so() -> None:
    policies = PolicySet(parse("tenants: {header: x-tenant, trusted_proxies: [127.0.0.1]}"))
    assert policies.trusts(None, ("/run/gateway.sock", None)) is False


@pytest.mark.parametrize(
    ("headers", "tenant", "api_key"),
    [
        ([], None, None),
        ([(b"authorization", b"Bearer sk-a")], None, "sk-a"),
        ([(b"authorization", b"bearer  sk-a ")], None, "sk-a"),
        ([(b"authorization", b"Basic sk-a")], None, None),
        ([(b"authorization", b"sk-a")], None, None),
        ([(b"authorization", b"Bearer ")], None, None),
        ([(b"x-api-key", b"sk-a")], None, "sk-a"),
        ([(b"api-key", b" sk-a ")], None, "sk-a"),
        ([(b"x-api-key", b"")], None, None),
        ([(b"x-api-key", b"sk-a"), (b"authorization", b"Bearer sk-a"), (b"api-key", b"sk-a")], None, "sk-a"),
        ([(b"x-api-key", b"sk-a"), (b"authorization", b"")], None, "sk-a"),
        ([(b"x-api-key", b"sk-a"), (b"authorization", b"Bearer ")], None, "sk-a"),
        ([(b"x-goog-api-key", b"sk-a"), (b"api_key", b"sk-a")], None, None),
        ([(b"x-tenant", b" acme ")], "acme", None),
        ([(b"x-tenant", b"")], None, None),
        ([(b"x-tenant", b"a\xff")], "a\ufffd", None),
        ([(b"x-other", b"acme"), (b"x-guard-policy", b"loose")], None, None),
    ],
)
def test_who_asks_is_read_from_the_tenants_header_and_those_of_keys_and_no_other(
    headers: list[tuple[bytes, bytes]], tenant: str | None, api_key: str | None
) -> None:
    identity = POLICIES.identify(headers, client=("127.0.0.1", 5), server=TCP)
    assert (identity.tenant, identity.api_key) == (tenant, api_key)


TWO_KEYS = [
    [(b"x-api-key", b"sk-a"), (b"authorization", b"Bearer sk-b")],
    [(b"x-api-key", b"sk-a"), (b"api-key", b"sk-b")],
    [(b"api-key", b"sk-a"), (b"api-key", b"sk-b")],
    [(b"x-api-key", b"sk-a"), (b"authorization", b"Basic sk-a")],
    [(b"x-api-key", b"sk-a"), (b"authorization", b"sk-a")],
]


@pytest.mark.parametrize("headers", TWO_KEYS)
def test_a_request_with_two_keys_is_refused_where_keys_choose_policies(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(RequestRejected, match="more than one key") as caught:
        POLICIES.identify(headers, client=("127.0.0.1", 5), server=TCP)
    assert caught.value.status == 400
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("headers", TWO_KEYS)
def test_two_keys_are_nobodys_matter_where_no_rule_names_one(headers: list[tuple[bytes, bytes]]) -> None:
    PolicySet(parse("{}")).identify(headers, client=("127.0.0.1", 5), server=TCP)


@pytest.mark.parametrize(
    ("name", "value"), [(b"authorization", f"Bearer {KEY}"), (b"x-api-key", KEY), (b"api-key", KEY)]
)
def test_a_keys_policy_applies_in_whatever_header_its_client_sends_it(name: bytes, value: str) -> None:
    identity = POLICIES.identify([(name, value.encode())], client=("192.0.2.1", 5), server=TCP)
    assert POLICIES.resolve(path=CHAT, api_key=identity.api_key).name == "watch"


@pytest.mark.parametrize("name", [b"x-tenant", b"authorization"])
@pytest.mark.parametrize("peer", ["127.0.0.1", "192.0.2.1"])
def test_a_header_that_decides_must_not_be_given_twice(name: bytes, peer: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        POLICIES.identify([(name, b"Bearer a"), (name, b"Bearer a")], client=(peer, 5), server=TCP)
    assert caught.value.status == 400


def test_the_raw_key_is_in_no_representation() -> None:
    identity = POLICIES.identify([(b"authorization", b"Bearer " + KEY.encode())], client=("127.0.0.1", 5), server=TCP)
    policy = POLICIES.resolve(path=CHAT, api_key=identity.api_key)
    text = explain(policy, parse(CONFIG), path=CHAT, api_key_given=True)
    for shown in (repr(identity), repr(policy), json.dumps(to_dict(policy)), text, repr(vars(POLICIES))):
        assert KEY not in shown


@pytest.mark.parametrize(
    ("rules", "outcome", "action", "would", "basis"),
    [
        ({}, verdict(), "allow", "allow", "verdict"),
        ({}, verdict("harmful", 0.9), "block", "block", "verdict"),
        ({}, verdict("harmful", 0.5), "block", "block", "verdict"),
        ({"threshold": 0.7}, verdict("harmful", 0.69), "allow", "allow", "verdict"),
        ({"threshold": 0.7}, verdict("harmful", 0.7), "block", "block", "verdict"),
        ({"threshold": 0.3}, verdict("unharmful", 0.3), "block", "block", "verdict"),
        ({"threshold": 0.3}, verdict("unharmful", 0.29), "allow", "allow", "verdict"),
        # label and score disagree: the worse counts
        ({}, verdict("harmful", 0.1), "block", "block", "verdict"),
        ({}, verdict("unharmful", 0.9), "block", "block", "verdict"),
        ({"on_harmful": "annotate"}, verdict("harmful", 0.9), "annotate", "annotate", "verdict"),
        ({"on_harmful": "annotate"}, verdict(), "allow", "allow", "verdict"),
        ({"on_harmful": "shadow"}, verdict("harmful", 0.9), "allow", "block", "verdict"),
        ({"on_harmful": "shadow"}, verdict(), "allow", "allow", "verdict"),
        ({"on_harmful": "shadow"}, GuardError("timeout"), "block", "block", "error"),
        ({"on_error": "annotate_unscreened"}, GuardError("timeout"), "annotate", "annotate", "error"),
        ({"on_error": "allow_unscreened"}, GuardError("timeout"), "allow", "allow", "error"),
        ({"on_error": "allow_unscreened"}, verdict("harmful", 0.9), "block", "block", "verdict"),
        ({"on_error": "allow_unscreened"}, GuardError("too_long"), "block", "block", "error"),
        ({"on_error": "annotate_unscreened"}, GuardError("media"), "block", "block", "error"),
        ({"on_error": "allow_unscreened", "on_harmful": "shadow"}, GuardError("too_long"), "allow", "allow", "error"),
        # no usable verdict
        ({}, verdict("unharmful", math.nan), "block", "block", "error"),
        ({}, verdict("unharmful", -0.1), "block", "block", "error"),
        ({}, verdict("unharmful", math.inf), "block", "block", "error"),
        ({}, verdict("safe", 0.1), "block", "block", "error"),  # type: ignore[arg-type]
        # a source that is not moderated is not asked about; a verdict that is there counts all the same
        ({"moderate": False}, verdict("harmful", 0.9), "block", "block", "verdict"),
    ],
)
def test_what_policy_makes_of_an_outcome(
    rules: dict[str, Any], outcome: Verdict | GuardError, action: str, would: str, basis: str
) -> None:
    decision = decide(effective(**rules), "input", outcome, decision_id="d1")
    assert (decision.action, decision.would, decision.basis) == (action, would, basis)
    assert (decision.id, decision.source, decision.policy) == ("d1", "input", "p")


@pytest.mark.parametrize(
    ("outcome", "action", "basis"),
    [
        (verdict("harmful", 0.9, "unharmful", 0.1), "allow", "verdict"),
        (verdict("unharmful", 0.1, "harmful", 0.9), "block", "verdict"),
        (verdict("unharmful", 0.1, "harmful", None), "block", "verdict"),
        (verdict("unharmful", 0.1, "unharmful", None), "allow", "verdict"),
        (verdict("unharmful", 0.1), "block", "error"),
    ],
)
def test_an_answer_is_judged_by_its_own_label(outcome: Verdict, action: str, basis: str) -> None:
    decision = decide(effective(), "output", outcome, decision_id="d")
    assert (decision.action, decision.basis) == (action, basis)


POLICY_RULES = st.fixed_dictionaries(
    {
        "on_harmful": st.sampled_from(["block", "annotate", "shadow"]),
        "on_error": st.sampled_from(["block", "annotate_unscreened", "allow_unscreened"]),
        "threshold": st.floats(0.01, 0.99),
        "show_reasoning": st.booleans(),
    }
)
LABELS = st.sampled_from(get_args(Label))
VERDICTS = st.builds(
    verdict, LABELS, st.floats(allow_nan=True), st.none() | LABELS, st.none() | st.floats(0, 1) | st.just(math.nan)
)
ERRORS = st.builds(GuardError, st.sampled_from(list(GuardErrorKind)))


@settings(max_examples=300, deadline=None)
@given(POLICY_RULES, st.sampled_from(get_args(Source)), VERDICTS | ERRORS)
def test_no_harm_passes_a_block_and_no_error_is_ever_a_verdict(
    rules: dict[str, Any], source: Source, outcome: Verdict | GuardError
) -> None:
    policy = effective(**rules)
    decision = decide(policy, source, outcome, decision_id="d")
    assert decision == decide(policy, source, outcome, decision_id="d")
    assert (decision.basis is Basis.VERDICT) == (decision.verdict is not None) == (decision.error is None)
    assert decision.show_reasoning is rules["show_reasoning"]
    if isinstance(outcome, GuardError):
        assert decision.basis is Basis.ERROR
        assert decision.error == outcome.kind.value
    if decision.basis is Basis.ERROR:
        provoked = decision.error in ("too_long", "media") and rules["on_harmful"] == "block"
        assert (decision.action is Action.BLOCK) == (rules["on_error"] == "block" or provoked)
        assert is_bypass(decision) == (decision.action is not Action.BLOCK)
        return
    assert isinstance(outcome, Verdict)
    assert not is_bypass(decision)
    score = outcome.score(source)
    if (score is not None and score >= rules["threshold"]) or (
        outcome.label(source) == "harmful" and rules["threshold"] <= 0.5
    ):
        expected = {"block": Action.BLOCK, "annotate": Action.ANNOTATE, "shadow": Action.ALLOW}
        assert decision.action is expected[rules["on_harmful"]]
        assert decision.would is (Action.BLOCK if rules["on_harmful"] == "shadow" else decision.action)


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), LABELS, st.floats(0, 1))
def test_a_lower_threshold_never_lets_more_through(a: float, b: float, label: Label, score: float) -> None:
    low, high = sorted((a, b))
    if decide(effective(threshold=low), "input", verdict(label, score), decision_id="d").action is Action.ALLOW:
        assert decide(effective(threshold=high), "input", verdict(label, score), decision_id="d").action is Action.ALLOW


def _digest(text: str) -> str:
    return PolicySet(parse(text)).resolve(path="/").digest


BASE = "policies: {default: {input: {threshold: 0.3, deadline: 2s}, block_style: soft}}"


@pytest.mark.parametrize(
    "text",
    [
        "policies: {default: {block_style: soft, input: {deadline: 2000ms, threshold: 0.30}}}",
        BASE + "\nlimits: {images: 3}",
        "policies: {p: {block_style: soft, input: {deadline: 2s, threshold: 0.3}}}\ndefault_policy: p",
        "policies: {default: {input: {threshold: 0.3, deadline: 2s, on_error: block}, output: {}, block_style: soft}}",
    ],
)
def test_the_digest_is_the_same_however_the_policy_is_written(text: str) -> None:
    assert _digest(text) == _digest(BASE)


@pytest.mark.parametrize(
    "change",
    [
        {"moderate": False},
        {"on_harmful": "shadow"},
        {"on_error": "allow_unscreened"},
        {"threshold": 0.51},
        {"deadline": 9.0},
        {"show_reasoning": True},
        {"reader": True},
        {"mode": "label"},
        {"mode": "hybrid", "think_between": (0.1, 0.9)},
        {"mode": "hybrid", "think_between": (0.1, 0.8)},
    ],
)
def test_every_rule_changes_the_digest(change: dict[str, Any]) -> None:
    digests = {
        digest(Policy()),
        digest(Policy(input=SourcePolicy(**change))),
        digest(Policy(output=OutputPolicy(**change))),
    }
    assert len(digests) == 3
    assert set(change) <= set(SourcePolicy.model_fields)


def test_the_digest_of_the_default_policy_is_pinned() -> None:
    # Records of past decisions name it: change it knowingly, with the version inside the digest.
    assert digest(Policy()) == "deff85ebd12f7fd09f26bd3ff0b994a27ef8a7c65e8263959d5f790fcaf5ed62"
