"""One YAML file, read once, to frozen values. Every section and key is optional; what is left out fails closed.

``load`` and ``parse`` raise ``ConfigError`` with the line and the remedy; nothing starts on a broken file.
A field's ``description`` is that remedy, and the reference in docs/policy.md, so it says how to write the value.

Refuses, beside what ``strictyaml`` refuses:
    - unknown keys, wrong types, numbers out of range, durations without a unit
    - policies that are referenced and not defined, rules that can never apply, keys that have no effect
    - secrets in the file: they are named by environment variable
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from guard_middleware import strictyaml
from guard_middleware.configtypes import (
    Age,
    Bytes,
    Env,
    FieldName,
    HeaderName,
    Name,
    Network,
    Origin,
    Pattern,
    RoutePath,
    Seconds,
    Sha256,
    Url,
    refuse,
)
from guard_middleware.errors import ConfigError
from guard_middleware.limits import Limits
from guard_middleware.types import Judging, Mode, Source

BUILT_IN_POLICY = "default"
#: the name of the guard that the section ``worker`` describes
DEFAULT_GUARD = "worker"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Ensemble(Section):
    """Several guards that judge together (``guard_middleware.ensemble``); one alone picks that guard."""

    rule: Literal["any", "all", "first_confident"] = Field(
        description="any, all or first_confident: who of them has to find harm"
    )
    of: tuple[Name, ...] = Field(
        min_length=1, description="a list of names out of `guards`, and `worker`, such as [worker, large]"
    )
    confident: tuple[float, float] | None = Field(
        default=None, description="first_confident only: two scores from 0 to 1, the lower first, such as [0.1, 0.9]"
    )

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if len(set(self.of)) < len(self.of):
            raise refuse("a guard that is named twice", "name each once", "of")
        if (self.rule == "first_confident") != (self.confident is not None):
            if self.confident is None:
                raise refuse("first_confident trusts some scores: say which", "write confident: [0.1, 0.9]", "rule")
            raise refuse(f"`confident` has no effect beside rule: {self.rule}", "remove it", "confident")
        if self.confident is not None and not 0.0 <= self.confident[0] < self.confident[1] <= 1.0:
            raise refuse("no range of scores", "write [0.1, 0.9], the lower score first", "confident")
        return self


class SourcePolicy(Section):
    """What is done with one source (input or output)."""

    moderate: bool = Field(default=True, description="true; false leaves this source UNGUARDED: no verdict, no refusal")
    on_harmful: Literal["block", "annotate", "shadow"] = Field(default="block", description="block, annotate or shadow")
    on_error: Literal["block", "annotate_unscreened", "allow_unscreened"] = Field(
        default="block",
        description="block; or annotate_unscreened or allow_unscreened, which let through what nobody screened",
    )
    threshold: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="a number between 0 and 1, such as 0.5; to guard nothing write moderate: false",
    )
    deadline: Seconds = Field(
        default=10.0, description="a duration of more than 0 and at most 10m, such as 2s or 500ms"
    )
    show_reasoning: bool = Field(
        default=False, description="true or false: whether the client sees the guard's reasoning"
    )
    reader: bool | None = Field(
        default=None,
        description="true or false: whether text drawn in images is read; left out, the model's own default",
    )
    mode: Mode = Field(
        default="reason",
        description="reason (think, then judge), label (judge at once) or hybrid (think where think_between says)",
    )
    think_between: tuple[float, float] | None = Field(
        default=None, description="hybrid only: two scores from 0 to 1, the lower first, such as [0.1, 0.9]"
    )

    ensemble: Ensemble | None = Field(
        default=None, description="a mapping, such as {rule: any, of: [worker, large]}; left out, `worker` judges"
    )

    @property
    def judging(self) -> Judging:
        return Judging(self.mode, *(self.think_between or ()))

    @model_validator(mode="after")
    def _no_dead_keys(self) -> Self:
        for key in sorted(self.model_fields_set - {"moderate"}):
            if not self.moderate:
                raise refuse(f"`{key}` has no effect beside moderate: false", f"remove {key}, or moderate: false", key)
        if self.mode == "label" and self.show_reasoning:
            raise refuse("`show_reasoning` has no effect in mode label: there is none", "remove it", "show_reasoning")
        return self

    @model_validator(mode="after")
    def _confident_on_both_sides(self) -> Self:
        if self.ensemble is not None and self.ensemble.confident is not None:
            low, high = self.ensemble.confident
            if not low < self.threshold <= high:
                raise refuse(
                    f"confident scores that leave the threshold ({self.threshold:g}) on one side",
                    "write two scores with the threshold between them",
                    "ensemble",
                    "confident",
                )
        return self

    @model_validator(mode="after")
    def _thinks_somewhere(self) -> Self:
        if (self.mode == "hybrid") != (self.think_between is not None):
            if self.mode == "hybrid":
                raise refuse("hybrid thinks about some scores: say which", "write think_between: [0.1, 0.9]", "mode")
            raise refuse(f"`think_between` has no effect in mode {self.mode}", "remove it", "think_between")
        if self.think_between is not None and not 0.0 <= self.think_between[0] < self.think_between[1] <= 1.0:
            raise refuse("no range of scores", "write [0.1, 0.9], the lower score first", "think_between")
        return self


class StreamRules(Section):
    """How a streamed answer leaves while it is judged (``holdback``). Sizes are characters of one choice."""

    mode: Literal["hold", "window", "async"] = Field(
        default="hold",
        description="hold (nothing before the last verdict), window (what was judged) or async (at once, then cut)",
    )
    first_window: int = Field(default=240, ge=16, le=100_000, description="characters of the first window, from 16")
    last_window: int = Field(default=2000, ge=16, le=1_000_000, description="characters of the longest window, from 16")
    growth: float = Field(default=1.5, ge=1, le=4, description="how much longer each window is, a number from 1 to 4")
    overlap: int = Field(
        default=120, ge=0, le=10_000, description="characters that a window repeats; at most half of first_window"
    )
    leak_bound: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="async only: how many characters may be ahead of the guard, such as 1000",
    )
    keep_alive: Seconds = Field(
        default=15.0, description="a duration, such as 15s: silence after which a held stream shows a sign of life"
    )

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.overlap * 2 > self.first_window:
            raise refuse("the overlap is more than half of the first window", "lower overlap", "overlap")
        if self.last_window < self.first_window:
            raise refuse("the last window is shorter than the first", "raise last_window", "last_window")
        if (self.mode == "async") != (self.leak_bound is not None):
            if self.mode == "async":
                raise refuse("async shows text before its verdict: say how much", "write leak_bound: 1000", "mode")
            raise refuse(f"`leak_bound` has no effect in mode {self.mode}", "remove it", "leak_bound")
        return self


class OutputPolicy(SourcePolicy):
    deadline: Seconds = Field(
        default=20.0, description="a duration of more than 0 and at most 10m, such as 2s or 500ms"
    )
    stream: StreamRules = Field(default=StreamRules(), description="a mapping, such as {mode: window}")


class Policy(Section):
    """One named policy. The deadlines suit nano on a CPU; on a GPU 2s and 5s are enough."""

    input: SourcePolicy = Field(default=SourcePolicy(), description="a mapping, such as {on_harmful: block}")
    output: OutputPolicy = Field(default=OutputPolicy(), description="a mapping, such as {on_harmful: annotate}")
    race: bool = Field(
        default=False,
        description="true or false: whether the upstream is called before the input has its verdict",
    )
    block_style: Literal["error", "soft"] = Field(
        default="error",
        description="error (400, or finish_reason content_filter), or soft (200 with a refusal as the answer)",
    )


_NOT_FOR_UPSTREAM = {
    "host", "content-length", "content-type", "content-encoding", "accept-encoding", "transfer-encoding",
    "connection", "te", "trailer", "upgrade", "keep-alive", "expect",
}  # fmt: skip


class Upstream(Section):
    url: Url | None = Field(
        default=None, description="the API's base URL, such as http://127.0.0.1:8000/v1 (--upstream wins)"
    )
    headers_from_env: Mapping[HeaderName, Env] = Field(
        default={},
        description="header: NAME of the environment variable that holds its value (authorization: UPSTREAM_AUTH)",
    )

    @field_validator("headers_from_env")
    @classmethod
    def _forwardable(cls, headers: Mapping[str, str]) -> Mapping[str, str]:
        result: dict[str, str] = {}
        for name, variable in headers.items():
            if name.lower() in _NOT_FOR_UPSTREAM:
                raise refuse(f"the header `{name}` is the gateway's own", "remove it", name)
            if name.lower() in result:
                raise refuse(f"the header `{name}` is given twice", "keep one of the two", name)
            result[name.lower()] = variable
        return result


class Weights(Section):
    """Weights that change while the gateway runs; ``worker.model`` serves until the first promotion."""

    directory: str = Field(
        min_length=1, description="the folder that holds the revisions and says which one serves: /srv/guard-weights"
    )
    golden: str | None = Field(
        default=None, min_length=1, description="a JSONL file of verdicts to keep; left out, the mild set that ships"
    )
    shadow: float = Field(
        default=0.05, ge=0, le=1, description="the share of live questions that staged weights get too, from 0 to 1"
    )
    keep: Age = Field(
        default=600.0, description="an age such as 10m: how long the weights before a promotion stay loaded"
    )


_OWN_OPTIONS = {"--model", "--socket", "--port", "--host", "--allow-remote", "--threads", "--exit-with-parent"}


class Worker(Section):
    model: str = Field(default="nano", min_length=1, description="nano, a folder, or a hub id")
    socket: str | None = Field(
        default=None, min_length=1, max_length=100, description="the Unix socket's path (at most 100 characters)"
    )
    url: Url | None = Field(
        default=None, description="where a worker that is started elsewhere listens: http://127.0.0.1:8900"
    )
    manage: bool | None = Field(
        default=None, description="true or false: whether the gateway starts and restarts the worker"
    )
    balanced: bool = Field(
        default=False,
        description="true where a load balancer, such as Ray Serve, stands at the URL: each question is a request then",
    )
    threads: int | None = Field(default=None, ge=1, le=256, description="CPU threads of the worker, 1 to 256")
    options: tuple[str, ...] = Field(
        default=(),
        description="a list of more options of `guard-gateway worker`, such as [--engine, vllm, --max-batch, '64']",
    )
    weights: Weights | None = Field(
        default=None, description="a mapping, such as {directory: /srv/guard-weights}; left out, `model` alone serves"
    )

    @property
    def managed(self) -> bool:
        """Whether the gateway owns the worker's process: yes, unless it is at a URL or ``manage`` is false."""
        return self.url is None if self.manage is None else self.manage

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.url is not None and self.socket is not None:
            raise refuse("the worker has both `url` and `socket`", "keep one of them", "url")
        if self.url is not None and self.manage:
            raise refuse("a worker at a URL is started elsewhere", "write manage: false, or use socket", "manage")
        if self.url is not None and self.threads is not None:
            raise refuse("`threads` has no effect on a worker that is started elsewhere", "remove it", "threads")
        if self.options and not self.managed:
            raise refuse("`options` have no effect on a worker that is started elsewhere", "remove them", "options")
        for index, option in enumerate(self.options):
            if option.partition("=")[0] in _OWN_OPTIONS:
                raise refuse(
                    f"`{option[:80]}` is the gateway's own", "leave it to the keys beside it", "options", index
                )
        if self.balanced and self.url is None:
            raise refuse("`balanced` has no effect without a URL", "write url beside it, or remove it", "balanced")
        if self.weights is not None and not self.managed:
            raise refuse("weights of a worker that is started elsewhere", "change what listens there", "weights")
        if self.weights is not None and self.socket is not None:
            raise refuse("`socket` beside `weights`: each of two workers needs its own", "remove it", "socket")
        if self.manage is False and self.url is None and self.socket is None:
            raise refuse("a worker that nobody starts and that is nowhere", "write socket or url beside it", "manage")
        return self


class Images(Section):
    fetch: bool = Field(
        default=True, description="true or false: whether http(s) image URLs are fetched (false refuses them)"
    )
    allow: tuple[Origin, ...] = Field(
        default=(),
        description="a list of host:port that may be fetched although they are not public, such as [images.corp:443]",
    )


class Dialect(Section):
    extra_fields: Mapping[FieldName, Literal["moderated", "opaque"]] = Field(
        default={}, description="field: moderated (the guard reads it) or opaque (passed UNREAD)"
    )


_DIALECT = Field(default=Dialect(), description="a mapping, such as {extra_fields: {context: moderated}}")


class Dialects(Section):
    chat_completions: Dialect = _DIALECT
    completions: Dialect = _DIALECT
    messages: Dialect = _DIALECT
    responses: Dialect = _DIALECT


class Route(Section):
    path: RoutePath = Field(description="a path, or a prefix that ends in /*")
    policy: str = Field(description="the name of a policy")


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


class Telemetry(Section):
    capture_content: bool = Field(
        default=False, description="true or false: whether spans carry prompts and answers in clear"
    )
    service_name: str = Field(
        default="guard-gateway", min_length=1, max_length=128, description="the OpenTelemetry service.name"
    )


class Redaction(Section):
    pattern: Pattern = Field(description="a Python regular expression, quoted with ''")
    replacement: str = Field(default="[redacted]", description="what replaces a match, such as '[email]'")

    @model_validator(mode="after")
    def _template(self) -> Self:
        try:
            re.compile(self.pattern).sub(self.replacement, "")
        except (re.error, IndexError) as error:
            raise refuse(
                f"a replacement that cannot be used ({error})", "double each backslash", "replacement"
            ) from None
        return self


class Audit(Section):
    """``include_reasoning`` and ``redact`` hold for spans and records alike."""

    path: str | None = Field(
        default=None, min_length=1, description="the decision log's file; left out, no log is written"
    )
    include_reasoning: bool = Field(
        default=True, description="true or false: whether spans and records carry the guard's reasoning"
    )
    capture_content: bool = Field(
        default=False, description="true or false: whether records carry prompts and answers in clear"
    )
    redact: tuple[Redaction, ...] = Field(
        default=(), description="a list, such as [{pattern: '[0-9]{16}', replacement: '[card]'}]"
    )
    hmac_key_env: Env = Field(
        default="GUARD_MIDDLEWARE_HMAC_KEY",
        description="NAME of the environment variable that holds the key of content digests",
    )


class VerdictCache(Section):
    """With ``entries: 0`` nothing is kept: each question is put to the guard, about the whole conversation."""

    entries: int = Field(default=20_000, ge=0, le=10**8, description="a whole number; 0 keeps no verdicts")
    bytes: Bytes = Field(default=64 * 2**20, description="a size of more than 0 and at most 2GiB, such as 64MiB")
    ttl: Age = Field(default=3600.0, description="an age of at most 30d, such as 1h")


class TurnsCache(Section):
    characters: int = Field(
        default=1500,
        ge=0,
        le=10**9,
        description="how much of earlier turns is read again at least; beyond it, judged answers are left out",
    )
    images: int = Field(
        default=2, ge=0, le=1000, description="how many images are shown; earlier ones stand as the text drawn in them"
    )


class HistoryCache(Section):
    """With ``entries: 0`` nothing is kept, and a request that continues an earlier answer is refused."""

    entries: int = Field(default=10_000, ge=0, le=10**8, description="a whole number; 0 keeps no conversations")
    bytes: Bytes = Field(default=256 * 2**20, description="a size of more than 0 and at most 2GiB, such as 256MiB")
    ttl: Age = Field(default=86_400.0, description="an age of at most 30d, such as 24h")
    conversation: Bytes = Field(
        default=32 * 2**20, description="a size, such as 32MiB: the longest conversation that is kept, images included"
    )


class RedisCache(Section):
    url_env: Env | None = Field(
        default=None,
        description="NAME of the environment variable that holds redis://host:6379/0; left out, memory is used",
    )
    deadline: Seconds = Field(default=0.05, description="a duration, such as 50ms: then everything is judged anew")


class Cache(Section):
    """What is remembered between requests, in memory or, for several gateways, in one Redis or Valkey."""

    verdicts: VerdictCache = Field(default=VerdictCache(), description="a mapping, such as {entries: 20000, ttl: 1h}")
    turns: TurnsCache = Field(default=TurnsCache(), description="a mapping, such as {characters: 1500, images: 2}")
    history: HistoryCache = Field(default=HistoryCache(), description="a mapping, such as {entries: 10000, ttl: 24h}")
    images: Bytes = Field(default=64 * 2**20, description="a size, such as 64MiB, of decoded images that are kept")
    redis: RedisCache = Field(default=RedisCache(), description="a mapping, such as {url_env: GUARD_REDIS_URL}")


def _limit(field: dataclasses.Field[Any]) -> tuple[Any, Any]:
    if field.name.endswith("_seconds"):
        return Seconds, Field(
            default=field.default, description="a duration of more than 0 and at most 10m, such as 5s"
        )
    if field.name.endswith("_bytes"):
        return Bytes, Field(default=field.default, description="a size of more than 0 and at most 2GiB, such as 20MB")
    if field.type == "float":
        return float, Field(default=field.default, ge=1, le=1e6, description="a number from 1")
    top = 256 if field.name == "json_depth" else 10**9
    return int, Field(default=field.default, gt=0, le=top, description=f"a whole number from 1 to {top}")


LimitsSection = create_model(
    "LimitsSection",
    __base__=Section,
    **{field.name: _limit(field) for field in dataclasses.fields(Limits)},  # type: ignore[call-overload]
)


class _AsLimits:
    """Validates as ``LimitsSection`` (so that errors keep their place) and yields ``limits.Limits``."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            _AsLimits.build,
            handler.generate_schema(LimitsSection),
            serialization=core_schema.plain_serializer_function_ser_schema(asdict),
        )

    @staticmethod
    def build(section: Any) -> Limits:
        limits = Limits(**dict(section))
        if limits.image_min_side > limits.image_max_side:
            raise refuse("the shortest side is longer than the longest", "swap the two values", "image_min_side")
        return limits


class Config(Section):
    """Everything that an operator configures. Build one with ``load`` or ``parse``; ``Config()`` is the default."""

    version: Literal[1] = Field(default=1, description="1, the only version of this file so far")
    upstream: Upstream = Field(default=Upstream(), description="a mapping, such as {url: http://127.0.0.1:8000/v1}")
    worker: Worker = Field(default=Worker(), description="a mapping, such as {model: nano}")
    guards: Mapping[Name, Worker] = Field(
        default={}, description="name: {model, socket, url, ...}, as in `worker`; names are letters, digits, - _ and ."
    )
    limits: Annotated[Limits, _AsLimits] = Field(default=Limits(), description="a mapping, such as {body_bytes: 20MB}")
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
                raise refuse(f"the policy `{name[:80]}` is not defined", _choose(name, self.policies), *at)
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
                    raise refuse(
                        f"the guard `{name}` is not defined", _choose(name, [DEFAULT_GUARD, *self.guards]), *at
                    )
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
            raise _config_error(error, strictyaml.Document({}, {}), "--upstream", prefix=("upstream",)) from None
        return self.model_copy(update={"upstream": upstream})


def path_matches(pattern: str, path: str) -> bool:
    """Whether a route's pattern covers a path: the same path, or below a prefix that ends in ``/*``."""
    return path.startswith(pattern[:-1]) if pattern.endswith("/*") else path == pattern


def load(path: str) -> Config:
    """The configuration in a file; raises ``ConfigError`` and nothing else."""
    try:
        with open(path, "rb") as file:
            data = file.read(4 * strictyaml.MAX_CHARS + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", path=path, remedy="give --config the path of a readable file"
        ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            "not UTF-8",
            path=path,
            line=data.count(b"\n", 0, error.start) + 1,
            remedy="save the file as plain UTF-8 text",
        ) from None
    return parse(text, path=path)


def parse(text: str, *, path: str | None = None) -> Config:
    """The configuration in a text; raises ``ConfigError`` and nothing else. ``path`` is for its message."""
    document = strictyaml.parse(text, path=path)
    try:
        return Config.model_validate(document.value, context={"file": True})
    except ValidationError as error:
        raise _config_error(error, document, path) from None


#: Values that may be secrets, or may hold one by mistake: never repeated in a message.
_NOT_REPEATED = {"api_key_sha256", "url", "headers_from_env", "hmac_key_env"}


_FAULTS = {
    "model_type": "not a mapping",
    "dict_type": "not a mapping",
    "mapping_type": "not a mapping",
    "tuple_type": "not a list",
    "string_type": "not text",
    "string_too_short": "too short",
    "string_too_long": "too long",
    "string_pattern_mismatch": "not in the form that is read here",
    "bool_type": "neither true nor false",
    "int_type": "not a whole number",
    "int_from_float": "not a whole number",
    "float_type": "not a number",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "less_than": "too large",
    "less_than_equal": "too large",
    "literal_error": "not one of the choices",
}


def _config_error(
    error: ValidationError, document: strictyaml.Document, path: str | None, prefix: strictyaml.Path = ()
) -> ConfigError:
    problems = sorted((_problem(e, document, prefix) for e in error.errors(include_url=False)), key=lambda p: p[0])
    line, message, remedy = problems[0]
    others = sorted({other for other, _, _ in problems[1:]})
    if others:
        remedy += f" (then see line{'s' if len(others) > 1 else ''} {', '.join(map(str, others))})"
    return ConfigError(message, path=path, line=line if document.lines else None, remedy=remedy)


def _problem(error: ErrorDetails, document: strictyaml.Document, prefix: strictyaml.Path) -> tuple[int, str, str]:
    """(line, what is wrong, what to write instead) of one pydantic error."""
    context = error.get("ctx", {})
    loc = tuple(step for step in (*prefix, *error["loc"], *context.get("at", ())) if step != "[key]")
    where, parent = _dotted(loc), _dotted(loc[:-1]) or "the file"
    section, description = _schema(loc)
    given, fault = error["input"], error["type"]
    remedy = f"write {description}" if description else "write sections, such as `policies:`"
    match fault:
        case "extra_forbidden":
            message = f"unknown key `{str(loc[-1])[:80]}` in {parent}"
            remedy = _choose(str(loc[-1]), section.model_fields if section else ())
        case "missing":
            message = f"`{loc[-1]}` is missing in {parent}"
        case "refused":
            message, remedy = f"{where or 'the file'}: {context['reason']}", context["remedy"]
        case _ if given is None:
            message = f"{where} is empty"
        case _:
            message = f"{where or 'the file'}: {_FAULTS.get(fault, 'not valid')}"
            if isinstance(given, str | int | float) and not _NOT_REPEATED & set(loc):
                message += f" ({given!r:.80})"
            if fault == "literal_error" and (near := _near(str(given), re.findall(r"'(\w+)'", context["expected"]))):
                remedy = f"did you mean `{near}`? {remedy}"
            if fault == "string_type":
                remedy = f"put it in quotes; {remedy}"
    return document.line(loc), message, remedy


def _near(given: str, names: Iterable[str]) -> str | None:
    names = list(names)
    near = difflib.get_close_matches(given, names, n=1) or [name for name in names if given and name.startswith(given)]
    return near[0] if near else None


def _choose(given: str, names: Iterable[str]) -> str:
    near = _near(given, names)
    return f"did you mean `{near}`?" if near else f"choose from {', '.join(names)}"


def _dotted(loc: strictyaml.Path) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step[:80]}" for step in loc).removeprefix(".")


def _schema(loc: strictyaml.Path) -> tuple[type[BaseModel] | None, str]:
    """The section that holds ``loc``, and how to write its value: the nearest description."""
    kind: Any = Config
    section: type[BaseModel] | None = None
    description = ""
    for step in loc:
        if type(None) in typing.get_args(kind):
            kind = typing.get_args(kind)[0]
        if kind is Limits:
            kind = LimitsSection
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            section = kind
            field = kind.model_fields.get(str(step))
            if field is None:
                break
            kind, description = field.annotation, field.description or description
            continue
        arguments = typing.get_args(kind)
        kind = arguments[-1] if typing.get_origin(kind) is Mapping else next(iter(arguments), None)
    return section, description
