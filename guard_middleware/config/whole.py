"""The whole configuration: every section, and what has to hold between them.

Refuses policies and guards that are named and not defined, guards that no policy asks, and routes that an earlier
route hides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from guard_middleware import strictyaml
from guard_middleware.config.caches import Cache
from guard_middleware.config.content import AsLimits, Dialects, Images
from guard_middleware.config.messages import choose, config_error
from guard_middleware.config.policies import BUILT_IN_POLICY, Policy, SourcePolicy
from guard_middleware.config.records import Audit, Telemetry
from guard_middleware.config.routing import Route, Tenants, path_matches
from guard_middleware.config.section import Section
from guard_middleware.config.services import DEFAULT_GUARD, Upstream, Worker
from guard_middleware.configtypes import Name, refuse
from guard_middleware.limits import Limits
from guard_middleware.types import Source


class Config(Section):
    """Everything that an operator configures. Build one with ``load`` or ``parse``; ``Config()`` is the default."""

    version: Literal[1] = Field(default=1, description="1, the only version of this file so far")
    upstream: Upstream = Field(default=Upstream(), description="a mapping, such as {url: http://127.0.0.1:8000/v1}")
    worker: Worker = Field(default=Worker(), description="a mapping, such as {model: nano}")
    guards: Mapping[Name, Worker] = Field(
        default={}, description="name: {model, socket, url, ...}, as in `worker`; names are letters, digits, - _ and ."
    )
    limits: Annotated[Limits, AsLimits] = Field(default=Limits(), description="a mapping, such as {body_bytes: 20MB}")
    images: Images = Field(default=Images(), description="a mapping, such as {fetch: false}")
    dialects: Dialects = Field(
        default=Dialects(), description="a mapping, such as {chat_completions: {extra_fields: {}}}"
    )
    policies: Mapping[Name, Policy] = Field(
        default={BUILT_IN_POLICY: Policy()}, description="name: {input, output}; names are letters, digits, - _ and ."
    )
    default_policy: str = Field(default=BUILT_IN_POLICY, description="the name of a policy")
    routes: tuple[Route, ...] = Field(
        default=(), description="a list, such as [{path: /v1/chat/completions, policy: strict}]"
    )
    tenants: Tenants = Field(default=Tenants(), description="a mapping, such as {header: x-tenant, match: []}")
    telemetry: Telemetry = Field(default=Telemetry(), description="a mapping, such as {service_name: guard-gateway}")
    audit: Audit = Field(default=Audit(), description="a mapping, such as {path: decisions.jsonl}")
    cache: Cache = Field(default=Cache(), description="a mapping, such as {verdicts: {ttl: 1h}}")

    @field_validator("policies")
    @classmethod
    def _with_built_in(cls, policies: Mapping[str, Policy]) -> Mapping[str, Policy]:
        return {BUILT_IN_POLICY: Policy(), **policies}

    @field_validator("routes")
    @classmethod
    def _reachable(cls, routes: tuple[Route, ...]) -> tuple[Route, ...]:
        for index, route in enumerate(routes):
            for earlier in routes[:index]:
                if path_matches(earlier.path, route.path):
                    raise refuse(
                        f"`{route.path}` can never apply: the rule for `{earlier.path}` comes first",
                        "put it first",
                        index,
                    )
        return routes

    @model_validator(mode="after")
    def _defined(self) -> Self:
        used: list[tuple[str, tuple[str | int, ...]]] = [(self.default_policy, ("default_policy",))]
        used += [(route.policy, ("routes", i, "policy")) for i, route in enumerate(self.routes)]
        used += [(rule.policy, ("tenants", "match", i, "policy")) for i, rule in enumerate(self.tenants.match)]
        for name, at in used:
            if name not in self.policies:
                raise refuse(f"the policy `{name[:80]}` is not defined", choose(name, self.policies), *at)
        return self

    @model_validator(mode="after")
    def _guards_named(self) -> Self:
        if DEFAULT_GUARD in self.guards:
            raise refuse(
                f"`{DEFAULT_GUARD}` is the name of the guard in the section `worker`",
                "choose another name",
                "guards",
                DEFAULT_GUARD,
            )
        named = set()
        for policy, which, rules in self._sources():
            for index, name in enumerate(rules.ensemble.of if rules.ensemble is not None else ()):
                named.add(name)
                if name != DEFAULT_GUARD and name not in self.guards:
                    at = ("policies", policy, which, "ensemble", "of", index)
                    raise refuse(f"the guard `{name}` is not defined", choose(name, [DEFAULT_GUARD, *self.guards]), *at)
        for name in self.guards:
            if name not in named:
                raise refuse(
                    f"no policy asks the guard `{name}`", "name it in an ensemble, or remove it", "guards", name
                )
        return self

    def guards_in_use(self) -> Mapping[str, Worker]:
        """Name -> where it is, of every guard that a request's policy may ask."""
        applied = {self.default_policy}
        applied |= {rule.policy for rule in self.routes} | {rule.policy for rule in self.tenants.match}
        asked: set[str] = set()
        for policy, _, rules in self._sources():
            if policy in applied:
                asked |= set(rules.ensemble.of) if rules.ensemble is not None else {DEFAULT_GUARD}
        places = {DEFAULT_GUARD: self.worker, **self.guards}
        return {name: place for name, place in places.items() if name in asked}

    def _sources(self) -> Iterable[tuple[str, Source, SourcePolicy]]:
        for name, policy in self.policies.items():
            yield name, "input", policy.input
            yield name, "output", policy.output

    def with_upstream(self, url: str) -> Config:
        """This configuration with another upstream (``--upstream``); raises ``ConfigError``."""
        try:
            upstream = Upstream.model_validate({**dict(self.upstream), "url": url})
        except ValidationError as error:
            document = strictyaml.Document({}, {})
            raise config_error(error, document, "--upstream", root=Config, prefix=("upstream",)) from None
        return self.model_copy(update={"upstream": upstream})
