"""What a policy does to a request, in words and in JSON: ``guard-gateway policy explain``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from guard_middleware.config import Config, OutputPolicy, SourcePolicy
from guard_middleware.policy import EffectivePolicy
from guard_middleware.types import Source

_BLOCKED: dict[tuple[Source, str], str] = {
    ("input", "error"): "BLOCK: 400 content_filter; the upstream is not called",
    ("input", "soft"): "BLOCK: 200 with a refusal as the answer; the upstream is not called",
    ("output", "error"): "BLOCK: finish_reason content_filter and a refusal; nothing of the answer is released",
    ("output", "soft"): "BLOCK: 200 with a refusal as the answer; nothing of the answer is released",
}
_HARMFUL = {
    "annotate": "annotate: passes, with the verdict in `moderation`",
    "shadow": "shadow: passes unchanged; the verdict and what it would have done are recorded",
}
_ERROR = {
    "block": "BLOCK: 503 guard_unavailable",
    "annotate_unscreened": "PASSES UNSCREENED, with the error in `moderation`; counted as a bypass",
    "allow_unscreened": "PASSES UNSCREENED; counted as a bypass",
}
_STREAM = {
    "hold": "after its last verdict",
    "window": "window by window, each after its verdict",
    "async": "at once, and is cut at a harmful verdict",
}
_SOURCES: tuple[tuple[Source, str], ...] = (("input", "requests"), ("output", "answers"))


def explain(
    policy: EffectivePolicy,
    config: Config,
    *,
    path: str,
    tenant: str | None = None,
    api_key_given: bool = False,
    peer_trusted: bool = False,
) -> str:
    """The effective policy of a request, for a human: what happens, why this policy, and what is left unguarded."""
    ignored = "" if peer_trusted or tenant is None else " (ignored: the peer is not in tenants.trusted_proxies)"
    rows = [
        ("request", f"path {path}"),
        ("", f"tenant {tenant}{ignored}" if tenant is not None else "no tenant"),
        ("", "an API key" if api_key_given else "no API key"),
        ("policy", f"{policy.name} (digest {policy.digest[:12]})"),
        ("chosen by", policy.reason),
        *(row for source, what in _SOURCES for row in _source_rows(policy, source, what)),
    ]
    warnings = [*_policy_warnings(policy), *_config_warnings(config)]
    rows += [("warning" if i == 0 else "", warning) for i, warning in enumerate(warnings)]
    return "\n".join(f"{left:<10} {right}".rstrip() for left, right in rows) + "\n"


def to_dict(policy: EffectivePolicy) -> dict[str, Any]:
    """The effective policy of a request, for a script: plain JSON."""
    return {
        "policy": policy.name,
        "digest": policy.digest,
        "rule": policy.rule,
        "reason": policy.reason,
        "tenant": policy.tenant,
        "block_style": policy.block_style,
        "race": policy.race,
        "input": policy.input.model_dump(),
        "output": policy.output.model_dump(),
        "warnings": list(_policy_warnings(policy)),
    }


def _source_rows(policy: EffectivePolicy, source: Source, what: str) -> Iterable[tuple[str, str]]:
    rules = policy.source(source)
    if not rules.moderate:
        yield source, f"UNGUARDED: {what} pass without a verdict (moderate: false)"
        return
    harmful = _HARMFUL.get(rules.on_harmful) or _BLOCKED[source, policy.block_style]
    reader = {None: "as the guard model's default says", True: "yes", False: "no"}[rules.reader]
    yield source, f"harmful (score {rules.threshold:g} or more): {harmful}"
    yield from _judges(rules)
    yield "", f"guard error or no verdict in {rules.deadline:g} s: {_ERROR[rules.on_error]}"
    yield "", f"the guard thinks: {_thinks(rules)}"
    yield "", f"text drawn in images is read: {reader}"
    if isinstance(rules, OutputPolicy):
        yield "", f"a stream leaves {_STREAM[rules.stream.mode]}"
    elif policy.race:
        yield "", "the upstream is called at the same time; nothing is shown before the verdict (race: true)"
    yield "", f"reasoning: in trace and record{', AND SHOWN TO THE CLIENT' if rules.show_reasoning else ', not shown'}"


def _thinks(rules: SourcePolicy) -> str:
    if rules.think_between is not None:
        low, high = rules.think_between
        return f"where the label's score is from {low:g} to {high:g} (mode: hybrid)"
    return "always (mode: reason)" if rules.mode == "reason" else "never, it gives its label at once (mode: label)"


def _judges(rules: SourcePolicy) -> Iterable[tuple[str, str]]:
    if rules.ensemble is None:
        return
    names = ", ".join(rules.ensemble.of)
    if rules.ensemble.confident is not None:
        low, high = rules.ensemble.confident
        yield "", f"judged by {names} in order, until one scores at most {low:g} or at least {high:g}"
    else:
        every = "any one finds it harmful" if rules.ensemble.rule == "any" else "all of them find it harmful"
        yield "", f"judged by {names}: harmful where {every}"


def _policy_warnings(policy: EffectivePolicy) -> Iterable[str]:
    for source, what in _SOURCES:
        rules = policy.source(source)
        if not rules.moderate:
            yield f"{source} is UNGUARDED: moderate is false"
            continue
        if rules.on_error != "block":
            yield f"{source} fails OPEN: when the guard is down, slow or wrong, {what} pass unscreened"
        if rules.on_harmful != "block":
            yield f"{source} does not block: harmful {what} pass ({rules.on_harmful})"
        if rules.on_harmful == "shadow" and rules.on_error == "block":
            yield f"{source} is in shadow, yet a guard error still blocks (on_error: block)"
        if isinstance(rules, OutputPolicy) and rules.stream.mode == "async":
            yield f"streams show up to {rules.stream.leak_bound} characters before their verdict (stream.mode: async)"
        if rules.think_between is not None and not rules.think_between[0] <= rules.threshold <= rules.think_between[1]:
            yield f"{source} threshold {rules.threshold:g} is outside think_between: nothing next to it is thought"
        if rules.ensemble is not None and rules.ensemble.rule == "all" and len(rules.ensemble.of) > 1:
            yield f"{source} passes what one of {', '.join(rules.ensemble.of)} does not find harmful (ensemble: all)"
        if rules.threshold > 0.5:
            yield f"{source} threshold {rules.threshold:g}: below it, what the guard calls harmful passes"


def _config_warnings(config: Config) -> Iterable[str]:
    for dialect, section in config.dialects:
        for name, kind in sorted(section.extra_fields.items()):
            if kind == "opaque":
                yield f"the field `{name}` of {dialect} passes UNREAD (opaque)"
    if config.telemetry.capture_content:
        yield "spans carry prompts and answers in clear (telemetry.capture_content)"
    if config.audit.capture_content:
        yield "records carry prompts and answers in clear (audit.capture_content)"
