"""Which policy a request gets: by its path, by its tenant, or by the digest of its API key.

Refuses tenant headers that clients set themselves, and rules that could never match or that stand twice.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from guard_middleware.config.section import Section
from guard_middleware.configtypes import HeaderName, Network, RoutePath, Sha256, refuse


class Route(Section):
    path: RoutePath = Field(description="a path, or a prefix that ends in /*")
    policy: str = Field(description="the name of a policy")


def path_matches(pattern: str, path: str) -> bool:
    """Whether a route's pattern covers a path: the same path, or below a prefix that ends in ``/*``."""
    return path.startswith(pattern[:-1]) if pattern.endswith("/*") else path == pattern


class TenantMatch(Section):
    tenant: str | None = Field(
        default=None, min_length=1, max_length=128, description="the value of the tenant header, in quotes"
    )
    api_key_sha256: Sha256 | None = Field(
        default=None, description="the SHA-256 of the client's API key in hex, in quotes (never the key itself)"
    )
    policy: str = Field(description="the name of a policy")

    @model_validator(mode="after")
    def _one_fact(self) -> Self:
        if (self.tenant is None) == (self.api_key_sha256 is None):
            raise refuse("a match needs exactly one of `tenant` and `api_key_sha256`", "write one rule for each")
        return self


class Tenants(Section):
    header: Annotated[HeaderName, AfterValidator(str.lower)] | None = Field(
        default=None, description="the header that your auth layer sets, such as x-tenant"
    )
    trusted_proxies: tuple[Network, ...] = Field(
        default=("127.0.0.1/32", "::1/128", "unix"),
        description="a list of addresses, CIDRs or unix: the peers whose tenant header is believed",
    )
    match: tuple[TenantMatch, ...] = Field(default=(), description="a list, such as [{tenant: acme, policy: strict}]")

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.header in ("authorization", "cookie", "host", "x-forwarded-for") or (self.header or "").startswith(
            "x-guard-"
        ):
            raise refuse(
                "a header that clients set or that is stripped", "use one of its own, such as x-tenant", "header"
            )
        seen: set[str] = set()
        for index, rule in enumerate(self.match):
            if rule.tenant is not None and self.header is None:
                raise refuse(
                    "a tenant that can never match", "name the header: tenants.header: x-tenant", "match", index
                )
            key = f"{rule.tenant}/{rule.api_key_sha256}"
            if key in seen:
                raise refuse("the second rule for the same tenant or key", "keep one of them", "match", index)
            seen.add(key)
        return self
