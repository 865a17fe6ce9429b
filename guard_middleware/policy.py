"""Which policy applies to a request, and what it makes of a verdict. Pure: no I/O, no clock, no raw key kept.

Precedence is tenant header (from a trusted peer), then API key, then route, then ``default_policy``. What the
operator's own auth layer says wins over what the client brings, and a path, which any client can choose, never
loosens what is set for its tenant. Nothing in a request's body, and no other header, takes part.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from guard_middleware.config import Config, OutputPolicy, Policy, SourcePolicy, path_matches
from guard_middleware.errors import GuardError, GuardErrorKind, RejectKind, RequestRejected
from guard_middleware.types import Action, Basis, Decision, Source, Verdict

#: errors that content causes, and so whoever writes it can cause at will
PROVOKED = (GuardErrorKind.TOO_LONG, GuardErrorKind.MEDIA)

#: what clients of the APIs that are spoken here carry their keys in; an upstream may take any of them
CREDENTIALS = (b"authorization", b"api-key", b"x-api-key")

Rule = Literal["tenant", "api_key", "route", "default"]


@dataclass(frozen=True, slots=True)
class EffectivePolicy:
    """The policy of one request. ``reason`` says in words which ``rule`` chose it.

    ``digest`` is the SHA-256 of everything that can change a decision (not of the name): two policies that do
    the same have the same digest. ``tenant`` is what the record says; it is set only by a trusted peer or a key.
    """

    name: str
    digest: str
    rule: Rule
    reason: str
    tenant: str | None
    input: SourcePolicy
    output: OutputPolicy
    block_style: Literal["error", "soft"]
    race: bool = False

    def source(self, source: Source) -> SourcePolicy:
        return self.input if source == "input" else self.output


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, as far as policy cares. ``api_key`` is the raw key: hash it, keep it nowhere."""

    tenant: str | None = None
    api_key: str | None = field(default=None, repr=False)
    peer_trusted: bool = False


class PolicySet:
    """The policies of one configuration, ready to be asked; immutable and shared between requests."""

    def __init__(self, config: Config) -> None:
        self._effective = {
            name: EffectivePolicy(name, digest(p), "default", "", None, p.input, p.output, p.block_style, p.race)
            for name, p in config.policies.items()
        }
        self._default = config.default_policy
        self._routes = config.routes
        self._header = config.tenants.header
        self._tenants = {rule.tenant: rule.policy for rule in config.tenants.match if rule.tenant is not None}
        self._keys = [
            (bytes.fromhex(rule.api_key_sha256), rule.policy)
            for rule in config.tenants.match
            if rule.api_key_sha256 is not None
        ]
        self._unix = "unix" in config.tenants.trusted_proxies
        self._networks = [ipaddress.ip_network(n) for n in config.tenants.trusted_proxies if n != "unix"]

    def identify(
        self,
        headers: Sequence[tuple[bytes, bytes]],
        *,
        client: tuple[str, int] | None,
        server: tuple[str, int | None] | None,
    ) -> Identity:
        """Who asks, from an ASGI scope's ``headers``, ``client`` and ``server``.

        ``client`` must be the transport's peer: with uvicorn's ``proxy_headers`` it is whatever a client wrote
        into X-Forwarded-For, so serve with ``proxy_headers=False``. Raises ``RequestRejected`` where a header
        that decides is given twice, or where keys choose policies and there are two of them: the upstream might
        read the other one.
        """
        tenants = [value for name, value in headers if name == (self._header or "").encode()]
        authorizations = [value for name, value in headers if name == b"authorization"]
        for name, values in ((self._header, tenants), ("authorization", authorizations)):
            if len(values) > 1:
                raise RequestRejected(RejectKind.INVALID_REQUEST, f"the header {name} is given more than once")
        given = {_credential(name, value) for name, value in headers if name in CREDENTIALS} - _NOTHING
        if self._keys and len(given) > 1:
            names = ", ".join(name.decode() for name in CREDENTIALS)
            raise RequestRejected(RejectKind.INVALID_REQUEST, f"the headers {names} hold more than one key: give one")
        keys = [key for is_key, key in given if is_key]
        trusted = self.trusts(client, server)
        return Identity(
            tenant=tenants[0].decode("utf-8", "replace").strip() or None if tenants and trusted else None,
            api_key=keys[0].decode("utf-8", "surrogateescape") if len(keys) == 1 else None,
            peer_trusted=trusted,
        )

    def trusts(self, client: tuple[str, int] | None, server: tuple[str, int | None] | None) -> bool:
        """Whether a peer may name its tenant. A connection is Unix where ``server`` has no port, as ASGI says;
        a missing ``client`` alone proves nothing (a TCP peer that is gone has none either)."""
        if server is not None and server[1] is None:
            return self._unix
        try:
            address = ipaddress.ip_address(client[0] if client else "")
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self._networks)

    def resolve(
        self, *, path: str, tenant: str | None = None, api_key: str | None = None, peer_trusted: bool = False
    ) -> EffectivePolicy:
        """The policy of a request to ``path`` (decoded, without query). A tenant of an untrusted peer is ignored."""
        tenant = tenant if peer_trusted else None
        if tenant is not None and (name := self._tenants.get(tenant)):
            return self._chosen(name, "tenant", f"tenant `{tenant}`, named in {self._header} by a trusted peer", tenant)
        if api_key is not None and self._keys:
            found = self._key(hashlib.sha256(api_key.encode("utf-8", "surrogateescape")).digest())
            if found is not None:
                label = f"key:{found[0].hex()[:12]}"
                return self._chosen(found[1], "api_key", f"the API key with SHA-256 {label[4:]}...", tenant or label)
        for route in self._routes:
            if path_matches(route.path, path):
                return self._chosen(route.policy, "route", f"the route {route.path}", tenant)
        return self._chosen(self._default, "default", "default_policy, as no other rule applies", tenant)

    def _key(self, given: bytes) -> tuple[bytes, str] | None:
        found = None
        for key in self._keys:  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(key[0], given):
                found = key
        return found

    def _chosen(self, name: str, rule: Rule, reason: str, tenant: str | None) -> EffectivePolicy:
        return replace(self._effective[name], rule=rule, reason=reason, tenant=tenant)


_NOTHING = {(True, b""), (False, b"")}


def _credential(name: bytes, value: bytes) -> tuple[bool, bytes]:
    """(whether it is a key, the key itself); ``Authorization`` has other schemes too."""
    scheme, _, token = value.strip().partition(b" ")
    if name != b"authorization":
        return True, value.strip()
    return (True, token.strip()) if scheme.lower() == b"bearer" else (False, value.strip())


def digest(policy: Policy) -> str:
    """SHA-256 in hex over the policy's canonical JSON; the same for every way of writing the same policy."""
    canonical = json.dumps({"version": 2, **policy.model_dump()}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def decide(policy: EffectivePolicy, source: Source, outcome: Verdict | GuardError, *, decision_id: str) -> Decision:
    """What ``policy`` makes of one outcome. Total: every outcome gives a decision, and nothing is raised.

    A verdict that does not judge ``source``, or whose score is no probability, is an error, never a guess; so is one
    that finds no harm in content of which the guard was told to ignore a part. Where harmful content is blocked, an
    error that the content itself causes blocks whatever ``on_error`` says: else making a text too long would be a way
    past.
    """
    rules = policy.source(source)
    if isinstance(outcome, Verdict):
        score = risk(outcome, source)
        if score is not None and (score >= rules.threshold or not outcome.ignored):
            would = action = Action.ALLOW
            if score >= rules.threshold:
                would = Action.ANNOTATE if rules.on_harmful == "annotate" else Action.BLOCK
                action = Action.ALLOW if rules.on_harmful == "shadow" else would
            return _decision(policy, source, decision_id, action, would, Basis.VERDICT, outcome, None)
        kind = GuardErrorKind.UNPARSEABLE if score is None else GuardErrorKind.MEDIA
        outcome = GuardError(kind, f"the verdict does not judge the {source}, or not all of it")
    provoked = outcome.kind in PROVOKED and rules.on_harmful == "block"
    action = {
        "block": Action.BLOCK,
        "annotate_unscreened": Action.ANNOTATE,
        "allow_unscreened": Action.ALLOW,
    }["block" if provoked else rules.on_error]
    return _decision(policy, source, decision_id, action, action, Basis.ERROR, None, outcome.kind.value)


def is_bypass(decision: Decision) -> bool:
    """Whether content passes that no verdict covers: count these, whatever the policy says of them."""
    return decision.basis is not Basis.VERDICT and decision.action is not Action.BLOCK


def risk(verdict: Verdict, source: Source) -> float | None:
    """The probability of harm that is held against the threshold.

    Label and score come from the same token and agree at 0.5; where they do not, the worse of the two counts.
    Without a score the label is certain. None where the verdict says nothing usable of this source.
    """
    label, score = verdict.label(source), verdict.score(source)
    if label not in ("harmful", "unharmful"):
        return None
    if score is None:
        return 1.0 if label == "harmful" else 0.0
    if not (math.isfinite(score) and 0.0 <= score <= 1.0):
        return None
    return max(score, 0.5) if label == "harmful" else score


def _decision(
    policy: EffectivePolicy,
    source: Source,
    id: str,
    action: Action,
    would: Action,
    basis: Basis,
    verdict: Verdict | None,
    error: str | None,
) -> Decision:
    return Decision(
        id=id,
        source=source,
        action=action,
        basis=basis,
        policy=policy.name,
        policy_digest=policy.digest,
        would=would,
        verdict=verdict,
        error=error,
        show_reasoning=policy.source(source).show_reasoning,
    )
