from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from guard_middleware import strictyaml
from guard_middleware.config import BUILT_IN_POLICY, Config, LimitsSection, OutputPolicy, SourcePolicy, load, parse
from guard_middleware.errors import ConfigError
from guard_middleware.limits import Limits

DOCS = Path(__file__).parents[1] / "docs" / "policy.md"


def test_an_empty_file_is_the_default_configuration() -> None:
    assert parse("") == parse("# nothing\n") == Config()


def test_the_default_blocks_harm_and_errors_on_both_sources() -> None:
    policy = Config().policies[Config().default_policy]
    for rules in (policy.input, policy.output):
        assert (rules.moderate, rules.on_harmful, rules.on_error) == (True, "block", "block")
        assert rules.show_reasoning is False
    assert (policy.input.deadline, policy.output.deadline) == (10.0, 20.0)


def test_a_file_is_read_to_frozen_values() -> None:
    config = parse(
        """
version: 1
upstream: {url: "http://127.0.0.1:8000/v1/", headers_from_env: {Authorization: UPSTREAM_AUTH}}
worker: {model: nano, threads: 2, socket: /run/guard.sock}
limits: {body_bytes: 20MB, image_bytes: 1MiB, fetch_seconds: 500ms, choices: 2}
images: {fetch: false, allow: ["Images.corp:443", "[::1]:8080"]}
dialects: {chat_completions: {extra_fields: {documents: moderated, trace: opaque}}}
policies:
  watch: {input: {on_harmful: shadow, on_error: allow_unscreened}, output: {deadline: 1m, threshold: 0.7}}
default_policy: watch
routes: [{path: /v1/chat/completions, policy: default}, {path: /internal/*, policy: watch}]
tenants:
  header: X-Tenant
  trusted_proxies: [10.0.0.0/8, "::1", unix]
  match: [{tenant: acme, policy: watch}, {api_key_sha256: %s, policy: default}]
telemetry: {service_name: guard}
audit: {path: decisions.jsonl, redact: [{pattern: '[0-9]{16}', replacement: '[card]'}]}
"""
        % ("AB" * 32)
    )
    assert config.upstream.url == "http://127.0.0.1:8000/v1"
    assert dict(config.upstream.headers_from_env) == {"authorization": "UPSTREAM_AUTH"}
    assert config.limits == Limits(body_bytes=20_000_000, image_bytes=2**20, fetch_seconds=0.5, choices=2)
    assert config.images.allow == ("images.corp:443", "[::1]:8080")
    assert config.policies["watch"].output == OutputPolicy(deadline=60.0, threshold=0.7)
    assert config.tenants.header == "x-tenant"
    assert config.tenants.trusted_proxies == ("10.0.0.0/8", "::1/128", "unix")
    assert config.tenants.match[1].api_key_sha256 == "ab" * 32
    with pytest.raises(ValidationError):
        config.default_policy = "default"  # type: ignore[misc]


def test_the_built_in_policy_is_there_beside_an_operators_own_and_may_be_replaced() -> None:
    assert parse("policies: {mine: {}}").policies[BUILT_IN_POLICY].input == SourcePolicy()
    assert parse("policies: {default: {block_style: soft}}").policies[BUILT_IN_POLICY].block_style == "soft"


@pytest.mark.parametrize(
    ("text", "managed"),
    [
        ("", True),
        ("worker: {socket: /run/guard.sock}", True),
        ("worker: {socket: /run/guard.sock, manage: false}", False),
        ('worker: {url: "http://127.0.0.1:8900"}', False),
        ('worker: {url: "http://127.0.0.1:8900", manage: false}', False),
    ],
)
def test_the_gateway_starts_the_worker_unless_it_is_started_elsewhere(text: str, managed: bool) -> None:
    assert parse(text).worker.managed is managed


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("2s", 2.0), ("1.5s", 1.5), ("10m", 600.0), ("1ms", 0.001)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse(f"limits: {{body_seconds: {text}}}").limits.body_seconds == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("20MB", 20_000_000), ("8MiB", 8 * 2**20), ("512 kB", 512_000), ("1.5KiB", 1536)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse(f"limits: {{body_bytes: {text}}}").limits.body_bytes == size


def test_python_callers_may_give_durations_in_seconds() -> None:
    assert SourcePolicy(deadline=2.0).deadline == 2.0
    with pytest.raises(ValidationError):
        SourcePolicy(deadline=0.0)


def test_an_alias_repeats_a_value() -> None:
    config = parse("policies:\n  a: {input: &strict {threshold: 0.2}}\n  b: {input: *strict}\n")
    assert config.policies["a"] == config.policies["b"]


POLICY = "policies:\n  p:\n    input:\n      "
BROKEN = [
    # keys
    ("polices: {}", 1, "unknown key `polices`", "did you mean `policies`"),
    (POLICY + "threshhold: 0.5", 4, "unknown key `threshhold` in policies.p.input", "did you mean `threshold`"),
    (POLICY + "zzz: 0.5", 4, "unknown key `zzz`", "choose from moderate, on_harmful"),
    ("version: 1\nlimits:\n  body_bites: 1", 3, "unknown key `body_bites` in limits", "did you mean `body_bytes`"),
    ("policies: {p: {output: {stream: {mode: async}}}}", 1, "async shows text before its verdict", "leak_bound: 1000"),
    ("policies: {p: {output: {stream: {leak_bound: 9}}}}", 1, "no effect in mode hold", "remove it"),
    (POLICY + "mode: hybird", 4, "('hybird')", "did you mean `hybrid`"),
    (POLICY + "mode: hybrid", 4, "say which", "think_between: [0.1, 0.9]"),
    (POLICY + "think_between: [0.1, 0.9]", 4, "no effect in mode reason", "remove it"),
    (POLICY + "mode: label\n      think_between: [0.1, 0.9]", 5, "no effect in mode label", "remove it"),
    (POLICY + "mode: hybrid\n      think_between: [0.9, 0.1]", 5, "no range of scores", "the lower score first"),
    (POLICY + "mode: hybrid\n      think_between: [0.5, 0.5]", 5, "no range of scores", "the lower score first"),
    (POLICY + "mode: hybrid\n      think_between: [0.1, 1.1]", 5, "no range of scores", "the lower score first"),
    (POLICY + "mode: hybrid\n      think_between: 0.1", 5, "not a list", "two scores"),
    (POLICY + "mode: label\n      show_reasoning: true", 5, "there is none", "remove it"),
    ("policies: {p: {output: {stream: {overlap: 200}}}}", 1, "more than half of the first window", "lower overlap"),
    ("policies: {p: {output: {stream: {last_window: 20}}}}", 1, "shorter than the first", "raise last_window"),
    ("dialects: {realtime: {}}", 1, "unknown key `realtime` in dialects", "chat_completions"),
    ("version: 1\nimages: {}\nversion: 1", 3, "`version` is given twice (first on line 1)", "keep one"),
    (
        POLICY + "threshold: 0.5\n      reader: true\n      threshold: 0.9",
        6,
        "given twice (first on line 4)",
        "keep one",
    ),
    ("1: x", 1, "a key that is not text", "quotes"),
    ("null: x", 1, "a key that is not text", "quotes"),
    ("on: x", 1, "`on` is true or false in one YAML version", "quote it"),
    ("? [a, b]\n: c", 1, "a key that is not text", "quotes"),
    ("policies:\n  'two words': {}", 2, "not in the form", "letters, digits"),
    # whole file
    ("- a", 1, "not a mapping", "sections"),
    ("just text", 1, "not a mapping", "sections"),
    ("policies:", 1, "policies is empty", "name: {input, output}"),
    ("version: 2", 1, "version: not one of the choices (2)", "the only version"),
    ("policies: []", 1, "policies: not a mapping", "name: {input, output}"),
    # policy values
    (POLICY + "threshold: 1.01", 4, "too large (1.01)", "between 0 and 1"),
    (POLICY + "threshold: 1", 4, "too large (1)", "moderate: false"),
    (POLICY + "threshold: 0", 4, "too small (0)", "between 0 and 1"),
    (POLICY + "threshold: high", 4, "not a number ('high')", "between 0 and 1"),
    (POLICY + "threshold: '0.5'", 4, "not a number ('0.5')", "between 0 and 1"),
    (POLICY + "threshold: .nan", 4, "a number in a form", "plain decimal"),
    (POLICY + "deadline: 0s", 4, "too small", "more than 0"),
    (POLICY + "deadline: 11m", 4, "too large", "at most 10m"),
    (POLICY + "deadline: 2", 4, "not a duration", "500ms, 2s or 1m"),
    (POLICY + "deadline: -2s", 4, "not a duration", "500ms, 2s or 1m"),
    (POLICY + "deadline: 2 seconds", 4, "not a duration", "500ms, 2s or 1m"),
    (POLICY + "deadline: 1:30", 4, "a number in a form", "plain decimal"),
    (POLICY + "deadline: true", 4, "deadline: not a", "such as 2s"),
    (POLICY + "on_harmful: blok", 4, "('blok')", "did you mean `block`"),
    (POLICY + "on_harmful: allow", 4, "('allow')", "block, annotate or shadow"),
    (POLICY + "on_error: allow", 4, "('allow')", "did you mean `allow_unscreened`"),
    (POLICY + "show_reasoning: yes", 4, "`yes` is true or false in one YAML version", "write true, false"),
    (POLICY + "show_reasoning: 1", 4, "neither true nor false (1)", "true or false"),
    (POLICY + "reader: auto", 4, "neither true nor false ('auto')", "left out"),
    (POLICY + "moderate: false\n      threshold: 0.4", 5, "no effect beside moderate: false", "remove threshold"),
    ("policies: {p: {block_style: sof}}", 1, "('sof')", "did you mean `soft`"),
    # references and rules
    ("version: 1\ndefault_policy: strict", 2, "the policy `strict` is not defined", "choose from default"),
    ("policies: {strict: {}}\nroutes:\n- {path: /v1, policy: strct}", 3, "`strct` is not defined", "`strict`"),
    ("tenants:\n  header: x-t\n  match:\n  - tenant: a\n    policy: nope", 5, "`nope` is not defined", "choose from"),
    ("routes:\n- path: /v1\n", 2, "`policy` is missing in routes[0]", "name of a policy"),
    ("routes:\n- {path: v1, policy: default}", 2, "not a path", "/v1/chat/completions"),
    ("routes:\n- {path: '/v1/*/x', policy: default}", 2, "not a path", "ends in /*"),
    ("routes:\n- {path: '/v1?x', policy: default}", 2, "not a path", "ends in /*"),
    ("routes:\n- {path: /v1/../x, policy: default}", 2, "dot segments", "lead to"),
    ("routes:\n- {path: '/v1/*', policy: default}\n- {path: /v1/x, policy: default}", 3, "never apply", "first"),
    ("routes:\n- {path: /a, policy: default}\n- {path: /a, policy: default}", 3, "never apply", "first"),
    # tenants
    ("tenants:\n  match:\n  - {tenant: acme, policy: default}", 3, "can never match", "tenants.header"),
    ("tenants:\n  header: x-t\n  match:\n  - {tenant: 42, policy: default}", 4, "not text (42)", "in quotes"),
    ("tenants:\n  header: x-t\n  match:\n  - {tenant: no, policy: default}", 4, "`no` is true or false", "quote it"),
    ("tenants:\n  match:\n  - {policy: default}", 3, "exactly one of", "one rule for each"),
    (
        "tenants:\n  header: x-t\n  match:\n  - {tenant: a, policy: default}\n  - {tenant: a, policy: default}",
        5,
        "second rule",
        "keep one",
    ),
    ("tenants:\n  header: x tenant", 2, "not a header name", "x-tenant"),
    ("tenants:\n  header: Authorization", 2, "a header that clients set", "x-tenant"),
    ("tenants:\n  header: X-Guard-Tenant", 2, "that is stripped", "x-tenant"),
    ("tenants:\n  trusted_proxies:\n  - 10.0.0.1/8", 3, "not a network", "did you mean 10.0.0.0/8"),
    ("tenants:\n  trusted_proxies:\n  - localhost", 3, "not a network", "CIDR"),
    ("tenants:\n  trusted_proxies: ['0.0.0.0/0']", 2, "holds every address", "name your proxies"),
    # places
    ("upstream: {url: 'ftp://host/v1'}", 1, "not an http(s) URL", "http://127.0.0.1:8000/v1"),
    ("upstream: {url: 'http://host:99999'}", 1, "not an http(s) URL", "http://127.0.0.1:8000/v1"),
    ("upstream: {url: 'https://${HOST}/v1'}", 1, "not an http(s) URL", "http://127.0.0.1:8000/v1"),
    ("upstream: {url: 'http://host/v1?x=1'}", 1, "more than scheme", "http://127.0.0.1:8000/v1"),
    ("upstream: {url: 'http://ok\\evil/'}", 1, "not an http(s) URL", "http://127.0.0.1:8000/v1"),
    ("upstream:\n  headers_from_env:\n    Host: X", 3, "the gateway's own", "remove it"),
    ("upstream:\n  headers_from_env:\n    X-A: A\n    x-a: B", 4, "given twice", "keep one"),
    ("worker:\n  url: http://a:1\n  socket: /s", 2, "both `url` and `socket`", "keep one"),
    ("worker:\n  url: http://a:1\n  manage: true", 3, "started elsewhere", "manage: false"),
    ("worker:\n  url: http://a:1\n  threads: 2", 3, "no effect", "remove it"),
    ("worker:\n  manage: false", 2, "nobody starts", "socket or url"),
    ("worker:\n  url: http://a:1\n  options: [--engine, vllm]", 3, "no effect", "remove them"),
    ("worker: {options: [--max-batch, '4', --socket=/tmp/a]}", 1, "the gateway's own", "the keys beside it"),
    ("worker: {weights: {golden: a.jsonl}}", 1, "`directory` is missing", "the folder that holds the revisions"),
    ("worker: {url: 'http://a:1', weights: {directory: w}}", 1, "started elsewhere", "change what listens there"),
    ("worker: {socket: a, manage: false, weights: {directory: w}}", 1, "started elsewhere", "what listens there"),
    ("worker: {socket: a, weights: {directory: w}}", 1, "needs its own", "remove it"),
    ("worker: {weights: {directory: w, shadow: 2}}", 1, "too large (2)", "from 0 to 1"),
    ("worker: {weights: {directory: w, keep: 10}}", 1, "not an age", "12h or 7d"),
    ("worker: {threads: 0}", 1, "too small (0)", "1 to 256"),
    ("worker: {threads: 1.5}", 1, "not a whole number (1.5)", "1 to 256"),
    ("worker: {model: ''}", 1, "too short", "nano"),
    ("images:\n  allow:\n  - a:1\n  - https://a", 4, "not host:port", "without scheme"),
    ("images: {allow: '*:443'}", 1, "not a list", "a list of host:port"),
    ("images: {allow: ['*:443']}", 1, "not host:port", "wildcard"),
    ("dialects: {chat_completions: {extra_fields: {x: opaqe}}}", 1, "('opaqe')", "did you mean `opaque`"),
    # limits
    ("limits: {body_bytes: 0}", 1, "too small (0)", "more than 0"),
    ("limits: {body_bytes: 20M}", 1, "not a size", "20MB"),
    ("limits: {images: 2.5}", 1, "not a whole number (2.5)", "whole number"),
    ("limits: {json_depth: 5000}", 1, "too large (5000)", "1 to 256"),
    ("limits: {image_max_aspect: 0.5}", 1, "too small (0.5)", "from 1"),
    ("limits:\n  image_max_side: 10\n  image_min_side: 20", 3, "longer than the longest", "swap"),
    ("limits: {images: 0x10}", 1, "a number in a form", "plain decimal"),
    ("limits: {images: 010}", 1, "a number in a form", "plain decimal"),
    # record
    ("audit: {redact: [{pattern: '('}]}", 1, "not a regular expression", "quoted"),
    ("audit: {redact: [{pattern: 'a+', replacement: '\\1'}]}", 1, "replacement that cannot be used", "backslash"),
    ("audit: {hmac_key_env: null}", 1, "audit.hmac_key_env is empty", "NAME"),
    ("audit: {redact: [{pattern: 'a*'}]}", 1, "matches the empty text", "use +"),
    ("telemetry: {capture_content: on}", 1, "`on` is true or false", "write true"),
    # YAML itself
    ("a: [1, 2", 1, "not YAML", "check indentation"),
    ("version: 1\n\timages: {}", 2, "not YAML", "spaces, not tabs"),
    ("version: 1\n---\nversion: 1", 2, "not YAML", "one document"),
    ("a: *x", 1, "undefined alias", "above its first use"),
    ("version: 1\na: \x07", 2, "a control character", "UTF-8"),
    ("a: !!python/object/apply:os.system [id]", 1, "the tag `!!python/object/apply:os.system`", "remove the tag"),
    ("a: !!set {x: null}", 1, "the tag `!!set`", "remove the tag"),
    ("a: 2024-01-01", 1, "a bare date", "quote it"),
    ("a: &a\n  b: 1\nc:\n  <<: *a", 4, "merge keys", "alias"),
    ("a: &a [*a]", 1, "nested too deeply", "no alias"),
    ("a: " + "[" * 5000, None, "nested too deeply", "at most"),
    ("#" * (strictyaml.MAX_CHARS + 1), None, "more than 262144 characters", "right file"),
]


@pytest.mark.parametrize(("text", "line", "message", "remedy"), BROKEN)
def test_a_broken_configuration_names_the_line_and_the_remedy(
    text: str, line: int | None, message: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, path="guard.yaml")
    error = caught.value
    assert error.line == line
    assert message in str(error)
    assert remedy in error.remedy
    assert str(error).startswith(f"guard.yaml:{line}: " if line else "guard.yaml: ")


def test_every_problem_is_mentioned_and_the_first_one_told() -> None:
    with pytest.raises(ConfigError, match=r"then see lines 3, 5") as caught:
        parse("versoin: 1\nimages:\n  fetch: 1\nlimits:\n  images: 0\n")
    assert caught.value.line == 1


@pytest.mark.parametrize(
    "text",
    [
        "tenants: {match: [{api_key_sha256: sk-hidden, policy: default}]}",
        "tenants: {match: [{api_key_sha256: 7777777, policy: default}]}",
        "upstream: {url: 'http://user:sk-hidden@host/v1'}",
        "upstream: {headers_from_env: {authorization: 'Bearer sk-hidden'}}",
        "audit: {hmac_key_env: sk-hidden}",
    ],
)
def test_what_may_be_a_secret_is_never_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "hidden" not in str(caught.value)
    assert "7777777" not in str(caught.value)


def test_aliases_cannot_multiply_without_bound() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(ConfigError, match="more than 20000 values"):
        parse(bomb)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"#?,%@ \n\t0.~<"), max_size=60) | st.text(max_size=30))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse(text), Config)


def test_load_reads_a_file(tmp_path: Path) -> None:
    file = tmp_path / "guard.yaml"
    file.write_text("default_policy: ünknown\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"{file}:1: ")):
        load(str(file))


@pytest.mark.parametrize(
    ("data", "line", "message"),
    [
        (b"version: 1\n# \xff", 2, "not UTF-8"),
        ("version: 1".encode("utf-16"), 1, "not UTF-8"),
        (b"x" * 2**21, None, "more"),
    ],
)
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, data: bytes, line: int | None, message: str) -> None:
    file = tmp_path / "guard.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        load(str(file))
    assert caught.value.line == line


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(tmp_path / name))


def test_the_command_line_may_name_another_upstream() -> None:
    config = parse("upstream: {headers_from_env: {authorization: A}}").with_upstream("http://127.0.0.1:1/v1")
    assert config.upstream.url == "http://127.0.0.1:1/v1"
    assert dict(config.upstream.headers_from_env) == {"authorization": "A"}
    with pytest.raises(ConfigError, match=r"--upstream: upstream.url: not an http\(s\) URL -- write scheme"):
        Config().with_upstream("127.0.0.1:8000")


def _keys(section: type[BaseModel]) -> set[str]:
    found = set(section.model_fields)
    for field in section.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= _keys(kind)
    return found


def test_every_limit_can_be_configured() -> None:
    assert set(LimitsSection.model_fields) == {field.name for field in dataclasses.fields(Limits)}


def test_the_reference_in_the_documentation_is_the_default_and_names_every_key() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    reference = next(block for block in blocks if block.startswith("# Every key"))
    assert parse(reference) == Config()
    missing = {key for key in _keys(Config) | _keys(LimitsSection) if not re.search(rf"\b{key}:", reference)}
    assert missing == set()
    for block in blocks:
        parse(block)
