"""What LiteLLM's parameters mean, and that what is wrong raises the one error that keeps a proxy from starting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guard_integrations.litellm import settings
from guard_integrations.litellm.settings import Settings
from guard_middleware.config import Config

#: what LiteLLM passes to every guardrail
VENDORS = {"fail_on_error": True, "action": "block", "confidence_threshold": 0.5, "mask": False, "version": 2}


@pytest.mark.parametrize(
    ("mode", "input", "output", "race"),
    [
        (["pre_call", "post_call"], True, True, False),
        ("pre_call", True, False, False),
        ("post_call", False, True, False),
        (["during_call", "post_call"], True, True, True),
        (["pre_call", "during_call", "post_call", "pre_mcp_call"], True, True, False),
    ],
)
def test_mode_chooses_the_sources(mode: Any, input: bool, output: bool, race: bool) -> None:
    made = Settings.of(mode, VENDORS)
    policy = made.config.policies["default"]
    assert (policy.input.moderate, policy.output.moderate, policy.race) == (input, output, race)
    assert (made.input, made.output) == (input, output)


@pytest.mark.parametrize(
    ("mode", "options", "says"),
    [
        ("logging_only", {}, "write mode: \\[pre_call, post_call\\]"),
        ({"tags": {"a": "pre_call"}}, {}, "mode by tags"),
        ([], {}, "mode has nothing"),
        ("pre_call", {"guard_confg": "x"}, "guard_confg: choose from guard_config"),
        ("pre_call", {"guard_config": 3}, "write the path of guard.yaml"),
        ("pre_call", {"guard_config": "nowhere.yaml"}, "cannot be read"),
        ("pre_call", {"guard_unread": "aembedding"}, "not a list"),
        ("pre_call", {"run_in_parallel": True}, "race: true"),
        ("pre_call", {"scan_raw_request": True}, "race: true"),
    ],
)
def test_what_is_wrong_raises_a_runtime_error_with_the_remedy(mode: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        Settings.of(mode, {**VENDORS, **options})


def test_the_environment_names_the_file_where_the_parameter_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "guard.yaml"
    file.write_text("default_policy: strict\npolicies: {strict: {}}\n")
    monkeypatch.setenv(settings.CONFIG_ENV, str(file))
    assert settings.load().default_policy == "strict"
    assert settings.load() != Config()


def test_a_tenant_that_could_never_be_believed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "guard.yaml"
    file.write_text(
        "policies: {strict: {}}\n"
        "tenants: {header: x-tenant, trusted_proxies: [10.0.0.0/8], match: [{tenant: 'key:a', policy: strict}]}\n"
    )
    with pytest.raises(RuntimeError, match="trusted_proxies"):
        Settings.of("pre_call", {"guard_config": str(file)})
